"""Triton's CPU interpreter, repaired, and watched for the memory errors that it lets pass.

Set TRITON_INTERPRET=1 before triton is imported (``tests/ops/test_in_interpreter.py`` starts such a process), then::

    install()                                        # numeric repairs, once per process
    with sanitize(order="reverse") as findings:
        kernel[grid](...)
    assert not findings, findings                    # one line per kind of error and source line

``install`` repairs what triton 3.6 to 3.9 get wrong on the CPU: bf16 arithmetic, dots and reductions run on the raw
16-bit integers, float conversions truncate where a GPU rounds to nearest even, 3.6 refuses a loop bound that was
loaded from memory, 3.9 a mask that combines a block with a scalar.

``sanitize`` reports, per launch:

    oob     an active lane reads or writes outside every tensor that the launch was given
    race    two programs touch the same element, at least one of them writing, not both atomically; but a program that
            acquires what another released (atomics of the same address) may touch what that one touched before
    dup     one store writes different values to one address
    poison  (no finding) lanes masked off without ``other=`` read NaN or a huge integer instead of 0, so that a kernel
            which uses them shows it in its output

and runs the programs in the order asked for: forward, reverse or shuffle. Bad lanes are dropped, never executed.
"""

from __future__ import annotations

import contextlib
import math
import os
import random
import sys
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import triton.language as tl
import triton.runtime.interpreter as interpreter
from triton.language.semantic import TritonSemantic

_TORCH_DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp64": torch.float64,
    "fp8e4nv": torch.float8_e4m3fn,
    "fp8e5": torch.float8_e5m2,
}
_SATURATING = {"fp8e4nv": 448.0, "fp8e5": 57344.0}  # the GPU's conversion clamps to the largest finite value
_TORCH_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_NUMPY_BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
_installed = False


def _convert(bits: np.ndarray, source: tl.dtype, target: tl.dtype) -> np.ndarray:
    """Raw bits of one float type to raw bits of another, rounding to nearest even."""
    array = np.ascontiguousarray(np.atleast_1d(bits))
    value = torch.from_numpy(array.view(f"i{array.itemsize}")).view(_TORCH_DTYPES[source.name])
    if target.name in _SATURATING and source.name not in _SATURATING:
        value = value.float().clamp(-_SATURATING[target.name], _SATURATING[target.name])  # NaN stays NaN
    value = value.to(_TORCH_DTYPES[target.name])
    size = value.element_size()
    return value.view(_TORCH_BITS[size]).numpy().view(_NUMPY_BITS[size]).reshape(np.shape(bits))


def _is_bf16(handle: Any) -> bool:
    return isinstance(handle, interpreter.TensorHandle) and getattr(handle.dtype, "scalar", handle.dtype) == tl.bfloat16


def _widen(handle: Any) -> Any:
    if not _is_bf16(handle):
        return handle
    return interpreter.TensorHandle(_convert(handle.data, tl.bfloat16, tl.float32).view(np.float32), tl.float32)


def _narrow(handle: Any) -> Any:
    bits = _convert(np.asarray(handle.data, np.float32), tl.float32, tl.bfloat16)
    return interpreter.TensorHandle(bits, tl.bfloat16)


def install() -> None:
    """Repair the interpreter's numerics for this process."""
    global _installed
    if _installed:
        return
    _installed = True
    _repair_conversions()
    _repair_bf16_arithmetic()
    _repair_bf16_reductions()
    _repair_loop_bounds()
    _repair_masks()
    _repair_constants_in_tuples()
    _patch_language_once_per_launch()


