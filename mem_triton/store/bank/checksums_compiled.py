"""Weighs the words of small parts for ``checksums``, compiled by numba: one call a tensor, where torch takes several.

A part of a few kilobytes costs less to add up than a single call of torch. Larger ones torch adds up faster.
"""

from __future__ import annotations

import numpy as np
from numba import carray, njit

from mem_triton.ops.common.compiled import OPTIONS
from mem_triton.ops.common.pointers import pointer
from mem_triton.store.bank.checksum_constants import BLOCK, MIX

WORDS, ONE, SHIFT = np.uint64(BLOCK), np.uint64(1), np.uint64(29)


@njit("void(int64, int64, uint64, uint64[::1])", **OPTIONS)
def mix_in(address, count, salt, totals):
    """Mix a tensor into the totals of its parts. address: of its ``len(totals)`` parts of ``count`` words of 8 bytes.

    Indices are unsigned, so that the loop over a block becomes vector instructions.
    """
    words = carray(pointer(address), (totals.shape[0], count), np.int64)
    whole = np.uint64(count) // WORDS
    for part in range(np.uint64(totals.shape[0])):
        blocks, weight = np.uint64(0), np.uint64(0)
        for block in range(whole):
            block_sum, first = np.int64(0), np.uint64(block * WORDS)
            for i in range(WORDS):
                block_sum += words[part, first + i]
            weight += MIX
            blocks += np.uint64(block_sum) * (weight | ONE)
        rest, weight = np.uint64(0), np.uint64(0)
        for i in range(whole * WORDS, np.uint64(count)):
            weight += MIX
            rest += np.uint64(words[part, i]) * (weight | ONE)
        before = totals[part]
        totals[part] = (before ^ (before >> SHIFT)) * MIX + (blocks + rest * MIX) * salt
