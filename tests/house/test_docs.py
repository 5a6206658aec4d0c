"""The pages of docs/: the site is built without a warning, and what is generated is up to date and complete."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from scripts.make_docs import ROOT, pages, registers


def build(root: Path, site: Path) -> subprocess.CompletedProcess[str]:
    """Build the site of a checkout as `make docs` does."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)]
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}  # of the theme's end of life, not of our pages
    return subprocess.run(command, cwd=root, capture_output=True, text=True, env=env)


def test_the_site_is_built_without_a_warning(tmp_path):
    result = build(ROOT, tmp_path / "site")
    assert result.returncode == 0 and "WARNING" not in result.stderr, result.stderr
    made = {path.stem for path in (tmp_path / "site").glob("*.html")}
    assert {path.stem for path in (ROOT / "docs").glob("*.md")} <= made


def test_a_link_to_nothing_fails_the_build(tmp_path):
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    for link in ("[x](nowhere.md)", "[x](limits.md#nowhere)"):
        (tmp_path / "docs" / "index.md").write_text(f"# Home\n\n{link}\n")
        assert build(tmp_path, tmp_path / "site").returncode != 0, link


def test_generated_parts_are_up_to_date():
    made = pages()
    assert {path.stem for path in made} == {"configuration", "command-line", "metrics", "engine-patches"}
    stale = [path.name for path, text in made.items() if text != path.read_text(encoding="utf-8")]
    assert stale == [], "run `make docs`"


def test_the_page_of_patches_names_every_entry():
    text = (ROOT / "docs" / "engine-patches.md").read_text()
    targets = [patch.target for register in registers().values() for patch in register.PATCHES]
    assert len(targets) > 40
    assert [target for target in targets if target not in text] == []


def test_the_page_of_commands_names_every_option():
    """Also those that the generator would leave out: the help of each command is asked."""
    from typer.testing import CliRunner

    from mem_triton.cli.app import app

    text = (ROOT / "docs" / "command-line.md").read_text()
    sections = dict(re.findall(r"^## mem-triton ([\w -]+)$\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL))
    assert {"write", "doctor", "bank list", "bank import"} <= set(sections)
    for command, told in sections.items():
        shown = CliRunner().invoke(app, [*command.split(), "--help"], env={"COLUMNS": "300", "NO_COLOR": "1"}).output
        options = set(re.findall(r"--[a-z][\w-]+", shown)) - {"--help"}
        assert [option for option in options if option not in told] == [], command


def test_every_fact_has_a_test_and_every_test_a_fact():
    """Facts of systems that are planned have none yet."""
    told = set(re.findall(r"^\| ([A-D]\d+) \|", (ROOT / "docs" / "facts.md").read_text(), re.MULTILINE))
    numbers = [*(f"A{i}" for i in range(1, 15)), *(f"B{i}" for i in range(1, 13))]
    numbers += [*(f"C{i}" for i in range(1, 13)), *(f"D{i}" for i in range(1, 9))]
    assert told == set(numbers)
    named = set()
    for path in (ROOT / "tests").rglob("*.py"):
        for name in re.findall(r"def test_((?:[abcd]\d+_)+)", path.read_text()):
            named |= {part.upper() for part in name.strip("_").split("_")}
    assert named <= told
    assert {fact for fact in told if fact[0] in "AB"} <= named, "facts without a test"


def test_every_fault_is_told():
    """Names of tests carry the numbers in the headings of docs/robustness.md."""
    text = (ROOT / "docs" / "robustness.md").read_text()
    told = {int(n) for group in re.findall(r"\((\d+(?:, \d+)*)\)", text) for n in group.split(", ")}
    named = {int(n) for path in (ROOT / "tests").rglob("*.py") for n in re.findall(r"fault(\d+)_", path.read_text())}
    assert named and named <= told, sorted(named - told)
