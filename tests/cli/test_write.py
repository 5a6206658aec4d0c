"""``mem-triton write`` as people use it: folders with bad files, names that are alike, edited and deleted documents."""

from __future__ import annotations

import io
import json
import re
import shutil
import unicodedata
from pathlib import Path

import pytest
import torch

from mem_triton.cli import progress as bars
from mem_triton.cli.progress import Progress
from mem_triton.cli.sources import SourceDocuments, sources_of
from mem_triton.ids import id_from
from mem_triton.store.bank import Bank, NewEntry
from mem_triton.store.bank.documents import references
from mem_triton.write import WriteReport
from tests.cli.test_cli import MODEL, refused, run

PREFIX = ("--kind", "prefix")


def write(bank: Path, *arguments: object, code: int = 0) -> dict:
    return json.loads(run("write", MODEL, bank, *arguments, "--json", code=code))


def listed(bank: Path) -> dict[str, str]:
    return {entry["ref"]: entry["text"] for entry in json.loads(run("bank", "list", bank, "--json"))}


def tree(folder: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def test_fault22_a_tokenizer_without_a_longest_text_is_one_line(tmp_path):
    model = Path(shutil.copytree(MODEL, tmp_path / "model"))
    config = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(config | {"model_max_length": [[]]}))
    docs = tree(tmp_path / "docs", {"a.txt": "The badge of Mara is amber."})
    line = refused("write", model, tmp_path / "bank", docs)
    assert "tokenizer_config.json: model_max_length is [[]], expected a number" in line


def test_fault21_bad_files_are_left_out_listed_and_counted(tmp_path):
    lines = ['{"text": "The desk of Hugo is teak."}', '{"text": 7}', "nope", '{"text": "half \\ud83d"}', '{"text": ""}']
    docs = tree(
        tmp_path / "docs",
        {
            "a.txt": "The badge of Mara is amber.",
            "b.txt": b"caf\xe9",
            "blank.txt": " \n",
            "c.jsonl": "\n".join(lines),
            "long.txt": "The badge of Mara is amber. " * 4000,
            "z.txt": "The team of Nina is comet.",
        },
    )
    report = write(tmp_path / "bank", docs, *PREFIX, code=1)
    assert sorted(report["added"]) == ["a@1", "c.1@1", "z@1"] and report["empty"] == 2
    expected = (
        r"b\.txt: not UTF-8",
        r"c\.jsonl:2: no text field",
        r"c\.jsonl:3: not JSON",
        r"c\.jsonl:4: text: .*half of a surrogate pair",
        r"long\.txt: \d+ tokens, the model takes \d+; split it",
    )
    assert len(report["problems"]) == len(expected)
    for problem in expected:
        assert any(re.search(problem, said) for said in report["problems"]), (problem, report["problems"])
    assert report["added"] and write(tmp_path / "bank", docs, *PREFIX, code=1)["skipped"] == 3
    line = refused("write", MODEL, tmp_path / "none", docs / "b.txt")
    assert "b.txt: not UTF-8 text (byte 3)" in line and not (tmp_path / "none").exists()
    line = refused("write", MODEL, tmp_path / "none", docs / "b.txt", docs / "long.txt", *PREFIX)
    assert "b.txt" in line and line.endswith("1 more are wrong")


@pytest.mark.parametrize("kind", ["prefix", "memory3"])
def test_fault21_files_of_one_name_in_two_folders_are_two(tmp_path, kind):
    docs = tree(tmp_path / "docs", {"a/README.md": "The badge is amber.", "b/README.md": "The desk is cedar."})
    for name, given in (
        ("files", [docs / "a" / "README.md", docs / "b" / "README.md"]),
        ("folder", [docs]),
        ("folders", [docs / "a", docs / "b"]),
    ):
        bank = tmp_path / f"{name}.bank"
        refs = write(bank, *given, "--kind", kind, "--commit", 1)["added"]
        assert [re.split(r"[:@]", ref)[0] for ref in refs] == ["a/README", "b/README"]
        assert sorted(listed(bank).values()) == ["The badge is amber.", "The desk is cedar."]


def test_fault21_another_file_takes_no_files_place(tmp_path):
    docs = tree(tmp_path / "docs", {"a/README.md": "The badge is amber.", "b/README.md": "The desk is cedar."})
    bank = tmp_path / "bank"
    assert write(bank, docs / "a" / "README.md", *PREFIX)["added"] == ["README@1"]
    line = refused("write", MODEL, bank, docs / "b" / "README.md", *PREFIX)
    assert str(docs / "a" / "README.md") in line and "b/README.md" in line and "--id" in line
    assert listed(bank) == {"README@1": "The badge is amber."}
    (docs / "a" / "README.md").write_text("The badge is red.")
    assert write(bank, docs / "a" / "README.md", *PREFIX)["added"] == ["README@2"], "its own file does"
    assert write(bank, docs / "b" / "README.md", *PREFIX, "--replace")["added"] == ["README@3"]
    assert write(bank, docs / "b" / "README.md", *PREFIX, "--id", "desk")["added"] == ["desk@1"]


