"""What is timed: operations, their cases, and the ways to compute each case (ours and the baselines).

To add an operation:

1. Write ``benchmarks/kernels/<name>.py`` with ``OPERATION = Operation(name, cases, build, variants)``:

   * ``cases(models, dtype, gpu)``: what to run, the most important first; on a CPU smaller ones. No tensors yet.
     ``shapes.by_attention(models)`` groups models whose attention has the same shape, so that it runs once for all.
   * ``build(case, device, seed)``: one layer's tensors, in any tuple, list or dict. Called once per buffer that the
     timing rotates through, and in the tests with ``device="meta"``: use ``shapes.Random``, read no values.
   * ``variants(case, layer, setup)``: the calls over these tensors. Cheap: what only the gate needs is computed when
     ``gate.error`` is called. ``setup.load`` and ``setup.left_out`` say what cannot be had, once.

2. Add the name to ``NAMES``.

3. In ``tests/benchmarks/test_kernels.py``: words of a few cases into ``SOME``, a call that is a little off into
   ``test_what_is_wrong_gets_no_time``, a floor computed by hand. The other tests there find it through ``NAMES``.

A variant gets a time only if its gate is green: ``writes`` is filled with NaN, the call runs once, and ``gate.error``
of what it returned must not exceed ``gate.tolerance``. Baselines have gates too, against fp64 of their own problem.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels.roofline import Work
from benchmarks.kernels.shapes import Model

NAMES = ("delta_rule", "attention_inputs", "memory_attention", "memory_selection", "reposition", "block_codec")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Case:
    """One problem. models: whose shape it is. sizes: the numbers that say the shape, they become columns.

    dtype: a key of ``DTYPES``. layers: how often a model does this in a step; a graph holds at most that many calls.
    series: the figure that it is a point of, if any: decode_batch, pool_batch or scan_length.
    """

    op: str
    models: tuple[str, ...]
    name: str
    dtype: str
    sizes: Mapping[str, int]
    layers: int
    series: str = ""

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]


@dataclass(frozen=True)
class Gate:
    """When a result is right. error: of what the call returned (and wrote), against fp64."""

    error: Callable[[Any], float]
    tolerance: float


@dataclass(frozen=True)
class Variant:
    """One way to compute a case on one layer's tensors.

    writes: tensors that the call writes and does not read. updates: tensors that it reads and writes; the runner puts
    them back after the gate. work: what it must move and multiply. note: how its problem differs from the case's.
    in_graph: False for a call in which the host waits for the device, which no CUDA graph can hold.
    """

    name: str
    call: Callable[[], Any]
    gate: Gate
    work: Work
    writes: tuple[Tensor, ...] = ()
    updates: tuple[Tensor, ...] = ()
    baseline: bool = False
    note: str = ""
    in_graph: bool = True


@dataclass
class Setup:
    """Where and with what a run measures. official: a checkout of declare-lab/delta-Mem, None = without it.

    missing: baseline -> why it is not there; ``announce`` is told each reason once.
    """

    device: str
    official: Path | None = None
    announce: Callable[[str], None] = print
    missing: dict[str, str] = field(default_factory=dict)
    told: set[tuple[str, str]] = field(default_factory=set)

    @property
    def gpu(self) -> bool:
        return self.device == "cuda"

    def left_out(self, name: str, reason: str, case: str = "") -> None:
        """case: the only one that it is left out of."""
        where = f" of {case}" if case else ""
        self.missing.setdefault(name + where, reason)
        if (name, reason) not in self.told:
            self.told.add((name, reason))
            self.announce(f"{name} is left out{where}: {reason}")

    def load(self, name: str, make: Callable[[], Any]) -> Any:
        """What ``make`` returns; None, now and whenever asked again, if it raises: others' code that is not here."""
        if name in self.missing:
            return None
        try:
            return make()
        except Exception as error:  # not installed, or not for this machine
            self.left_out(name, f"{type(error).__name__}: {error}".splitlines()[0][:200])
            return None


@dataclass(frozen=True)
class Operation:
    """An op of ``mem_triton/ops`` and how it is measured; the module's docstring says what each function does."""

    name: str
    cases: Callable[[list[Model], str, bool], list[Case]]
    build: Callable[[Case, str, int], Any]
    variants: Callable[[Case, Any, Setup], list[Variant]]


def load(name: str) -> Operation:
    """The operation of this name. ValueError names those that are known."""
    if name not in NAMES:
        raise ValueError(f"--ops: {name!r} is unknown, expected some of {', '.join(NAMES)}")
    return importlib.import_module(f"benchmarks.kernels.{name}").OPERATION


def relative_rms(*pairs: tuple[Tensor, Tensor]) -> float:
    """The largest relative RMS error of (result, wanted) pairs, in fp64; NaN if a result is."""
    errors = []
    for got, want in pairs:
        want = want.double()
        off = (got.to(want.device).double() - want).square().mean().sqrt()
        errors.append(float(off / want.square().mean().sqrt().clamp_min(1e-30)))
    return float("nan") if any(e != e for e in errors) else max(errors)
