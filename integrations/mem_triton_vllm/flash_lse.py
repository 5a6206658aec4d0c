"""Keeps the log-sum-exp of vLLM's FlashAttention, which computes it in any case and drops it.

Why a patch: ``FlashAttentionImpl.forward`` calls ``flash_attn_varlen_func`` and cannot hand on its second result.
What is patched: that name in the module of the backend, in workers with a bank. While ``collected`` runs, calls ask
for the log-sum-exp, too, which launches nothing more; else they are passed on as they are.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from vllm.v1.attention.backends import flash_attn

_MARK = "_mem_triton_patched"
_collecting: list[list[Tensor]] = []


def gives_log_sums(impl: Any) -> bool:
    """Whether a layer's stock attention is one call of FlashAttention, whose log-sum-exp covers all tokens."""
    stock = next(kind for kind in type(impl).__mro__ if not kind.__module__.startswith("mem_triton_vllm."))
    return stock is flash_attn.FlashAttentionImpl


def install() -> None:
    """Wrap the function; harmless twice."""
    if hasattr(flash_attn.flash_attn_varlen_func, _MARK):
        return
    flash_attn.flash_attn_varlen_func = _keeping(flash_attn.flash_attn_varlen_func)


@contextmanager
def collected() -> Iterator[list[Tensor]]:
    """The log-sum-exps, fp32 [Hq, tokens], of the calls that are made meanwhile, in their order."""
    _collecting.append(found := [])
    try:
        yield found
    finally:
        _collecting.pop()


def _keeping(stock: Any) -> Any:
    @functools.wraps(stock)
    def flash_attn_varlen_func(*args: Any, **kwargs: Any) -> Any:
        if not _collecting or kwargs.get("return_softmax_lse"):
            return stock(*args, **kwargs)
        out, log_sum = stock(*args, **kwargs, return_softmax_lse=True)[:2]
        _collecting[-1].append(log_sum)
        return out

    setattr(flash_attn_varlen_func, _MARK, True)
    return flash_attn_varlen_func
