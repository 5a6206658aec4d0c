"""Reads loops out of a compiled kernel's machine code, as NVIDIA's cuobjdump prints it."""

from __future__ import annotations

import re
from typing import NamedTuple

INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*)")


class Loop(NamedTuple):
    """A branch backwards: the instructions from where it leads up to it, and how many of them are warp shuffles."""

    instructions: int
    shuffles: int


def loops(sass: str) -> tuple[Loop, ...]:
    """All loops, in the order of their ends; a trap at a kernel's end, which branches to itself, is none."""
    code = [(int(found[1], 16), found[2], found[3]) for line in sass.splitlines() if (found := INSTRUCTION.match(line))]
    number = {address: i for i, (address, _, _) in enumerate(code)}
    found = []
    for i, (address, name, rest) in enumerate(code):
        target = re.search(r"0x([0-9a-f]+)", rest) if name.startswith("BRA") else None
        if target and int(target[1], 16) < address:
            body = [name for _, name, _ in code[number[int(target[1], 16)] : i + 1]]
            found.append(Loop(len(body), sum(name.startswith("SHFL") for name in body)))
    return tuple(found)