def test_fault21_names_of_all_scripts_become_ids_of_their_own(tmp_path):
    names = [
        "第一章.txt",
        "第二章.txt",
        "Zürich.txt",
        unicodedata.normalize("NFD", "Über uns.txt"),
        "a b.txt",
        "a-b.txt",
        "notes.md",
        "notes.txt",
        "(1).txt",
        "[1].txt",
        "😀.txt",
        "x" * 150 + ".txt",
        "x" * 151 + ".txt",
    ]
    docs = tree(tmp_path / "docs", {name: f"Text {i} is amber." for i, name in enumerate(names)})
    report = write(tmp_path / "bank", docs, *PREFIX)
    assert len(set(report["added"])) == len(names) == len(listed(tmp_path / "bank"))
    assert {"xn--Zrich-kva@1", f"{id_from('Über uns')}@1", "notes.md@1", "notes.txt@1"} <= set(report["added"])
    assert write(tmp_path / "bank", docs, *PREFIX)["skipped"] == len(names), "the same names again"
    assert len(sources_of([docs, docs / "a b.txt", docs])) == len(names), "a file that is given twice is one"


def test_fault21_an_id_that_is_given_twice_in_one_run_is_reported(tmp_path):
    lines = [{"key": f"k{i % 70}", "text": f"The badge {i} is amber."} for i in range(72)]
    docs = tree(tmp_path, {"facts.jsonl": "\n".join(map(json.dumps, lines))})
    options = [docs / "facts.jsonl", *PREFIX, "--jsonl-id-field", "key"]
    for added in (70, 0):
        report = write(tmp_path / "bank", *options, code=1)
        assert len(report["added"]) == added, "no version grows with a run"
        first = f'{docs}/facts.jsonl:71: id "k0" was given by {docs}/facts.jsonl:1 already'
        assert len(report["problems"]) == 2 and report["problems"][0] == first
    assert all(ref.endswith("@1") for ref in listed(tmp_path / "bank"))


def test_fault21_the_same_text_under_a_second_id_is_there_under_it(tmp_path):
    docs = tree(tmp_path, {"a.txt": "The badge is amber.", "b.txt": "The badge is amber."})
    bank = tmp_path / "bank"
    assert write(bank, docs / "a.txt", *PREFIX)["added"] == ["a@1"]
    assert write(bank, docs / "b.txt", *PREFIX)["added"] == ["b@1"]
    assert write(bank, docs / "a.txt", *PREFIX, "--id", "t", "--tenant", "acme")["added"] == ["t@1"]
    with Bank.open(bank) as opened:
        blocks = [opened.load(ref) for ref in ("a@1", "b@1", "t@1")]
        assert all(torch.equal(blocks[0].keys, block.keys) for block in blocks)
    sparse = tmp_path / "sparse"
    write(sparse, docs / "a.txt")
    assert write(sparse, docs / "b.txt")["added"][0].startswith("b:"), "each file has its own"
    again = write(sparse, docs / "b.txt", "--tenant", "acme")
    assert again["skipped"] == 1 and again["elsewhere"][0].startswith(f"{docs}/b.txt: a:")
    assert "there already under another id" in run(
        "write", MODEL, sparse, docs / "b.txt", "--tenant", "acme", both=True
    )


