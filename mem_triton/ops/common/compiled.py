"""How numba compiles loops here. This module imports no numba, which an engine's start trips over.

numba keeps what it compiled in ``__pycache__``, and compiles a function anew if its own file has changed: not if a
function of another file has, which it inlined. Importing this module removes what is older than any source file.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

# Sums may be reordered, for vector instructions: always in the same way. Infinities and NaN keep their meaning.
OPTIONS = {"cache": True, "nogil": True, "error_model": "numpy", "fastmath": {"reassoc", "contract", "nsz"}}

_PACKAGE = Path(__file__).parents[2]
_COMPILED = ("ops", "store/bank")  # where functions are compiled; their sources import one another


def drop_stale(folders: list[Path]) -> int:
    """Remove numba's index files that are older than the newest source file of ``folders``; give their number.

    numba compiles a function whose index is missing. A folder that cannot be written holds no index of numba's either.
    """
    dropped = 0
    with suppress(OSError):  # another process removes the same files
        newest = max((file.stat().st_mtime for folder in folders for file in folder.rglob("*.py")), default=0)
        for index in (file for folder in folders for file in folder.rglob("__pycache__/*.nbi")):
            if index.stat().st_mtime < newest:
                index.unlink(missing_ok=True)
                dropped += 1
    return dropped


drop_stale([_PACKAGE / folder for folder in _COMPILED])
