"""The command line as a new user meets it: on a real model, in processes of its own."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from packaging.version import Version

from mem_triton.cli import main
from mem_triton.store.bank import Bank
from mem_triton.write import Writer
from tests.memory3.support import RECALL, TEXT
from tests.store.bank_case import entry, spec
from tests.support.models import save_tiny_model

MODEL = str(RECALL.with_name("model-memory"))  # for which writing keeps sparse references
THINGS, NAMES, VALUES = (
    ("desk", "badge", "team"),
    ("Mara Stone", "Hugo Park", "Nina Price"),
    ("amber", "cedar", "comet"),
)


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "mem_triton.cli", *map(str, arguments)]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120"}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def run(*arguments: object, code: int = 0, process: bool = False, terminal: bool = False, both: bool = False) -> str:
    """Run a command; in this process, which has the libraries loaded, unless the test is about processes.

    both: what it says on stderr, too.
    """
    if process:
        result = subprocess.run(command(*arguments), capture_output=True, text=True, timeout=240, env=environment())
        got, out, err = result.returncode, result.stdout, result.stderr
    else:
        streams = Terminal() if terminal else io.StringIO(), io.StringIO()
        with (
            patch.object(sys, "argv", ["mem-triton", *map(str, arguments)]),
            contextlib.redirect_stdout(streams[0]),
            contextlib.redirect_stderr(streams[1]),
            pytest.raises(SystemExit) as end,
        ):
            main()
        got, (out, err) = end.value.code, (stream.getvalue() for stream in streams)
    assert got == code, (out, err)
    if code == 2:
        assert out == "" and "Traceback" not in err, err
        return err
    return out + err if both else out


def refused(*arguments: object) -> str:
    """The one line that says what is wrong."""
    (line,) = run(*arguments, code=2).splitlines()
    assert line.startswith("mem-triton: ")
    return line


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """A bank written by one command from a folder of files."""
    folder = tmp_path_factory.mktemp("cli")
    texts = folder / "texts"
    texts.mkdir()
    (texts / "facts.txt").write_text(TEXT)
    (texts / "guide.md").write_text("# Lockers\n\nThe locker of Mara.\n\n# Badges\n\nThe badge of Hugo.\n")
    (texts / "ignored.bin").write_bytes(b"\xff")
    report = json.loads(run("write", MODEL, folder / "bank", texts, "--reference-tokens", 24, "--json", process=True))
    assert len(report["added"]) == 4 and report["skipped"] == 0 and report["tokens"] > 48
    return folder / "bank"


def test_help_is_quick_and_loads_no_torch():
    script = (
        "import sys; sys.argv = ['mem-triton', '--help']\n"
        "from mem_triton.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code\n"
        "assert not {'torch', 'transformers', 'vllm', 'numpy', 'pydantic'} & set(sys.modules), 'too much is loaded'\n"
    )
    started = time.perf_counter()
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment())
    assert result.returncode == 0, result.stderr
    assert all(word in result.stdout for word in ("bank", "write", "doctor"))
    assert time.perf_counter() - started < 5, "well under a second on a quiet machine"


def test_a_second_write_adds_nothing(written, tmp_path):
    again = json.loads(run("write", MODEL, written, written.parent / "texts", "--json", process=True))
    assert again["added"] == [] and again["skipped"] == 4
    line = run("write", MODEL, written, written.parent / "texts" / "facts.txt")
    assert line.startswith(f"{written}: 0 added, 2 there already")


def test_what_is_written_is_found_and_shown(written):
    (first, _) = json.loads(run("bank", "search", written, "Hugo Park amber falcon Mara Stone", "--top-k", 2, "--json"))
    assert "Hugo Park is amber" in first["text"] and first["score"] > 0.2
    assert first["source"].endswith("facts.txt")
    shown = run("bank", "show", written, first["ref"])
    assert first["text"] in shown and "[2, 2, 8, 32]" in shown
    listed = json.loads(run("bank", "list", written, "--json"))
    assert len(listed) == 4 and {entry["metadata"].get("heading") for entry in listed} == {None, "Lockers", "Badges"}
    table = run("bank", "list", written, "--limit", 2)
    assert len(table.strip().splitlines()) == 3 and "facts:" in table
    info = json.loads(run("bank", "info", written, "--json"))
    assert (info["entries"], info["kind"], info["layers"], info["keep_tokens"]) == (4, "memory3", [0, 1], 8)
    assert info["fingerprint"]["architecture"] == "Qwen3ForCausalLM"
    assert "all well: 4 entries" in run("bank", "verify", written)


def test_a_bank_is_exported_thinned_and_restored(written, tmp_path):
    copy, second = tmp_path / "copy", tmp_path / "second"
    assert run("bank", "export", written, copy) == f"exported 4 to {copy}\n"
    run("bank", "create", second, "--model", MODEL, "--reference-tokens", 24)
    run("bank", "import", second, copy)
    with Bank.open(written) as a, Bank.open(second) as b:
        refs = [entry.ref for entry in a.list()]
        assert refs == [entry.ref for entry in b.list()]
        assert all(torch.equal(a.load(ref).keys, b.load(ref).keys) for ref in refs)
    assert run("bank", "delete", second, refs[0], refs[1].split("@")[0]) == "deleted 2\n"
    run("bank", "compact", second)
    left = json.loads(run("bank", "list", second, "--json"))
    assert [entry["ref"] for entry in left] == refs[2:]
    assert "unknown" in refused("bank", "show", second, refs[0])
    assert (
        "unknown" in refused("bank", "delete", second, refs[2], "nobody")
        and len(json.loads(run("bank", "list", second, "--json"))) == 2
    ), "nothing is deleted if one id is wrong"


def test_a_killed_write_is_resumed(tmp_path):
    facts = tmp_path / "facts.jsonl"
    lines = [f"The {t} of {n} number {i} is {v}." for i in range(15) for t in THINGS for n in NAMES for v in VALUES]
    facts.write_text("\n".join(json.dumps({"fact": line, "key": f"f{i}"}) for i, line in enumerate(lines)))
    options = ["--jsonl-field", "fact", "--jsonl-id-field", "key", "--commit", 8, "--quiet"]
    bank = tmp_path / "bank"
    process = subprocess.Popen(command("write", MODEL, bank, facts, *options), env=environment())
    try:
        deadline = time.monotonic() + 120
        while entries(bank) < 24:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    before = entries(bank)
    assert 24 <= before < len(lines), "it was over before it was killed"
    report = json.loads(run("write", MODEL, bank, facts, *options, "--json", process=True))
    assert (len(report["added"]), report["skipped"]) == (len(lines) - before, before)
    assert run("bank", "verify", bank).startswith(f"all well: {len(lines)} entries")
    whole = tmp_path / "whole"
    run("write", MODEL, whole, facts, *options)
    with Bank.open(bank) as a, Bank.open(whole) as b:
        refs = [entry.ref for entry in a.list(limit=len(lines) + 1)]
        assert refs == [entry.ref for entry in b.list(limit=len(lines) + 1)] and len(refs) == len(lines)
        assert all(torch.equal(a.load(ref).keys, b.load(ref).keys) for ref in refs[::50])
        assert torch.equal(a.sink().keys, b.sink().keys)


def test_an_interrupted_write_says_how_to_go_on(tmp_path):
    text, bank = tmp_path / "facts.txt", tmp_path / "bank"
    text.write_text(TEXT)
    options = ["--reference-tokens", 17, "--commit", 1]
    original, texts = Writer._blocks, []

    def interrupted(self, items):
        texts.extend(items)
        if len(texts) == 3:
            raise KeyboardInterrupt
        return original(self, items)

    with patch.object(Writer, "_blocks", interrupted):
        run("write", MODEL, bank, text, *options, code=130)
    assert entries(bank) == 2
    report = json.loads(run("write", MODEL, bank, text, *options, "--json"))
    assert (len(report["added"]), report["skipped"]) == (1, 2)


def entries(bank: Path) -> int:
    """Entries that are committed, seen from another process while the writer writes."""
    if not (bank / "bank.json").exists():
        return 0
    try:
        with Bank.open(bank) as reader:
            return reader.stats()["entries"]
    except ValueError:  # not complete yet
        return 0


def test_a_prefix_has_the_id_that_it_is_given(tmp_path):
    text, bank = tmp_path / "a.md", tmp_path / "bank"
    text.write_text(f"# Facts\n\n{TEXT}\n\n# More\n\nNoted.\n")
    options = ["--kind", "prefix", "--id", "facts", "--tenant", "acme"]
    assert json.loads(run("write", MODEL, bank, text, *options, "--json"))["added"] == ["facts@1"]
    (entry,) = json.loads(run("bank", "list", bank, "--tenant", "acme", "--json"))
    assert entry["text"] == text.read_text() and entry["tenant"] == "acme" and entry["tokens"] > 48
    assert json.loads(run("bank", "list", bank, "--tenant", "umbrella", "--json")) == []


def test_texts_alone_are_stored_and_encoded_later(tmp_path):
    text, bank = tmp_path / "facts.txt", tmp_path / "bank"
    text.write_text(TEXT)
    report = json.loads(run("write", MODEL, bank, text, "--reference-tokens", 17, "--cold", "--json"))
    assert len(report["added"]) == 3 and run("bank", "list", bank, "--cold").count("cold") == 3
    assert json.loads(run("write", MODEL, bank, "--json"))["filled"] == sorted(report["added"])
    assert json.loads(run("bank", "info", bank, "--json"))["cold"] == 0


def test_errors_are_one_line_and_exit_code_2(written, tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("One.")
    other = save_tiny_model(tmp_path / "other", layers=4)
    assert "there is no folder" in refused("write", "./nowhere", tmp_path / "b", text)
    assert "there is no" in refused("write", MODEL, tmp_path / "b", tmp_path / "absent.txt")
    assert "config.json" in refused("write", str(tmp_path), tmp_path / "b", text)
    assert "--layers: 'x'" in refused("write", MODEL, tmp_path / "b", text, "--layers", "x")
    assert "layers: the model has 0..3" in refused("write", MODEL, tmp_path / "b", text, "--layers", "3-9")
    assert "--kind: " in refused("write", MODEL, tmp_path / "b", text, "--kind", "prefixes")
    assert "--keep: 'few'" in refused("write", MODEL, tmp_path / "b", text, "--keep", "few")
    assert "id 'a@1'" in refused("write", MODEL, tmp_path / "b", text, "--id", "a@1")
    assert not (tmp_path / "b").exists(), "a refused write leaves nothing behind"
    assert "keep_tokens: the bank has 8, asked for 4" in refused("write", MODEL, written, text, "--keep", 4)
    assert "another model (hidden_size: bank has 192, model has 64" in refused("write", other, written, text)
    assert str(tmp_path / "none") in refused("bank", "list", tmp_path / "none")
    assert "another model" in refused("bank", "import", written, _exported_by(other, tmp_path))


def _exported_by(model: Path, folder: Path) -> Path:
    run("bank", "create", folder / "foreign", "--model", model)
    run("bank", "export", folder / "foreign", folder / "foreign.export")
    return folder / "foreign.export"


def test_the_doctor_names_versions_and_what_compiles():
    report = json.loads(run("doctor", "--json"))
    versions = {row["name"]: row["version"] for row in report["versions"]}
    assert versions["torch"] == torch.__version__ and versions["mem_triton"]
    assert report["triton"]["sm_90"] == "compiles" and report["triton"]["gfx942"] == "compiles"
    assert report["problems"] == []
    assert report["plugins"] == {"vllm": "mem_triton in vllm.general_plugins"}
    reasons = {row["what"]: row["why"] for row in report["kernels"]["off"]}
    assert "sglang is not installed" in reasons["serving with sglang"]


def test_the_doctor_tells_of_an_architecture(monkeypatch):
    """Its tables, none of them measured, and what its Triton must not compile."""
    from mem_triton.cli.doctor_kernels import examine_kernels

    hopper = examine_kernels("sm90")
    assert {t["op"]: t["entry"] for t in hopper["tables"]} == {
        "delta_rule": "own",
        "memory_attention": "own",
        "memory_attention routes": "own",
        "memory_selection": "the same everywhere",
        "reposition": "the same everywhere",
    }
    assert {t["measured"] for t in hopper["tables"]} == {None}
    assert {t["entry"] for t in examine_kernels("sm75")["tables"]} == {"generic", "the same everywhere"}
    monkeypatch.setattr("mem_triton.compat.installed_version", lambda name: Version("3.7.1"))
    assert any("issues/11047" in row["why"] for row in examine_kernels("sm90")["off"])
    assert not any("issues/11047" in row["why"] for row in examine_kernels("sm80")["off"])


def test_the_doctor_sees_plugins_shut_out(monkeypatch):
    monkeypatch.setenv("VLLM_PLUGINS", "another")
    out = run("doctor", "--architecture", "sm90", code=1)
    assert "VLLM_PLUGINS='another' keeps vllm from loading mem_triton" in out and "not measured" in out
    monkeypatch.setenv("VLLM_PLUGINS", "another,mem_triton")
    assert "all well" in run("doctor")


def test_fault25_ids_are_printed_whole(tmp_path, monkeypatch):
    ids = ["n/" + "x" * 110 + str(i) for i in range(2)]
    with Bank.create(tmp_path / "bank", spec()) as bank:
        bank.add([entry(id, i, tenant="a" * 60, source="s" * 90) for i, id in enumerate(ids)])
        bank.add([entry("short", 5, "word " * 200)])
    for arguments in (["list"], ["search", "--tenant", "a" * 60]):
        query = ["locker"] if arguments[0] == "search" else []
        out = run("bank", *arguments[:1], tmp_path / "bank", *query, *arguments[1:])
        assert all(f"{id}@1" in out for id in ids) and len(out.splitlines()) == 4, "a row is a line"
        monkeypatch.setenv("COLUMNS", "60")
        on_terminal = run("bank", *arguments[:1], tmp_path / "bank", *query, *arguments[1:], terminal=True)
        assert all(f"{id}@1" in on_terminal for id in ids), "not even a narrow terminal cuts them"
    assert run("bank", "search", tmp_path / "bank", "word").splitlines()[0].startswith("score")
    score = json.loads(run("bank", "search", tmp_path / "bank", "word word", "--json"))[0]["score"]
    assert f"{score:.3f}  short@1" in run("bank", "search", tmp_path / "bank", "word word")


def test_fault25_a_version_is_deleted_alone_and_ids_are_renamed(tmp_path):
    with Bank.create(tmp_path / "bank", spec()) as bank:
        bank.add([entry("a", 1), entry("b", 2, source="notes.md"), entry("c", 3, source="notes.md:7", tenant="t")])
        bank.update("a", entry("a", 4))
    bank = tmp_path / "bank"
    assert run("bank", "delete", bank, "a@2") == "deleted 1; a@1 is the newest again\n"
    assert run("bank", "rename", bank, "a", "docs/a") == "a is docs/a@1 now\n"
    assert "unknown" in refused("bank", "rename", bank, "a", "z") and "is taken" in refused(
        "bank", "rename", bank, "b", "docs/a"
    )
    assert run("bank", "rename", bank, "t", "acme", "--tenant") == "1 entries belong to acme now\n"
    assert "name entries" in refused("bank", "delete", bank)
    assert "no entry is from gone.md" in refused("bank", "delete", bank, "--source", "gone.md")
    assert run("bank", "delete", bank, "docs/a@1", "docs/a", "--source", "notes.md") == "deleted 3\n"
    assert run("bank", "info", bank, "--json").count('"entries": 0')
