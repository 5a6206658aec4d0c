"""Memory that an engine holds: its processes' resident memory, and a GPU's memory in use."""

from __future__ import annotations

from contextlib import suppress

import psutil

from benchmarks.common.record import output
from mem_triton.store.pool.pages import GIB


def resident_gib(pid: int) -> float:
    """Resident memory of a process and of all that it started; pages that several share count in each."""
    total = 0
    with suppress(psutil.NoSuchProcess):
        root = psutil.Process(pid)
        for process in [root, *root.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                total += process.memory_info().rss
    return total / GIB


def gpu_gib() -> float | None:
    """Memory of the first GPU that is in use, by whomever; None without a GPU."""
    lines = output("nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits").splitlines()
    return float(lines[0]) / 1024 if lines else None
