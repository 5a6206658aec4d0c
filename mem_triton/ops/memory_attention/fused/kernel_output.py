"""Device functions that end an attention program: what splits leave, the last one's merge, and the stores."""

import triton
import triton.language as tl

from mem_triton.ops.common.kernel_parts import is_last
from mem_triton.ops.memory_attention.fused.kernel_parts import LOG2E, Softmax, nothing_seen


@triton.jit
def store_partial(partial, cell, real, softmax, HEAD, BLOCK_M: tl.constexpr):
    """Leave one split's running softmax in ``partial``, fp32 [cells, BLOCK_M, WIDTH + REST + 4]: its ``real`` rows.

    A row holds the sums, top, total and two floats of nothing, so that every row begins where 16 bytes do.
    """
    CHANNELS: tl.constexpr = HEAD.WIDTH + HEAD.REST
    FLOATS: tl.constexpr = CHANNELS + 4
    row = partial + tl.cast(cell, tl.int64) * (BLOCK_M * FLOATS) + tl.arange(0, BLOCK_M) * FLOATS
    tl.store(row[:, None] + tl.arange(0, HEAD.WIDTH)[None, :], softmax.acc0, mask=real[:, None])
    if HEAD.REST:
        tl.store(row[:, None] + (HEAD.WIDTH + tl.arange(0, HEAD.REST))[None, :], softmax.acc1, mask=real[:, None])
    tl.store(row + CHANNELS, softmax.top, mask=real)
    tl.store(row + CHANNELS + 1, softmax.total, mask=real)


@triton.jit
def merge_splits(partial, cell, splits, real, HEAD, BLOCK_M: tl.constexpr, STAGES: tl.constexpr):
    """The softmax over all ``splits`` from ``cell`` on, always in the same order.

    Rows that are not ``real`` move nothing. STAGES - 1 splits are on their way while one is added: the loop is all
    latency.
    """
    CHANNELS: tl.constexpr = HEAD.WIDTH + HEAD.REST
    FLOATS: tl.constexpr = CHANNELS + 4
    m = tl.arange(0, BLOCK_M)
    softmax = nothing_seen(HEAD, BLOCK_M)
    mask = real[:, None]
    for split in tl.range(0, splits, num_stages=STAGES):
        row = partial + tl.cast(cell + split, tl.int64) * (BLOCK_M * FLOATS) + m * FLOATS
        # .cg: past the L1 cache, which does not see what other programs stored
        other_top = tl.load(row + CHANNELS, mask=real, other=float("-inf"), cache_modifier=".cg")
        other_total = tl.load(row + CHANNELS + 1, mask=real, other=0.0, cache_modifier=".cg")
        highest = tl.maximum(softmax.top, other_top)
        base = tl.where(highest == float("-inf"), 0.0, highest)
        shrink, share = tl.exp2(softmax.top - base), tl.exp2(other_top - base)
        total = softmax.total * shrink + other_total * share
        other = tl.load(row[:, None] + tl.arange(0, HEAD.WIDTH)[None, :], mask=mask, other=0.0, cache_modifier=".cg")
        acc0, acc1 = softmax.acc0 * shrink[:, None] + other * share[:, None], softmax.acc1
        if HEAD.REST:
            channel = HEAD.WIDTH + tl.arange(0, HEAD.REST)
            other = tl.load(row[:, None] + channel[None, :], mask=mask, other=0.0, cache_modifier=".cg")
            acc1 = acc1 * shrink[:, None] + other * share[:, None]
        softmax = Softmax(highest, total, acc0, acc1)
    return softmax


@triton.jit
def join_splits(splits, parts, real, softmax, HEAD, BLOCK_M: tl.constexpr, STAGES: tl.constexpr):
    """Whether this program has the last of a block's ``parts`` splits, and the softmax over all of them if so."""
    finished = parts <= 1
    if parts > 1:
        group = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1).to(tl.int64)
        cell = group * tl.num_programs(2)
        store_partial(splits.partial, cell + tl.program_id(2), real, softmax, HEAD, BLOCK_M)
        finished = is_last(splits.counter + group, parts)
        if finished:
            softmax = merge_splits(splits.partial, cell, parts, real, HEAD, BLOCK_M, STAGES)
    return finished, softmax


@triton.jit
def store_outputs(output, softmax, block, stride_lse, HEAD):
    """Divide by the sum, which the sinks join, and store output and LSE of the block's real rows."""
    top, total, real = softmax.top, softmax.total, block.real
    if output.sinks is not None:
        sink = tl.load(output.sinks + block.query_head, mask=real, other=0.0) * LOG2E
        highest = tl.maximum(top, sink)
        shrink = tl.exp2(top - highest)
        total = total * shrink + tl.exp2(sink - highest)
        top = highest
    else:
        shrink = tl.full(top.shape, 1.0, tl.float32)
    share = (shrink / tl.where(total > 0, total, 1.0))[:, None]
    row = block.token * output.stride + block.query_head * output.stride_head
    store_part(output.data, row, real, softmax.acc0 * share, 0, HEAD)
    if HEAD.REST:
        store_part(output.data, row, real, softmax.acc1 * share, 1, HEAD)
    if output.lse is not None:
        place = block.token * stride_lse + block.query_head
        tl.store(output.lse + place, (top + tl.log2(total)) / LOG2E, mask=real)


@triton.jit
def store_part(base, row, live, x, PART: tl.constexpr, HEAD):
    """Store part PART of the channels of the rows that are ``live``."""
    BEGIN: tl.constexpr = HEAD.WIDTH if PART else 0
    WIDTH: tl.constexpr = HEAD.REST if PART else HEAD.WIDTH
    channel = BEGIN + tl.arange(0, WIDTH)
    mask = live[:, None]
    if BEGIN + WIDTH > HEAD.SIZE:
        mask = mask & (channel < HEAD.SIZE)[None, :]
    tl.store(base + row[:, None] + channel[None, :], x.to(base.dtype.element_ty), mask=mask)
