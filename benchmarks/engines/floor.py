"""The least time that a decode step can take on this machine: bytes over bandwidth, or arithmetic over its peak."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from benchmarks.engines.memories import kv_bytes_per_token

if TYPE_CHECKING:
    from benchmarks.engines.commands import Cell
    from benchmarks.engines.made_up import Made


@dataclass(frozen=True)
class Machine:
    """Measured here: bytes_per_s of reading, flops of a large matmul in the model's precision, with ``threads``."""

    bytes_per_s: float
    flops: float
    threads: int


def measure_machine(dtype: torch.dtype, threads: int) -> Machine:
    """Best of a few runs; a second on a CPU. threads: of the engines, so that the floor is theirs."""
    cuda = torch.cuda.is_available()
    device, size, side = ("cuda", 2**31, 8192) if cuda else ("cpu", 2**28, 1536)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        wide = torch.ones(4096, size // 4096 // dtype.itemsize, dtype=dtype, device=device)  # larger than any cache
        vector = torch.ones(wide.shape[1], dtype=dtype, device=device)
        reading = wide.numel() * wide.element_size() / _best(lambda: wide @ vector)
        copying = 2 * wide.numel() * wide.element_size() / _best(lambda: wide.clone())
        square = torch.ones(side, side, dtype=dtype, device=device)
        flops = 2 * side**3 / _best(lambda: square @ square)
    finally:
        torch.set_num_threads(before)
    return Machine(max(reading, copying), flops, threads)


def _best(work: Callable[[], object], runs: int = 7) -> float:
    times = []
    for _ in range(runs):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        begin = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return min(times)


def decode_floor_ms(made: Made, cell: Cell, machine: Machine) -> float:
    """Of one step of the stock model: all weights but the table of words once, and every request's keys and values."""
    c, model = made.model.config, made.model
    weights = sum(p.numel() for p in model.parameters())
    if not c.tie_word_embeddings:
        weights -= model.get_input_embeddings().weight.numel()
    seen = cell.context + cell.output / 2
    size = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    moved = weights * made.dtype.itemsize + cell.batch * seen * kv_bytes_per_token(made)
    attention = 4 * cell.batch * seen * c.num_hidden_layers * c.num_attention_heads * size
    work = 2 * weights * cell.batch + attention
    return 1000 * max(moved / machine.bytes_per_s, work / machine.flops)
