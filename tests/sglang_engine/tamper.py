"""Negative controls: each switches one safety mechanism off, in every process of an engine."""

from __future__ import annotations

from typing import Any


def cells_forget_prefixes() -> None:
    """States of earlier requests vanish from their pages when a request arrives that finds its prefix cached."""
    from mem_triton_sglang import worker

    stock = worker.WorkerMemory.before_step

    def before_step(self: Any, batch: Any) -> None:
        if batch.forward_mode.is_extend() and any(batch.prefix_lens) and all(len(r.output_ids) == 0 for r in batch.reqs):
            fresh = [r for r, start in zip(batch.reqs, batch.prefix_lens, strict=True) if start and not r.is_chunked]
            if fresh:
                self.delta.cells.zero_()
        stock(self, batch)

    worker.WorkerMemory.before_step = before_step


def correction_on_every_rank() -> None:
    from mem_triton_sglang import attach

    stock = attach._hook
    attach._hook = lambda module, memory, adds_output: stock(module, memory, True)


def correction_on_no_rank() -> None:
    from mem_triton_sglang import attach

    stock = attach._hook
    attach._hook = lambda module, memory, adds_output: stock(module, memory, False)
