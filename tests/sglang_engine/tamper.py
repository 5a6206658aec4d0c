"""Negative controls: each switches one safety mechanism off, in every process of an engine."""

from __future__ import annotations

from typing import Any


def cells_forget_prefixes() -> None:
    """Every state vanishes when a request arrives that finds its prefix cached."""
    from mem_triton_sglang import worker

    stock, known = worker.SGLangWorkerMemory.before_step, set()

    def before_step(self: Any, batch: Any) -> None:
        starts = batch.prefix_lens if batch.forward_mode.is_extend() else [0] * len(batch.reqs)
        if any(start and r.rid not in known for r, start in zip(batch.reqs, starts, strict=True)):
            self.states.cells.zero_()
        known.update(r.rid for r in batch.reqs)
        stock(self, batch)

    worker.SGLangWorkerMemory.before_step = before_step


def correction_on_every_rank() -> None:
    from mem_triton_sglang import attach

    attach._adds_output = lambda module, rank: True


def correction_on_no_rank() -> None:
    from mem_triton_sglang import attach

    attach._adds_output = lambda module, rank: False


def no_memory_in_radix_keys() -> None:
    """The front end says nothing of memory in a request's extra key."""
    from mem_triton_sglang import tokenizer_manager

    tokenizer_manager.extra_key_of = lambda client_key, key=None, payload=None: client_key


def new_tensors_for_replays() -> None:
    """Captured steps get tensors of their own each time."""
    import torch

    from mem_triton_sglang.step import Step, StepBuilder

    def captured(self: Any, batch: Any) -> Step:
        rows = batch.batch_size
        starts = torch.arange(rows + 1, dtype=torch.int32)
        pages = self._pages(batch.req_pool_indices[:rows], self._width(batch)).clone()
        return Step(pages, starts, batch.seq_lens[:rows].to(torch.int32, copy=True), 1, captured=True)

    StepBuilder.captured = captured


def no_pinned_memory() -> None:
    """Not a control: SGLang's LoRA pins host memory, which a machine without an accelerator does not have."""
    import torch

    for name in ("tensor", "empty", "zeros", "full"):
        stock = getattr(torch, name)
        setattr(torch, name, lambda *args, _stock=stock, pin_memory=False, **kwargs: _stock(*args, **kwargs))
    torch.Tensor.pin_memory = lambda self, device=None: self


def retract_often() -> None:
    """Not a control: SGLang's own variable for its tests, SGLANG_TEST_RETRACT, which it reads when it is imported."""
    from sglang.srt.managers import scheduler

    scheduler.TEST_RETRACT = True


def no_front_end() -> None:
    """The process that takes requests knows nothing of memory."""
    from mem_triton_sglang import hooks

    del hooks.HOOKS["sglang.srt.managers.tokenizer_manager.TokenizerManager.__init__"]
