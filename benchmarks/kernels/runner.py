"""Runs cases: gates first, then all times in turn. A row of the result is one way to compute one case."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels.registry import DTYPES, Case, Operation, Setup, Variant
from benchmarks.kernels.roofline import floor_seconds
from benchmarks.kernels.timing import cpu_run, graph_run, ratio, summary, take_turns, waiting_run

Row = dict[str, Any]
ROTATED_BYTES = {"cuda": 12 << 30, "cpu": 256 << 20}  # of all buffers of a case together
MOST_BUFFERS = {"cuda": 48, "cpu": 4}
OK, WRONG, FAILED = "ok", "WRONG", "failed"


@dataclass(frozen=True)
class Effort:
    """rounds: runs of each variant. seconds: of timing per case, after which rounds stop early."""

    rounds: int = 50
    seconds: float = 4.0


class Deadline:
    """Says when no more cases should start: when one as slow as the slowest so far would not end in time."""

    def __init__(self, minutes: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock, self.slowest = clock, 0.0
        self.end = None if minutes is None else clock() + 60 * minutes

    def passed(self) -> bool:
        return self.end is not None and self.clock() + self.slowest > self.end

    def took(self, seconds: float) -> None:
        self.slowest = max(self.slowest, seconds)


def run_case(operation: Operation, case: Case, setup: Setup, effort: Effort, device_name: str) -> list[Row]:
    """One row per variant: its error, and its time if that is within the tolerance. Ours first.

    A baseline that raises is left out of the case, with its reason; a variant of ours that raises is a row that failed.
    """
    layers = [operation.build(case, setup.device, 0)]
    size = storage_bytes(layers[0])
    buffers = min(MOST_BUFFERS[setup.device], case.layers, max(1, ROTATED_BYTES[setup.device] // max(1, size)))
    layers += [operation.build(case, setup.device, seed) for seed in range(1, buffers)]
    by_layer = [{v.name: v for v in operation.variants(case, layer, setup)} for layer in layers]
    rows: dict[str, Row] = {}
    for name, variant in sorted(by_layer[0].items(), key=lambda item: item[1].baseline):
        row = attempt(variant, case, setup, lambda v=variant: gated(v, case, device_name))
        if row is not None:
            rows[name] = row
    runs: dict[str, Callable[[], float]] = {}
    for name in [name for name, row in rows.items() if row["status"] == OK]:
        calls = [variants[name].call for variants in by_layer if name in variants]
        run = attempt(by_layer[0][name], case, setup, lambda v=by_layer[0][name], c=calls: timed(v, c, setup))
        if callable(run):
            runs[name] = run
        else:
            rows.pop(name)
            if run is not None:
                rows[name] = run
    times = take_turns(runs, effort.rounds, effort.seconds)
    for name, seconds in times.items():
        add_times(rows[name], seconds)
        if not rows[name]["baseline"]:
            others = {other: s for other, s in times.items() if rows[other]["baseline"]}
            rows[name] |= {f"times faster than {other}": ratio(s, seconds) for other, s in others.items()}
    return list(rows.values())


def timed(variant: Variant, calls: list[Callable[[], Any]], setup: Setup) -> Callable[[], float]:
    """The calls made ready for timing; on a GPU this compiles, and captures a graph."""
    if not setup.gpu:
        return cpu_run(calls)
    return graph_run(calls) if variant.in_graph else waiting_run(calls)


def attempt(variant: Variant, case: Case, setup: Setup, action: Callable[[], Any]) -> Any:
    """The action's result; if it raises, None for a baseline, which is left out, and a failed row for one of ours."""
    try:
        return action()
    except Exception as error:  # whatever others' kernels and this machine's compiler may raise
        first_line = (str(error) or "no message").splitlines()[0]
        reason = f"{type(error).__name__}: {first_line}"[:200]
        if variant.baseline:
            setup.left_out(variant.name, reason, case.name)
            return None
        setup.announce(f"{variant.name} failed: {reason}")
        return identity(variant, case) | {"note": reason, "status": FAILED}


def identity(variant: Variant, case: Case) -> Row:
    """The columns that say whose figure it is."""
    return {
        "op": case.op,
        "models": " ".join(case.models),
        "case": case.name,
        "series": case.series,
        "dtype": case.dtype,
        **case.sizes,
        "variant": variant.name,
        "baseline": variant.baseline,
        "note": variant.note,
    }


def gated(variant: Variant, case: Case, device_name: str) -> Row:
    """Call once on poisoned outputs, and judge. Tensors that the call updates are put back."""
    kept = [tensor.clone() for tensor in variant.updates]
    for tensor in variant.writes:
        tensor.fill_(torch.nan)
    error = variant.gate.error(variant.call())
    for tensor, before in zip(variant.updates, kept, strict=True):
        tensor.copy_(before)
    floor = floor_seconds(variant.work, device_name)
    return identity(variant, case) | {
        "status": OK if error <= variant.gate.tolerance else WRONG,
        "error": error,
        "tolerance": variant.gate.tolerance,
        "bytes": variant.work.bytes,
        "flops": variant.work.flops,
        "floor_us": None if floor is None else floor * 1e6,
    }


def add_times(row: Row, seconds: list[float]) -> None:
    """Times are in a row only here: behind its gate."""
    times = summary(seconds)
    row |= {"us": times.median * 1e6, "us_p10": times.p10 * 1e6, "us_p90": times.p90 * 1e6, "rounds": len(seconds)}
    if row["floor_us"] is not None:
        row["share_of_floor"] = row["floor_us"] / row["us"]


def choose_cases(operation: Operation, models: list, dtypes: list[str], words: list[str], gpu: bool) -> list[Case]:
    """The operation's cases whose name contains one of the words; all without words. ValueError for odd dtypes."""
    for dtype in dtypes:
        if dtype not in DTYPES:
            raise ValueError(f"--dtypes: {dtype!r} is unknown, expected some of {', '.join(DTYPES)}")
    cases = [case for dtype in dtypes for case in operation.cases(models, dtype, gpu)]
    return [case for case in cases if not words or any(word in case.name for word in words)]


def storage_bytes(layer: Any) -> int:
    """Bytes of all tensors in nested tuples, lists and dicts; views of one storage count once."""
    seen: dict[int, int] = {}

    def visit(value: Any) -> None:
        if isinstance(value, Tensor):
            storage = value.untyped_storage()
            seen[storage._cdata] = storage.nbytes()
        elif isinstance(value, dict):
            visit(list(value.values()))
        elif isinstance(value, (list, tuple)):
            for one in value:
                visit(one)

    visit(layer)
    return sum(seen.values())


def broken(setup: Setup) -> str:
    """Why the GPU takes no more work, after an error of a kernel; nothing if it does."""
    if not setup.gpu:
        return ""
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    torch.cuda.empty_cache()
    return ""
