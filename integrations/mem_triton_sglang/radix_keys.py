"""Adds memory's identity to SGLang's radix keys: KV after the first layer depends on the memory that its tokens saw.

Why a hook: references may change every 64 tokens, so two requests share the tokens before their references part, while
SGLang's ``extra_key`` parts whole requests. Upstream would need a key per page at the request; remove this file then.
What is hooked: ``RadixKey.__init__``, in the scheduler. A key whose ``extra_key`` says what its tokens see becomes one
whose token ids differ where what they see differs; any other key stays as it is, and so does a slice of a turned one.
"""

from __future__ import annotations

import logging
from array import array
from typing import Any

import numpy as np

from mem_triton_sglang.identity import MARK, parse

logger = logging.getLogger("sglang.mem_triton")


def after_init(result: None, key: Any, *args: Any, **kwargs: Any) -> None:
    """Called after ``RadixKey.__init__`` with the new key."""
    if key.extra_key is not None and key.extra_key.startswith(MARK):
        try:
            namespace, stretches = parse(key.extra_key)
            key.token_ids = seen_tokens(key.token_ids, stretches)
        except Exception as error:  # the scheduler goes on: the whole key stays a namespace that no other request has
            logger.error("mem_triton: KV is shared with requests of the very same memory alone: %s", error)
            return
        key.extra_key = namespace


def seen_tokens(token_ids: array[int], stretches: tuple[tuple[int, int], ...]) -> array[int]:
    """Token ids, each XOR the digest of what the token sees: 63 bits, so they still fit SGLang's signed 64."""
    turned = np.array(token_ids, dtype=np.int64)  # a copy: the request's own tokens stay
    ends = [first for first, _ in stretches[1:]] + [len(turned)]
    for (first, digest), end in zip(stretches, ends, strict=True):
        turned[first:end] ^= digest
    return array("q", turned.tobytes())
