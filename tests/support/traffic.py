"""Bytes that one program of a compiled kernel asks of memory, per argument, read from its TTGIR.

Every load, copy, store and atomic is traced back to the pointer argument that it goes through, and its addresses are
worked out with made-up strides and table entries: lanes of one instruction that share an address are one access, the
same address asked for by two instructions is two. Lanes that a mask of constants turns off (channels past the head's)
are padding, which moves no bytes but takes registers; of any other mask all lanes count. Caches are not looked at.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

ITEM = {"bf16": 2, "f16": 2, "f32": 4, "f64": 8, "i1": 1, "i8": 1, "i16": 2, "i32": 4, "i64": 8}  # bytes
_ACCESS = re.compile(
    r"\b(tt\.load|tt\.store|ttg\.async_copy_global_to_local|tt\.atomic_\w+|amdg\.\w*(?:load|store|atomic)\w*)\b"
)
_PASSES_ON = (
    "tt.splat",
    "tt.broadcast",
    "ttg.convert_layout",
    "arith.extsi",
    "arith.extui",
    "arith.trunci",
    "arith.index_cast",
    "tt.bitcast",
)
_BINARY = {
    "arith.addi": np.add,
    "arith.subi": np.subtract,
    "arith.muli": np.multiply,
    "arith.minsi": np.minimum,
    "arith.maxsi": np.maximum,
    "arith.divsi": lambda a, b: a // np.where(b == 0, 1, b),
    "arith.remsi": lambda a, b: a % np.where(b == 0, 1, b),
    "arith.shli": np.left_shift,
    "arith.shrsi": np.right_shift,
    "arith.shrui": np.right_shift,
    "arith.andi": np.bitwise_and,
    "arith.ori": np.bitwise_or,
}
_ARGUMENT_SHIFT = 44  # argument n's memory begins at n + 1 times 2**44


class Bytes(NamedTuple):
    """Of one argument. once: outside loops whose length the compiler does not know; each: in one turn of such a loop.
    padding: of lanes that are masked off for good."""

    once: int = 0
    each: int = 0
    padding: int = 0


def total(traffic: dict[str, Bytes], turns: int) -> int:
    """Bytes of a program whose loops of unknown length run ``turns`` times."""
    return sum(one.once + turns * one.each for one in traffic.values())


def read_traffic(ttgir: str, names: Sequence[str]) -> dict[str, Bytes]:
    """Bytes per pointer argument. ValueError for an access that cannot be traced to one.

    names: of the arguments that are no constants, in their order; Triton's own names differ between its versions.
    """
    module = _Module(names)
    for line in ttgir.splitlines():
        module.read(re.sub(r" loc\([^ ]*\)$", "", line.strip()))
    return module.summary()


@dataclass
class _Access:
    argument: str
    bytes: int
    padding: int
    unknown_loops: int  # around it
    depth: int  # loops around it, of either kind
    copied: bool  # by an asynchronous copy


@dataclass
class _Module:
    names: Sequence[str]
    arguments: dict[str, int] = field(default_factory=dict)  # name -> number
    made_by: dict[str, tuple[str, list[str], str]] = field(default_factory=dict)  # name -> op, operands, its line
    values: dict[str, np.ndarray] = field(default_factory=dict)
    loops: list[int | None] = field(default_factory=list)  # per open brace: turns, None = unknown, 1 = no loop
    accesses: list[_Access] = field(default_factory=list)

    def read(self, line: str) -> None:
        if line.startswith("}") and self.loops:
            self.loops.pop()
        if line.startswith("tt.func"):
            for number, (name, kind) in enumerate(re.findall(r"(%[\w.-]+): ([^\s,{)]+)", line)):
                self.arguments[name] = number
                first = (number + 1) << _ARGUMENT_SHIFT if kind.startswith("!tt.ptr") else 1_000_003 * (number + 1)
                self.values[name] = np.array(first)
        else:
            self._define(line)
            if _ACCESS.search(line):
                self._access(line)
        if line.endswith("{"):
            self.loops.append(self._turns(line))

    def _define(self, line: str) -> None:
        match = re.match(r"(%[\w.-]+)(?::\d+)? = \"?([\w.]+)\"?(.*)", line)
        if not match:
            return
        name, op, rest = match.groups()
        operands = re.findall(r"%[\w.-]+(?:#\d+)?", rest)
        if op in ("scf.for", "scf.while"):  # what a loop counts and carries is looked at in its first turn
            pairs = re.findall(r"(%[\w.-]+) = (%[\w.#-]+)", rest)
            for inner, start in pairs:
                self._made(inner, "tt.splat", [start], line)
            carried = pairs[1:] if op == "scf.for" else pairs
            names = [name] if len(carried) == 1 else [f"{name}#{number}" for number in range(len(carried))]
            for result, (_, start) in zip(names, carried, strict=True):
                self._made(result, "tt.splat", [start], line)
        else:
            self._made(name, op, operands, line)

    def _made(self, name: str, op: str, operands: list[str], line: str) -> None:
        self.made_by[name] = (op, operands, line)
        self.values.pop(name, None)  # loops side by side use the same names

    def _turns(self, line: str) -> int | None:
        match = re.search(r"scf\.for %[\w.-]+ = (%[\w.#-]+) to (%[\w.#-]+) step (%[\w.#-]+)", line)
        if not match:
            return None if "scf.while" in line or line == "} do {" else 1
        bounds = [self.made_by.get(name, ("", [], ""))[2] for name in match.groups()]
        if not all(" = arith.constant" in bound for bound in bounds):
            return None
        low, high, step = (int(self.value(name)) for name in match.groups())
        return max(0, -(-(high - low) // step))

    def _access(self, line: str) -> None:
        op = _ACCESS.search(line)[1]
        operands = re.findall(r"%[\w.-]+(?:#\d+)?", line.split(op, 1)[1])
        for place, name in enumerate(operands):
            address = self.value(name) if self._is_address(name) else None
            if address is None or not (address >> _ARGUMENT_SHIFT).any():
                continue
            kind = line.rsplit(" : ", 1)[1]
            pointee = re.search(r"!tt\.ptr<(\w+)", kind) or re.search(r"tensor<(?:\d+x)+(\w+)", kind)
            item = ITEM[pointee[1]] if pointee else 4
            if f"{name}[" in line:  # AMD's buffer operations: pointer and offsets apart
                address = address + self.value(operands[place + 1]) * item
            numbers = np.unique(address >> _ARGUMENT_SHIFT)
            if len(numbers) == 1:
                argument = self.names[int(numbers[0]) - 1]
                turns = [loop for loop in self.loops if loop != 1]
                known = int(np.prod([loop for loop in turns if loop is not None]))
                mask = np.array(True)
                for other in operands[place + 1 :]:
                    mask = mask & self._mask(other)
                address, mask = np.broadcast_arrays(address, mask)
                size, padding = (len(np.unique(address[lanes])) * item * known for lanes in (mask, ~mask))
                copied = "async" in op or "_to_local" in op
                self.accesses.append(_Access(argument, size, padding, turns.count(None), len(turns), copied))
                return
        raise ValueError(f"not traced to a pointer argument: {line}")

    def _is_address(self, name: str) -> bool:
        """Whether a value is a pointer or tensor of pointers, by following what it was made from."""
        while name not in self.arguments:
            op, operands, _ = self.made_by.get(name, ("", [], ""))
            if op not in ("tt.addptr", "tt.expand_dims", *_PASSES_ON):
                return False
            name = operands[0]
        return int(self.values[name]) >> _ARGUMENT_SHIFT > 0

    def _mask(self, name: str) -> np.ndarray:
        """Where a mask lets lanes through, as far as constants tell."""
        op, operands, line = self.made_by.get(name, ("", [], ""))
        if op == "arith.andi":
            return self._mask(operands[0]) & self._mask(operands[1])
        if op in ("tt.splat", "tt.broadcast", "ttg.convert_layout"):
            return self._mask(operands[0])
        if op == "tt.expand_dims":
            inner = self._mask(operands[0])
            return inner if inner.ndim == 0 else np.expand_dims(inner, int(re.search(r"axis = (\d+)", line)[1]))
        if op == "arith.cmpi" and all(map(self._is_constant, operands)):
            compare = {"slt": np.less, "ult": np.less, "sle": np.less_equal, "sge": np.greater_equal, "sgt": np.greater}
            relation = re.search(r"cmpi (\w+),", line)[1]
            if relation in compare:
                return compare[relation](self.value(operands[0]), self.value(operands[1]))
        return np.array(True)

    def _is_constant(self, name: str) -> bool:
        op, operands, _ = self.made_by.get(name, ("", [], ""))
        if op in ("arith.constant", "tt.make_range"):
            return True
        return op in ("tt.expand_dims", *_PASSES_ON, *_BINARY) and all(map(self._is_constant, operands))

    def value(self, name: str) -> np.ndarray:
        """Of an integer or pointer, for program 0 in the first turn of its loops; made up where only a GPU knows."""
        if name not in self.values:
            self.values[name] = np.array(1)  # a value that depends on itself
            self.values[name] = self._compute(*self.made_by.get(name, ("", [], "")))
        return self.values[name]

    def _compute(self, op: str, operands: list[str], line: str) -> np.ndarray:
        if op in _PASSES_ON:
            return self.value(operands[0])
        if op in _BINARY:
            return _BINARY[op](self.value(operands[0]), self.value(operands[1]))
        if op == "arith.constant":
            number = re.search(r"arith\.constant (?:dense<)?(-?\d+)>?(?: :|$)", line)
            return np.array(int(number[1]) if number else int("true" in line))
        if op == "tt.make_range":
            start, end = (int(re.search(rf"{word} = (\d+)", line)[1]) for word in ("start", "end"))
            return np.arange(start, end)
        if op == "tt.expand_dims":
            inner = self.value(operands[0])
            return inner if inner.ndim == 0 else np.expand_dims(inner, int(re.search(r"axis = (\d+)", line)[1]))
        if op == "tt.addptr":
            item = ITEM[re.search(r"!tt\.ptr<(\w+)", line)[1]]
            return self.value(operands[0]) + self.value(operands[1]) * item
        if op == "arith.select":
            return self.value(operands[1])
        if op == "tt.get_program_id":
            return np.array(0)
        if op == "tt.load" and operands:  # another entry at every other address
            address = self.value(operands[0])
            return np.unique(address, return_inverse=True)[1].reshape(address.shape) + 1
        shape = re.findall(r"tensor<((?:\d+x)+)i\d+", line)
        if not shape:
            return np.array(1)
        sizes = [int(size) for size in shape[-1].rstrip("x").split("x")]
        return np.arange(int(np.prod(sizes))).reshape(sizes)

    def summary(self) -> dict[str, Bytes]:
        found: dict[str, Bytes] = {}
        for access in self.accesses:
            loops = [a.depth for a in self.accesses if a.argument == access.argument and a.copied]
            if access.copied and access.depth < max(loops):
                continue  # the pipeliner's first copies, of turns that are counted
            old = found.get(access.argument, Bytes())
            place = "each" if access.unknown_loops else "once"
            found[access.argument] = old._replace(
                **{place: getattr(old, place) + access.bytes}, padding=old.padding + access.padding
            )
        return found