def _repair_conversions() -> None:
    convert = interpreter._convert_float

    def convert_float(bits, source, target, rounding):
        known = source.name in _TORCH_DTYPES and target.name in _TORCH_DTYPES
        if known and getattr(rounding, "name", None) != "RTZ":
            return _convert(bits, source, target)
        return convert(bits, source, target, rounding)

    interpreter._convert_float = convert_float

    builder = interpreter.InterpreterBuilder
    cast = builder.cast_impl

    def cast_impl(self, source, target_type):
        source_type, target = source.dtype.scalar, target_type.scalar
        if source_type == tl.bfloat16 and target.name not in ("bf16", "fp32"):
            return cast(self, _widen(source), target_type)
        if target == tl.bfloat16 and source_type.name not in ("bf16", "fp32"):
            return _narrow(interpreter.TensorHandle(np.asarray(source.data).astype(np.float32), tl.float32))
        return cast(self, source, target_type)

    builder.cast_impl = cast_impl


def _repair_bf16_arithmetic() -> None:
    """Compute in fp32 and round back; comparisons and dots keep their own result type."""
    builder = interpreter.InterpreterBuilder

    def lift(name: str) -> None:
        original = getattr(builder, name)

        def lifted(self, *operands):
            if not any(_is_bf16(x) for x in operands):
                return original(self, *operands)
            result = original(self, *(_widen(x) for x in operands))
            return _narrow(result) if result.data.dtype == np.float32 else result

        setattr(builder, name, lifted)

    names = ("binary_op", "ternary_op", "unary_op", "create_fabs", "create_clampf", "create_fma", "create_fneg")
    for name in names:
        if hasattr(builder, name):
            lift(name)

    dot = builder.create_dot
    builder.create_dot = lambda self, a, b, acc, *rest: dot(self, _widen(a), _widen(b), acc, *rest)


def _repair_bf16_reductions() -> None:
    def tensor_of(handle, like, dtype):
        return tl.core.tensor(handle, tl.block_type(dtype, list(like.shape)) if like.shape else dtype)

    def widen(x):
        return tensor_of(_widen(x.handle), x, tl.float32) if _is_bf16(getattr(x, "handle", None)) else x

    def narrow(x):
        return tensor_of(_narrow(x.handle), x, tl.bfloat16) if x.handle.dtype == tl.float32 else x

    for operation in (interpreter.ReduceOps, interpreter.ScanOps):
        original = operation.apply

        def apply(self, values, _original=original):
            many = isinstance(values, tuple)
            items = values if many else (values,)
            if not any(_is_bf16(getattr(x, "handle", None)) for x in items):
                return _original(self, values)
            result = _original(self, tuple(map(widen, items)) if many else widen(values))
            return tuple(map(narrow, result)) if isinstance(result, tuple) else narrow(result)

        operation.apply = apply


def _repair_loop_bounds() -> None:
    patch = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(np.asarray(self.handle.data).reshape(-1)[0]))

    interpreter._patch_lang_tensor = patch_lang_tensor


def _repair_masks() -> None:
    """``block & scalar`` of booleans comes out as int32, which loads and stores then refuse as a mask."""
    builder = interpreter.InterpreterBuilder
    masked_load, masked_store = builder.create_masked_load, builder.create_masked_store

    def boolean(mask):
        return interpreter.TensorHandle(np.asarray(mask.data).astype(bool), tl.int1)

    builder.create_masked_load = lambda self, pointers, mask, *rest: masked_load(self, pointers, boolean(mask), *rest)
    builder.create_masked_store = lambda self, pointers, value, mask, *rest: masked_store(
        self, pointers, value, boolean(mask), *rest
    )


def _repair_constants_in_tuples() -> None:
    """A kernel's own constants come as numbers, those in tuples do not: ``constant + tensor`` is then no tensor."""
    convert = interpreter._implicit_cvt
    interpreter._implicit_cvt = lambda arg: arg.value if isinstance(arg, tl.constexpr) else convert(arg)


def _patch_language_once_per_launch() -> None:
    """The interpreter patches triton.language anew for every call of a device function: a third of the run time."""
    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    done: set[tuple[int, ...]] = set()

    def patch_once(fn):
        modules = tuple(sorted({id(x) for x in fn.__globals__.values() if x is tl or x is tl.core}))
        if modules in done:
            return interpreter._LangPatchScope()
        done.add(modules)
        return patch(fn)

    def launch_afresh(self, *args, **kwargs):
        done.clear()
        return launch(self, *args, **kwargs)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_once, launch_afresh


