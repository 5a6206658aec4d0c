"""Tiles of keys and values for attention compiled by numba: logits, the running softmax, and the weighted sum.

A tile is up to TILE tokens of one KV head. Loops run over neighbouring elements of slices, so that LLVM makes vector
instructions of them. bf16 comes as uint16, or in pairs as uint32.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from mem_triton.ops.common.compiled import OPTIONS
from mem_triton.ops.memory_attention.cpu.numba_floats import LANES, as_float, exp2, high, low, rounded

_ZERO = np.float32(0)


@njit(**OPTIONS)
def as_bf16(numbers, count, out):
    """Rows of ``count`` numbers as bf16 in uint16, and a zero behind an odd count."""
    like = np.uint16(0)
    for m in range(numbers.shape[0]):
        x, y = numbers[m, :count], out[m, :count]
        for n in range(count):
            y[n] = rounded(x[n], like)
        if count % 2 == 1:
            out[m, count] = like


@njit(**OPTIONS)
def logits_of_rows(q, keys, base, stride, count, logits, row):
    """logits[m, n] = q[m] . key n, whose channels lie at base + n * stride. row: fp32 [D], scratch."""
    size = q.shape[1]
    for n in range(count):
        key = keys[base + n * stride : base + n * stride + size]
        for d in range(size):
            row[d] = as_float(key[d])
        for m in range(q.shape[0]):
            query, total = q[m], _ZERO
            for d in range(size):
                total += query[d] * row[d]
            logits[m, n] = total


@njit(**OPTIONS)
def logits_of_columns(q, keys, base, stride, count, logits):
    """The same where channel d of the tokens lies at base + d * stride."""
    size = q.shape[1]
    for m in range(q.shape[0]):
        query, out = q[m], logits[m, :count]
        out[:] = _ZERO
        for d in range(0, size, 4):
            at = base + d * stride
            k0, k1 = keys[at : at + count], keys[at + stride : at + stride + count]
            at += 2 * stride
            k2, k3 = keys[at : at + count], keys[at + stride : at + stride + count]
            q0, q1, q2, q3 = query[d], query[d + 1], query[d + 2], query[d + 3]
            for n in range(count):
                out[n] += (q0 * as_float(k0[n]) + q1 * as_float(k1[n])) + (q2 * as_float(k2[n]) + q3 * as_float(k3[n]))


@njit(**OPTIONS)
def logits_of_pairs(q, keys, base, count, logits):
    """The same for groups of 16 tokens [D / 2, 16 tokens, 2 channels] as uint32 [D / 2, 16]; writes whole groups."""
    half = q.shape[1] // 2
    for group in range((count + LANES - 1) // LANES):
        begin = base + group * half * LANES
        words = keys[begin : begin + half * LANES]
        for m in range(q.shape[0]):
            query, out = q[m], logits[m, group * LANES : group * LANES + LANES]
            out[:] = _ZERO
            for d in range(0, half, 4):
                w0, w1 = words[d * LANES : d * LANES + LANES], words[d * LANES + 16 : d * LANES + 32]
                w2, w3 = words[d * LANES + 32 : d * LANES + 48], words[d * LANES + 48 : d * LANES + 64]
                a = query[2 * d : 2 * d + 8]
                for n in range(LANES):
                    out[n] += ((a[0] * low(w0[n]) + a[1] * high(w0[n])) + (a[2] * low(w1[n]) + a[3] * high(w1[n]))) + (
                        (a[4] * low(w2[n]) + a[5] * high(w2[n])) + (a[6] * low(w3[n]) + a[7] * high(w3[n]))
                    )


@njit(**OPTIONS)
def fold(logits, count, limit, scale, bias, soft_cap, top, total, acc):
    """Make weights of a tile's products, and let the running softmax know. Logits are in base 2 from here on.

    limit[m]: tokens that m sees. scale, bias, soft_cap: as in ``op.memory_attention``.
    """
    log2e = np.float32(1.4426950408889634)
    factor, bias = scale * log2e, bias * log2e
    for m in range(logits.shape[0]):
        seen, x = min(limit[m], count), logits[m, :count]
        highest = np.float32(-np.inf)
        if soft_cap > 0:
            for n in range(seen):
                x[n] = soft_cap * math.tanh(x[n] * scale / soft_cap) * log2e + bias
        else:
            for n in range(seen):
                x[n] = x[n] * factor + bias
        for n in range(seen):
            highest = max(highest, x[n])
        highest = max(highest, top[m])
        if seen > 0 and highest > -np.inf:
            shrink, added = exp2(top[m] - highest), _ZERO
            if top[m] == -np.inf:
                shrink = _ZERO
            for n in range(seen):
                x[n] = exp2(x[n] - highest)
                added += x[n]
            top[m], total[m] = highest, total[m] * shrink + added
            sums = acc[m]
            for d in range(len(sums)):
                sums[d] *= shrink
        else:
            seen = 0
        x[seen:] = _ZERO


@njit(**OPTIONS)
def add_rows(weights, values, base, stride, count, acc):
    """acc[m] += the sum of weights[m, n] * value n, whose channels lie at base + n * stride."""
    size = acc.shape[1]
    for begin in range(0, count, 4):
        if begin + 4 <= count:
            at = base + begin * stride
            v0, v1 = values[at : at + size], values[at + stride : at + stride + size]
            at += 2 * stride
            v2, v3 = values[at : at + size], values[at + stride : at + stride + size]
            for m in range(acc.shape[0]):
                w, out = weights[m, begin : begin + 4], acc[m]
                w0, w1, w2, w3 = w[0], w[1], w[2], w[3]
                for d in range(size):
                    out[d] += (w0 * as_float(v0[d]) + w1 * as_float(v1[d])) + (
                        w2 * as_float(v2[d]) + w3 * as_float(v3[d])
                    )
        else:
            for n in range(begin, count):
                v = values[base + n * stride : base + n * stride + size]
                for m in range(acc.shape[0]):
                    w0, out = weights[m, n], acc[m]
                    for d in range(size):
                        out[d] += w0 * as_float(v[d])


@njit(**OPTIONS)
def add_pairs(weights, values, base, stride, count, acc):
    """The same for groups of 16 channels [tokens / 2, 16 channels, 2 tokens] as uint32, ``stride`` words apart."""
    for group in range(acc.shape[1] // LANES):
        begin = base + group * stride
        words = values[begin : begin + (count + 1) // 2 * LANES]
        for m in range(acc.shape[0]):
            w, out = weights[m], acc[m, group * LANES : group * LANES + LANES]
            for n in range(count // 2):
                pair, w0, w1 = words[n * LANES : n * LANES + LANES], w[2 * n], w[2 * n + 1]
                for d in range(LANES):
                    out[d] += w0 * low(pair[d]) + w1 * high(pair[d])
            if count % 2 == 1:  # its other token may be anything
                pair, w0 = words[count // 2 * LANES : count // 2 * LANES + LANES], w[count - 1]
                for d in range(LANES):
                    out[d] += w0 * low(pair[d])
