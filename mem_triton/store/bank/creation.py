"""Where a bank may be made, and how its ``bank.json`` is read: what is in a folder already is never replaced."""

from __future__ import annotations

import json
import os
import sqlite3
from pathlib import Path

from mem_triton.store.bank.spec import BankSpec
from mem_triton.store.errors import BankError
from mem_triton.store.files import RESERVE, WRITING, is_signature

CATALOGUE = "catalogue.sqlite"
_UNFINISHED = {
    "shards",
    "index",
    "writer.lock",
    RESERVE,
    f"{WRITING}bank.json",
    *(CATALOGUE + end for end in ("", "-wal", "-shm", "-journal")),
}
"""What a creation that did not get as far as ``bank.json`` may have left."""


def check_free(path: Path, locked: bool) -> None:
    """Raises BankError unless a bank may be made at ``path``: it is not there, empty, or an unfinished creation.

    locked: whether this process has the writer's lock there, so that nobody else is making a bank meanwhile.
    """
    if os.path.lexists(path / "bank.json"):
        raise BankError(f"{path} is a bank already; open it, or choose another path")
    if not path.exists() and not path.is_symlink():
        return
    if not path.is_dir():
        raise BankError(f"{path} is no folder; choose another path")
    names = {entry.name for entry in path.iterdir()}
    if CATALOGUE in names and (problem := _lost_spec(path)):
        raise BankError(problem)
    strange = names - _UNFINISHED
    strange |= {name for name in ("shards", "index") if name in names and not _is_empty_folder(path / name)}
    if "writer.lock" in names and not is_signature(path / "writer.lock"):
        strange.add("writer.lock")
    if "writer.lock" not in names:
        strange |= {name for name in names if name.startswith(CATALOGUE)}
    elif CATALOGUE in names and locked and not _is_empty_catalogue(path / CATALOGUE):
        strange.add(CATALOGUE)
    if strange:
        some = ", ".join(sorted(strange)[:3]) + (", ..." if len(strange) > 3 else "")
        raise BankError(f"{path} is neither empty nor a bank (it holds {some}); choose a folder of the bank's own")


def read_spec(path: Path) -> BankSpec:
    """The specification of a bank. Raises BankError."""
    try:
        data = json.loads((path / "bank.json").read_text())
    except FileNotFoundError as error:
        raise BankError(_lost_spec(path) or f"{path} is no memory bank: {error}; {_MAKE}") from None
    except OSError as error:
        raise BankError(f"{path} is no memory bank: {error}; {_MAKE}") from None
    except (ValueError, RecursionError) as error:
        raise BankError(f"{path} is no memory bank: bank.json: {error}; {_RESTORE}") from None
    if not isinstance(data, dict):
        raise BankError(f"{path}/bank.json holds no object; {_RESTORE}")
    return BankSpec.from_dict(data, f"{path}/bank.json")


def check_unchanged(path: Path, spec: BankSpec, stored: str | None) -> None:
    """Raises BankError if ``bank.json`` is not what the bank was made with; only an embedder's URL may have moved.

    stored: what the catalogue keeps of it, None before it kept anything.
    """
    if stored is None:
        return
    made = BankSpec.from_dict(json.loads(stored), f"{path / CATALOGUE}: spec")
    for name in BankSpec.model_fields:
        here, first = getattr(spec, name), getattr(made, name)
        moved = name == "embedder" and all(embedder.startswith("openai:") for embedder in (here, first))
        if here != first and not (moved and here.rpartition("#")[2] == first.rpartition("#")[2]):
            raise BankError(f"{path}/bank.json: {name} is {here}, the bank was made with {first}; put that back")


_MAKE = "make one with `mem-triton write`"
_RESTORE = (
    "restore it from a backup, or from the catalogue: "
    "sqlite3 catalogue.sqlite \"SELECT value FROM meta WHERE key = 'spec'\""
)


def _lost_spec(path: Path) -> str | None:
    """What to say of a folder that is a bank but for its ``bank.json``; None if it is none."""
    if not (path / CATALOGUE).exists() or not any((path / "shards").glob("*.safetensors")):
        return None
    return f"{path} is a bank whose bank.json is missing; {_RESTORE}"


def _is_empty_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink() and not any(path.iterdir())


def _is_empty_catalogue(path: Path) -> bool:
    """Return whether a catalogue can be replaced without losing rows."""
    if path.is_symlink() or not path.is_file():
        return False
    try:
        db = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)
        try:
            tables = {name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            ours = ("ids", "entries", "shards", "vectors") if tables else ()
            return not any(db.execute(f"SELECT 1 FROM {table}").fetchone() for table in ours)
        finally:
            db.close()
    except sqlite3.Error:
        return False