@dataclass
class _Argument:
    name: str
    low: int  # address of the first byte, and one past the last
    high: int
    element_size: int


def _apart(arguments: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """Arguments by name, those in tuples each on its own: "context.k"."""
    for name, value in arguments:
        if isinstance(value, tuple):
            fields = getattr(value, "_fields", range(len(value)))
            yield from _apart((f"{name}.{field}", x) for field, x in zip(fields, value, strict=True))
        else:
            yield name, value


@dataclass
class _Sanitizer:
    """State of one ``sanitize`` block; the maps of elements are per launch."""

    poison: bool
    order: str
    generator: random.Random
    findings: list[str] = field(default_factory=list)
    reported: set[tuple[str, ...]] = field(default_factory=set)
    kernel: str = "?"
    without_other: bool = False
    permutation: list[int] | None = None

    def begin(self, kernel: str, arguments: list[tuple[str, Any]]) -> None:
        self.kernel, self.permutation = kernel, None
        self.arguments = []
        for name, value in _apart(arguments):
            if isinstance(value, torch.Tensor) and value.numel():
                last = sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
                low, size = value.data_ptr(), value.element_size()
                self.arguments.append(_Argument(name, low, low + (last + 1) * size, size))
        merged: list[list[int]] = []  # byte ranges and element sizes; overlapping views become one, by common parts
        for low, high, size in sorted((a.low, a.high, a.element_size) for a in self.arguments):
            if merged and low < merged[-1][1]:
                first, end, element = merged[-1]
                merged[-1][1:] = max(end, high), math.gcd(element, size, low - first)
            else:
                merged.append([low, high, size])
        self.low, self.high, self.element = np.array(merged, np.uint64).reshape(-1, 3).T.copy()
        self.base = np.concatenate([[0], np.cumsum([(high - low) // size for low, high, size in merged])])
        self.base = self.base.astype(np.int64)
        # per element: the program that wrote it, read it, used it atomically; -1 = none, -2 = several readers
        self.writer, self.reader, self.atomic = (np.full(int(self.base[-1]), -1, np.int32) for _ in range(3))
        # happens-before through atomics: how often a program released, after how many releases an element was written,
        # what was released through an address, and up to which release a program knows each other one
        self.releases: dict[int, int] = {}
        self.written_at = np.zeros(int(self.base[-1]), np.int32)
        self.loads: list[tuple[int, int, np.ndarray]] = []  # of a program, after how many of its releases, what
        self.released: dict[int, dict[int, int]] = {}
        self.known: dict[int, dict[int, int]] = {}
        self.unordered: tuple[Any, np.ndarray, int] = (None, self.writer, 0)  # see _read_by_others

    def access(self, kind: str, pointers, mask, size: int, value=None) -> np.ndarray:
        """Record one load, store or atomic; returns the mask without the lanes that are out of bounds."""
        pointers = np.asarray(pointers)
        mask = np.array(np.broadcast_to(mask, pointers.shape), dtype=bool)
        addresses = pointers[mask].astype(np.uint64)
        if not addresses.size:
            return mask
        region = np.searchsorted(self.low, addresses, "right").astype(np.int64) - 1
        inside = region >= 0
        inside[inside] &= addresses[inside] + np.uint64(size) <= self.high[region[inside]]
        if not inside.all():
            bad = addresses[~inside]
            self._report("oob", f"{kind}, {bad.size} of {addresses.size} lanes, first at {self._name(int(bad[0]))}")
            mask[mask] = inside
            addresses, region = addresses[inside], region[inside]
        if kind == "store" and addresses.size > 1:
            self._check_duplicates(addresses, np.broadcast_to(value, pointers.shape)[mask])
        if addresses.size:
            offsets, element = addresses - self.low[region], self.element[region]
            first = (offsets // element).astype(np.int64) + self.base[region]
            last = ((offsets + np.uint64(size - 1)) // element).astype(np.int64) + self.base[region]
            for part in range(int((last - first).max()) + 1):  # more than one where a pointer was cast
                self._check_race(kind, addresses, np.minimum(first + part, last))
        return mask

    def _check_duplicates(self, addresses: np.ndarray, values: np.ndarray) -> None:
        if (addresses[1:] > addresses[:-1]).all():
            return
        order = np.argsort(addresses, kind="stable")
        same = addresses[order][1:] == addresses[order][:-1]
        bits = values.view(_NUMPY_BITS[values.dtype.itemsize])[order]
        if (same & (bits[1:] != bits[:-1])).any():
            self._report("dup", f"different values for {self._name(int(addresses[order][1:][same][0]))}")

    def _check_race(self, kind: str, addresses: np.ndarray, at: np.ndarray) -> None:
        me = self._program()[1]
        writer, reader, atomic = self.writer[at], self.reader[at], self.atomic[at]
        for other, releases in self.known.get(me, {}).items():
            writer = np.where((writer == other) & (self.written_at[at] < releases), me, writer)  # ordered before

        def conflict(where: np.ndarray, text: str) -> None:
            if where.any():
                self._report("race", f"{text}: {self._name(int(addresses[np.argmax(where)]))}")

        conflict((writer >= 0) & (writer != me), f"{kind} of what another program of this launch stored")
        if kind == "load":
            conflict((atomic >= 0) & (atomic != me), "plain load of what another program updates atomically")
            self.reader[at] = np.where((reader == -1) | (reader == me), me, -2)
            self.loads.append((me, self.releases.get(me, 0), at))
            return
        others_read = (reader == -2) | ((reader >= 0) & (reader != me))
        known = self.known.get(me, {})
        if known and others_read.any():  # who read before what they released, which this program acquired, is through
            others_read &= self._read_by_others(me, known)[at]
        conflict(others_read, f"{kind} to what another program of this launch read")
        if kind == "store":
            conflict((atomic >= 0) & (atomic != me), "plain store over another program's atomic")
            self.writer[at], self.written_at[at] = me, self.releases.get(me, 0)
        else:
            self.atomic[at] = me

    def _read_by_others(self, me: int, known: dict[int, int]) -> np.ndarray:
        """Whether another program read an element, and released nothing since that this one acquired."""
        key, read, seen = self.unordered
        if key != (me, known):
            key, read, seen = (me, dict(known)), np.zeros(len(self.writer), bool), 0
        for other, count, at in self.loads[seen:]:
            if other != me and count >= known.get(other, 0):
                read[at] = True
        self.unordered = key, read, len(self.loads)
        return read

    def synchronise(self, pointers, mask, semantics: str) -> None:
        """Order this program behind those that released through the same addresses, and later ones behind it."""
        me = self._program()[1]
        known = self.known.setdefault(me, {})
        releasing = "RELEASE" in semantics
        self.releases[me] = self.releases.get(me, 0) + releasing
        for address in np.unique(np.asarray(pointers)[np.broadcast_to(mask, np.shape(pointers))]).tolist():
            released = self.released.setdefault(address, {})
            if "ACQUIRE" in semantics:
                known.update({p: max(n, known.get(p, 0)) for p, n in released.items() if p != me})
            if releasing:
                released.update({p: max(n, released.get(p, 0)) for p, n in {**known, me: self.releases[me]}.items()})

    def _program(self) -> tuple[tuple[int, ...], int]:
        builder = interpreter.interpreter_builder
        index = tuple(int(x) for x in builder.grid_idx)
        return index, int(np.ravel_multi_index(index, builder.grid_dim))

    def _name(self, address: int) -> str:
        def distance(a: _Argument) -> int:
            return 0 if a.low <= address < a.high else min(abs(address - a.low), abs(address - a.high + 1))

        nearest = min(self.arguments, key=distance)
        element = (address - nearest.low) // nearest.element_size
        return f"{nearest.name}[{element}] of {(nearest.high - nearest.low) // nearest.element_size}"

    def _report(self, kind: str, message: str) -> None:
        place = "?"
        for frame, line in traceback.walk_stack(sys._getframe(1)):
            path = frame.f_code.co_filename
            if f"{os.sep}triton{os.sep}" not in path and path != __file__:
                place = f"{os.path.basename(path)}:{line}"
                break
        if (kind, self.kernel, place) not in self.reported:
            self.reported.add((kind, self.kernel, place))
            self.findings.append(f"[{kind}] {self.kernel} program {self._program()[0]} at {place}: {message}")

    def poison_value(self, dtype: np.dtype) -> Any:
        if dtype.kind == "f":
            return np.nan
        if dtype == np.uint16:
            return 0x7FC0  # NaN as bf16
        return np.array(0x5CA1AB1E).astype(dtype)

    def next_index(self, index: tuple[int, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
        """Which program to run in place of the ``index``-th one."""
        if self.order == "forward":
            return index
        if self.permutation is None:
            self.permutation = list(range(int(np.prod(shape))))
            self.permutation.reverse() if self.order == "reverse" else self.generator.shuffle(self.permutation)
        flat = int(np.ravel_multi_index(index, shape))
        return tuple(int(x) for x in np.unravel_index(self.permutation[flat], shape))


class _WatchedMemory:
    """Stands in for the interpreter's native module: every memory access passes through the sanitizer."""

    def __init__(self, native: Any, sanitizer: _Sanitizer) -> None:
        self._native, self._sanitizer = native, sanitizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._native, name)

    def load(self, pointers, mask, other, dtype):
        s = self._sanitizer
        allowed = s.access("load", pointers, mask, np.dtype(dtype).itemsize)
        if s.poison and s.without_other:
            other = np.array(np.broadcast_to(other, np.shape(pointers)))
            other = np.where(np.asarray(mask), other, s.poison_value(other.dtype)).astype(other.dtype)
        return self._native.load(pointers, allowed, other, dtype)

    def store(self, pointers, value, mask):
        allowed = self._sanitizer.access("store", pointers, mask, value.dtype.itemsize, value)
        return self._native.store(pointers, value, allowed)

    def atomic_rmw(self, operation, pointers, value, mask, semantics):
        allowed = self._sanitizer.access("atomic", pointers, mask, value.dtype.itemsize)
        self._sanitizer.synchronise(pointers, allowed, getattr(semantics, "name", str(semantics)))
        return self._native.atomic_rmw(operation, pointers, value, allowed, semantics)


@contextlib.contextmanager
def sanitize(order: str = "forward", poison: bool = True, seed: int = 0) -> Iterator[list[str]]:
    """Watch the launches inside the block; yields the list of findings, which fills as they happen."""
    state = _Sanitizer(poison, order, random.Random(seed))
    native, builder, executor = interpreter._interpreter, interpreter.InterpreterBuilder, interpreter.GridExecutor
    launch, load, set_grid_index = executor.__call__, TritonSemantic.load, builder.set_grid_idx

    def watched_launch(self, *args, **kwargs):
        state.begin(getattr(self.fn, "__name__", "?"), [*zip(self.arg_names, args, strict=False), *kwargs.items()])
        interpreter._interpreter = _WatchedMemory(native, state)
        try:
            return launch(self, *args, **kwargs)
        finally:
            interpreter._interpreter = native

    def watched_load(self, pointers, mask, other, *rest):  # below here, a scalar other=0 looks as if there were none
        state.without_other = mask is not None and other is None
        try:
            return load(self, pointers, mask, other, *rest)
        finally:
            state.without_other = False

    def reordered(self, x, y, z):
        return set_grid_index(self, *state.next_index((x, y, z), self.grid_dim))

    executor.__call__, TritonSemantic.load, builder.set_grid_idx = watched_launch, watched_load, reordered
    try:
        yield state.findings
    finally:
        executor.__call__, TritonSemantic.load, builder.set_grid_idx = launch, load, set_grid_index
        interpreter._interpreter = native