def test_fault21_an_edited_document_is_replaced_by_its_source(tmp_path):
    texts = [f"The badge number {i} of Mara Stone and of Hugo Park is amber and cedar." for i in range(6)]
    docs = tree(
        tmp_path / "docs", {"guide.txt": " ".join(texts[:5]), "other.txt": texts[1], "gone.txt": "Gone is comet."}
    )
    bank = tmp_path / "bank"
    write(bank, docs, "--reference-tokens", 24)
    before = listed(bank)
    (docs / "guide.txt").write_text(" ".join([texts[5], *texts[4:1:-1]]))
    report = write(bank, docs / "guide.txt")
    assert len(report["stale"]) == 2 and report["removed"] == [] and report["skipped"] == 3
    assert "--replace takes them out" in run("write", MODEL, bank, docs / "guide.txt", both=True)
    report = write(bank, docs / "guide.txt", "--replace")
    assert len(report["removed"]) == 2 and report["stale"] == []
    with Bank.open(bank) as opened:
        ordered = [info.text for info in references(opened, "guide")]
        assert ordered == [texts[5], *texts[4:1:-1]], "in the order of its last write, without what it held before"
        assert [info.text for info in references(opened, "other")] == [texts[1]], "another file keeps the same text"
        assert {ref for ref in before if ref.startswith("guide")} & {info.ref for info in references(opened, "guide")}
    (docs / "gone.txt").unlink()
    elsewhere = tree(tmp_path / "elsewhere", {"x.txt": "Elsewhere is raven."})
    write(bank, elsewhere)
    (elsewhere / "x.txt").unlink()
    assert "names no folder" in refused("write", MODEL, bank, docs / "guide.txt", "--prune")
    removed = write(bank, docs, "--prune")["removed"]
    assert len(removed) == 1 and removed[0].startswith("gone:")
    assert any(ref.startswith("x:") for ref in listed(bank)), "files of other folders are not this one's to prune"
    assert run("bank", "delete", bank, "--source", docs / "guide.txt") == "deleted 4\n"


def test_fault21_a_file_that_could_not_be_read_loses_nothing(tmp_path):
    docs = tree(tmp_path, {"facts.jsonl": '{"text": "The badge is amber."}\n{"text": "The desk is cedar."}'})
    bank = tmp_path / "bank"
    write(bank, docs / "facts.jsonl", *PREFIX)
    (docs / "facts.jsonl").write_text('{"text": "The badge is amber."}\n{"text": "The desk')
    assert write(bank, docs / "facts.jsonl", *PREFIX, "--replace", code=1)["removed"] == []
    assert sorted(listed(bank)) == ["facts.1@1", "facts.2@1"]


def test_fault21_a_text_that_is_anothers_id_is_told_and_the_others_are_written(tmp_path):
    docs = tree(tmp_path / "docs", {"a.txt": "The badge is amber.", "b.txt": "The desk is cedar."})
    bank = tmp_path / "bank"
    run("bank", "create", bank, "--model", MODEL, *PREFIX)
    with Bank.open(bank, writable=True) as opened:
        opened.add([NewEntry("a", "theirs", tenant="acme")])
    report = write(bank, docs, *PREFIX, code=1)
    assert report["added"] == ["b@1"] and "another tenant's" in report["problems"][0]


def test_fault21_progress_is_told_without_a_terminal(tmp_path, monkeypatch):
    docs = tree(tmp_path, {"a.txt": "数" * 100, "b.txt": "x" * 300})
    reader = SourceDocuments(
        sources_of([docs / "a.txt", docs / "b.txt"]), format=None, field="text", id_field=None, id=None, single=True
    )
    clock, lines = [100.0], io.StringIO()
    monkeypatch.setattr(bars.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr("sys.stderr", lines)
    progress, report = Progress(reader, 600, quiet=False), WriteReport()
    documents = iter(reader)

    def go(seconds: float, characters: int, tokens: int) -> str:
        clock[0] += seconds
        report.characters, report.tokens, report.seconds = characters, tokens, clock[0] - 100
        before = len(lines.getvalue())
        progress(report)
        return lines.getvalue()[before:]

    next(documents)
    assert go(0.5, 0, 0) == "", "quick writes say nothing"
    assert go(1.5, 50, 20) == f"25 %, {docs}/a.txt: 0 entries, 10 tokens/s, 0:06 left\n", "half of its bytes"
    report.added.append("a@1")
    assert go(1.0, 100, 40) == ""
    next(documents)
    assert go(4.0, 100, 70) == f"50 %, {docs}/b.txt: 1 entries, 10 tokens/s, 0:07 left\n"
    quiet = Progress(reader, 600, quiet=True)
    clock[0] += 100
    before = lines.getvalue()
    quiet(report)
    assert lines.getvalue() == before


def test_fault21_ids_of_captures_are_left_to_them(tmp_path):
    lines = [{"key": "capture:x", "text": "The badge is amber."}, {"key": "b", "text": "The desk is cedar."}]
    docs = tree(tmp_path, {"facts.jsonl": "\n".join(map(json.dumps, lines)), "capture.md": "The team is comet."})
    report = write(tmp_path / "bank", docs / "facts.jsonl", *PREFIX, "--jsonl-id-field", "key", code=1)
    assert report["added"] == ["b@1"] and "kept for captures" in report["problems"][0]
    assert "kept for captures" in refused("write", MODEL, tmp_path / "sparse", docs / "capture.md")
    assert "kept for captures" in refused("bank", "rename", tmp_path / "bank", "b", "capture:b")
