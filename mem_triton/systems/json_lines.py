"""Rows of JSON Lines files, with errors that name the file and the line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def json_rows(path: Path, shape: str, error: type[Exception], option: str = "") -> Iterator[tuple[str, Any]]:
    """Give (file and line, value) for each line of a file that is not blank.

    shape: what every line should be, for messages. option: what messages begin with, such as ``--questions``. Raises
    ``error`` for a file that cannot be opened or is not UTF-8, and for a line that is not JSON.
    """
    name = f"{option}: {path}" if option else str(path)
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    where = f"{name}:{number}"
                    try:
                        yield where, json.loads(line)
                    except (ValueError, RecursionError) as broken:
                        raise error(f"{where}: not JSON ({broken}); every line is one object, {shape}") from None
    except UnicodeDecodeError as broken:
        raise error(f"{name}: not UTF-8 text (byte {broken.start}); convert it first") from None
    except OSError as broken:
        raise error(f"{name}: {broken.strerror or broken}") from None
