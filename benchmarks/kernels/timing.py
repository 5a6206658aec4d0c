"""Times of calls that find their data in no cache.

On a GPU a run is the replay of a CUDA graph of several calls, each on tensors of its own, after L2 was flushed; the
figure is the run's time divided by its calls. On a CPU it is the plain call, in turn on tensors of its own. All ways to
compute a case take turns, so that a change of clock or load meets all of them alike.
"""

from __future__ import annotations

import functools
import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

Call = Callable[[], Any]
FLUSH_BYTES = 256 << 20  # several times the L2 of any GPU
GRAPH_SECONDS = 2e-3  # as many calls in a graph as take about so long: the start of a graph then counts little
FEWEST_ROUNDS = 3


class Times(NamedTuple):
    """Seconds per call: median, and where 10 and 90 % of the runs lie."""

    median: float
    p10: float
    p90: float


def summary(seconds: list[float]) -> Times:
    low, *_, high = statistics.quantiles(seconds, n=10, method="inclusive")
    return Times(statistics.median(seconds), low, high)


def cpu_run(calls: list[Call]) -> Callable[[], float]:
    """A function that times one call, the next of ``calls`` every time."""
    turn = itertools.cycle(calls)
    calls[0]()

    def run() -> float:
        call = next(turn)
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin

    return run


@functools.cache
def capture_stream() -> torch.cuda.Stream:
    """One for all: our kernels keep a workspace for each stream."""
    return torch.cuda.Stream()


def graph_run(calls: list[Call]) -> Callable[[], float]:
    """A function that replays a graph of the calls and gives the seconds of one. May raise what a capture raises."""
    stream = capture_stream()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles, tunes and allocates workspaces on the stream that is captured
        calls[0]()
        begin.record()
        calls[0]()
        end.record()
        end.synchronize()
        fitting = int(GRAPH_SECONDS / max(begin.elapsed_time(end) * 1e-3, 1e-7))
        calls = calls[: max(1, fitting)]
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()

    def run() -> float:
        torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda").zero_()  # while it runs, the host queues the rest
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e-3 / len(calls)

    return run


def waiting_run(calls: list[Call]) -> Callable[[], float]:
    """For calls in which the host waits for the GPU: the next of ``calls`` every time, by the host's clock."""
    turn = itertools.cycle(calls)
    calls[0]()

    def run() -> float:
        call = next(turn)
        torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda").zero_()
        torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
        torch.cuda.synchronize()
        return time.perf_counter() - begin

    return run


def take_turns(runs: dict[str, Callable[[], float]], rounds: int, seconds: float) -> dict[str, list[float]]:
    """So many rounds of all runs, or what fits into so many seconds, but three rounds at least."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    end = time.perf_counter() + seconds
    for done in range(max(rounds, FEWEST_ROUNDS)):
        if done >= FEWEST_ROUNDS and time.perf_counter() > end:
            break
        for name, run in runs.items():
            found[name].append(run())
    return found


def ratio(baseline: list[float], ours: list[float]) -> float:
    """How many times faster ours is: the median over rounds, in which both ran one after the other."""
    return statistics.median(b / o for b, o in zip(baseline, ours, strict=True))
