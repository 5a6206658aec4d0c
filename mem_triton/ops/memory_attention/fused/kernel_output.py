"""Device functions that end an attention program: what splits leave, the last one's merge, and the stores."""

import triton
import triton.language as tl

from mem_triton.ops.memory_attention.fused.kernel_parts import LOG2E


@triton.jit
def store_partial(
    partial, cell, real, top, total, acc0, acc1, BLOCK_M: tl.constexpr, WIDTH: tl.constexpr, REST: tl.constexpr
):
    """Leave one split's running softmax in ``partial``, fp32 [cells, BLOCK_M, WIDTH + REST + 4]: its ``real`` rows.

    A row holds the sums, top, total and two floats of nothing, so that every row begins where 16 bytes do.
    """
    FLOATS: tl.constexpr = WIDTH + REST + 4
    row = partial + tl.cast(cell, tl.int64) * (BLOCK_M * FLOATS) + tl.arange(0, BLOCK_M) * FLOATS
    tl.store(row[:, None] + tl.arange(0, WIDTH)[None, :], acc0, mask=real[:, None])
    if REST:
        tl.store(row[:, None] + (WIDTH + tl.arange(0, REST))[None, :], acc1, mask=real[:, None])
    tl.store(row + WIDTH + REST, top, mask=real)
    tl.store(row + WIDTH + REST + 1, total, mask=real)


@triton.jit
def merge_splits(
    partial, cell, splits, real, BLOCK_M: tl.constexpr, WIDTH: tl.constexpr, REST: tl.constexpr, STAGES: tl.constexpr
):
    """The softmax over all ``splits`` from ``cell`` on, always in the same order: top, total, acc0, acc1.

    Rows that are not ``real`` move nothing. STAGES - 1 splits are on their way while one is added: the loop is all
    latency.
    """
    FLOATS: tl.constexpr = WIDTH + REST + 4
    m = tl.arange(0, BLOCK_M)
    top, total = tl.full([BLOCK_M], float("-inf"), tl.float32), tl.zeros([BLOCK_M], tl.float32)
    acc0 = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    acc1 = tl.zeros([BLOCK_M, REST if REST else 1], tl.float32)
    mask = real[:, None]
    for split in tl.range(0, splits, num_stages=STAGES):
        row = partial + tl.cast(cell + split, tl.int64) * (BLOCK_M * FLOATS) + m * FLOATS
        # .cg: past the L1 cache, which does not see what other programs stored
        other_top = tl.load(row + WIDTH + REST, mask=real, other=float("-inf"), cache_modifier=".cg")
        other_total = tl.load(row + WIDTH + REST + 1, mask=real, other=0.0, cache_modifier=".cg")
        highest = tl.maximum(top, other_top)
        base = tl.where(highest == float("-inf"), 0.0, highest)
        shrink, share = tl.exp2(top - base), tl.exp2(other_top - base)
        total = total * shrink + other_total * share
        other = tl.load(row[:, None] + tl.arange(0, WIDTH)[None, :], mask=mask, other=0.0, cache_modifier=".cg")
        acc0 = acc0 * shrink[:, None] + other * share[:, None]
        if REST:
            channel = WIDTH + tl.arange(0, REST)
            other = tl.load(row[:, None] + channel[None, :], mask=mask, other=0.0, cache_modifier=".cg")
            acc1 = acc1 * shrink[:, None] + other * share[:, None]
        top = highest
    return top, total, acc0, acc1


@triton.jit
def store_outputs(
    out,
    lse,
    sinks,
    top,
    total,
    acc0,
    acc1,
    out_row,
    lse_row,
    query_head,
    real,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    REST: tl.constexpr,
):
    """Divide by the sum, which the sinks join, and store output and LSE of the rows that are ``real``."""
    if sinks is not None:
        sink = tl.load(sinks + query_head, mask=real, other=0.0) * LOG2E
        highest = tl.maximum(top, sink)
        shrink = tl.exp2(top - highest)
        total = total * shrink + tl.exp2(sink - highest)
        top = highest
    else:
        shrink = tl.full(top.shape, 1.0, tl.float32)
    share = (shrink / tl.where(total > 0, total, 1.0))[:, None]
    channel = tl.arange(0, WIDTH)
    mask = real[:, None]
    if WIDTH > SIZE:
        mask = mask & (channel < SIZE)[None, :]
    tl.store(out + out_row[:, None] + channel[None, :], (acc0 * share).to(out.dtype.element_ty), mask=mask)
    if REST:
        channel = WIDTH + tl.arange(0, REST)
        mask = real[:, None]
        if WIDTH + REST > SIZE:
            mask = mask & (channel < SIZE)[None, :]
        tl.store(out + out_row[:, None] + channel[None, :], (acc1 * share).to(out.dtype.element_ty), mask=mask)
    if lse is not None:
        tl.store(lse + lse_row, (top + tl.log2(total)) / LOG2E, mask=real)
