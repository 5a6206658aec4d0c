"""Adds memory's identity to vLLM's block hashes: KV after the first layer depends on the memory that its tokens saw.

Why a patch: references may change every 64 tokens, so two requests share the blocks before their references part.
vLLM's ``cache_salt`` covers whole requests (sessions use it), and its extra keys per block come from a function that no
plugin can extend. Upstream would need a per-block field at the request; remove this file then.
What is patched: one function, in the engine-core process; it changes nothing for requests without memory.
"""

from __future__ import annotations

import functools
from contextlib import ExitStack
from typing import Any

from vllm.logger import init_logger
from vllm.v1.core import kv_cache_utils

from mem_triton.systems.payload import decode, keys_between
from mem_triton.systems.request import carried_by

logger = init_logger("vllm.mem_triton")

_MARK = "_mem_triton"


def install(undo: ExitStack) -> None:
    """Wrap vLLM's function; calling it again is harmless. ``undo`` puts it back."""
    stock = kv_cache_utils.generate_block_hash_extra_keys
    if not hasattr(stock, _MARK):
        undo.callback(setattr, kv_cache_utils, "generate_block_hash_extra_keys", stock)
        kv_cache_utils.generate_block_hash_extra_keys = _with_memory(stock)


def _with_memory(stock: Any) -> Any:
    @functools.wraps(stock)
    def generate_block_hash_extra_keys(
        request: Any, start_token_idx: int, end_token_idx: int, start_mm_idx: int
    ) -> Any:
        keys, next_mm_idx = stock(request, start_token_idx, end_token_idx, start_mm_idx)
        try:
            carried = carried_by(request.sampling_params)
            own = memory_keys(carried, start_token_idx, end_token_idx) if carried is not None else ()
        except Exception as error:  # the scheduler goes on: nobody else finds these blocks
            logger.error("mem_triton: blocks of %s are not shared: %s", request.request_id, error)
            own = (("mem_triton", request.request_id),)
        return (((keys or ()) + own) if own else keys), next_mm_idx

    setattr(generate_block_hash_extra_keys, _MARK, True)
    return generate_block_hash_extra_keys


def memory_keys(carried: bytes, start: int, end: int) -> tuple[tuple[str, Any], ...]:
    """What the tokens at positions start..end-1 saw, by memory system. carried: the request's encoded payload."""
    return tuple(("mem_triton", keys) for keys in keys_between(decode(carried), start, end))
