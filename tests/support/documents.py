"""The documents' pages and their blocks, and what the commands in them need."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
_FILES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
PAGES = {path.name: path.read_text() for path in _FILES}
ALL = "\n\n".join(PAGES.values())
MODEL, ADAPTER = ROOT / "benchmarks/recall/model", ROOT / "benchmarks/recall/adapter"


def blocks(language: str, text: str = ALL) -> list[tuple[str, str]]:
    """(title, content) of every fenced block of a language."""
    fence = rf'^```{language}(?: title="([^"\n]*)")?\n(.*?)^```$'
    return re.findall(fence, text, re.MULTILINE | re.DOTALL)


def commands(content: str) -> list[str]:
    """The commands of a shell block, one a line; what an argument in quotes holds may have several."""
    whole = re.sub(r"'[^']*'", lambda quoted: " ".join(quoted[0].split()), content.replace("\\\n", " "))
    return [line for line in whole.splitlines() if line.strip() and not line.startswith("#")]


def requests(field: str) -> list[tuple[str, dict[str, Any]]]:
    """(path, body) of every request in the documents that has memory's fields in ``field``, in order."""
    found = []
    for _, content in blocks("bash"):
        for line in commands(content):
            if line.startswith("curl ") and f'"{field}"' in line:
                path, body = re.search(r"localhost:\d+(\S+) .* -d '(.*)'$", line).groups()
                found.append((path, json.loads(body)))
    return found


def mem_triton(folder: Path, arguments: list[str]) -> None:
    """Run the command in this process, which has the libraries loaded."""
    from mem_triton.cli.app import main

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["mem-triton", *arguments])
        main()
    assert end.value.code == 0, arguments


def write_bank(folder: Path) -> Path:
    """A bank of the shipped model, with the entries that the requests of the documents name."""
    (folder / "notes.md").write_text("The key of the east door is with Hugo.\n")
    for month in ("May", "June"):  # a second version
        (folder / "contract.md").write_text(f"The contract ends in {month}.\n")
        files = ["notes.md", "contract.md", "--replace", "--quiet"]
        mem_triton(folder, ["write", str(MODEL), "BANK", *files, "--kind", "prefix"])
    return folder / "BANK"


def ask_all(server: Any, field: str) -> list[str]:
    """Send every request of the documents to a server of the shipped model; returns the answers' texts."""
    texts = []
    for path, body in requests(field):
        answer = server.http.post(path, json={**body, "model": "m", "temperature": 0, "max_tokens": 16})
        assert answer.status_code == 200, (body, answer.text)
        texts.append(answer.json()["choices"][0]["message"]["content"])
        if ids := body[field].get("mem_ids"):
            (read,) = server.report(answer)["references"]
            named = [entry["id"] for entry in read["entries"]]
            assert [id if "@" in id else id + "@1" for id in ids] == named
    return texts
