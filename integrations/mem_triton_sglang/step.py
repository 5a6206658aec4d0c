"""Describes a step's batch as kernels read it: where each row's context lies, and which tokens are its own."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from sglang.srt.model_executor.forward_context import get_attn_backend
from torch import Tensor

from mem_triton.ops.memory_attention.planned import Plans


@dataclass
class Step:
    """Rows of the packed batch. block_table: int32 [rows, pages]; query_start_loc: int32 [rows + 1]; seq_lens: int32
    [rows], each row's length after this step; max_query_len: on the host. captured: part of a CUDA graph. plans:
    see ``PlannedLayer``."""

    block_table: Tensor
    query_start_loc: Tensor
    seq_lens: Tensor
    max_query_len: int
    captured: bool = False
    plans: Plans = field(default_factory=dict)


def current_step() -> Step | None:
    """Find the step that runs, or is captured, now: None while the attention backend is not ours."""
    return getattr(get_attn_backend(), "mem_step", None)


class StepBuilder:
    """Makes steps of SGLang's batches. req_to_token: int32 [requests, tokens], KV slots; page_size: slots of a page."""

    def __init__(self, req_to_token: Tensor, page_size: int) -> None:
        self.req_to_token, self.page_size = req_to_token, page_size
        self.max_pages = -(-req_to_token.shape[1] // page_size)
        self._static: Step | None = None

    def eager(self, batch: Any) -> Step:
        """batch: SGLang's ``ForwardBatch`` in extend, decode or idle mode."""
        lens = batch.seq_lens.to(torch.int32)
        rows = len(lens)
        if batch.forward_mode.is_idle() or rows == 0:
            empty = lens.new_zeros(1)
            return Step(lens.new_zeros(0, 1), empty, lens[:0], 1)
        if batch.forward_mode.is_decode():
            starts, longest = torch.arange(rows + 1, dtype=torch.int32, device=lens.device), 1
        else:
            starts = torch.zeros(rows + 1, dtype=torch.int32, device=lens.device)
            torch.cumsum(batch.extend_seq_lens, 0, out=starts[1:])
            longest = max(map(int, batch.extend_seq_lens_cpu))
        return Step(self._pages(batch.req_pool_indices, self._width(batch)), starts, lens, longest)

    def allocate(self, rows: int) -> None:
        """Buffers for captured decode steps of at most ``rows`` requests."""
        device = self.req_to_token.device
        self._static = Step(
            torch.zeros(rows, self.max_pages, dtype=torch.int32, device=device),
            torch.arange(rows + 1, dtype=torch.int32, device=device),
            torch.ones(rows, dtype=torch.int32, device=device),
            1,
        )

    def captured(self, batch: Any) -> Step:
        """The step of a captured decode: the same tensors each time, refilled in place. batch: what a capture or a
        replay shows, padded rows included; they lie in SGLang's padding slot."""
        rows, width, static = batch.batch_size, self._width(batch), self._static
        static.block_table[:rows, :width].copy_(self._pages(batch.req_pool_indices[:rows], width))
        static.seq_lens[:rows].copy_(batch.seq_lens[:rows])
        return Step(static.block_table[:rows], static.query_start_loc[: rows + 1], static.seq_lens[:rows], 1, True)

    def _width(self, batch: Any) -> int:
        """Pages of the longest row, by the lengths that the host has."""
        if batch.seq_lens_cpu is None:
            return self.max_pages
        return max(1, -(-int(batch.seq_lens_cpu.max()) // self.page_size))

    def _pages(self, requests: Tensor, width: int) -> Tensor:
        slots = self.req_to_token[:, : width * self.page_size : self.page_size][requests]  # a page's first slot
        return slots if self.page_size == 1 else slots // self.page_size
