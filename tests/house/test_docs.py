"""The pages of docs/: what is generated is up to date and complete."""

from __future__ import annotations

from scripts.make_docs import ROOT, pages, registers


def test_generated_parts_are_up_to_date():
    made = pages()
    assert {path.stem for path in made} == {"configuration", "command-line", "metrics", "engine-patches"}
    stale = [path.name for path, text in made.items() if text != path.read_text(encoding="utf-8")]
    assert stale == [], "run `make docs`"


def test_the_page_of_patches_names_every_entry():
    text = (ROOT / "docs" / "engine-patches.md").read_text()
    targets = [patch.target for patches in registers().values() for patch in patches]
    assert len(targets) > 40
    assert [target for target in targets if target not in text] == []
