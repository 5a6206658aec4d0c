"""The merge of two partial softmaxes on a GPU: one program per few rows, a row being one query head of one token."""

import triton
import triton.language as tl

from mem_triton.ops.memory_attention.cascade.kernel_parts import clean, merge_shares, store_part
from mem_triton.ops.memory_attention.fused.kernel_parts import load_part

ROWS, WARPS = 16, 4


@triton.jit
def mix(x, y, share_x, share_y, live_x, live_y):
    """Rows with one live side are that side bit by bit, the sign of a zero included."""
    both = x * share_x[:, None] + y * share_y[:, None]
    return tl.where(live_y[:, None], tl.where(live_x[:, None], both, y), x)


@triton.jit(
    do_not_specialize=[
        "num_rows",
        "stride_lse_a",
        "stride_lse_a_head",
        "stride_lse_b",
        "stride_lse_b_head",
        "stride_lse",
        "stride_lse_head",
    ]
)
def merge_kernel(
    out_a,
    lse_a,
    out_b,
    lse_b,
    out,
    lse,
    num_rows,
    stride_a,
    stride_a_head,
    stride_lse_a,
    stride_lse_a_head,
    stride_b,
    stride_b_head,
    stride_lse_b,
    stride_lse_b_head,
    stride_out,
    stride_out_head,
    stride_lse,
    stride_lse_head,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    REST: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Grid (groups of ROWS rows). ``out`` may be ``out_a`` or ``out_b``, ``lse`` likewise."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    real = row < num_rows
    token, head = row // HEADS, row % HEADS
    a = clean(tl.load(lse_a + token * stride_lse_a + head * stride_lse_a_head, mask=real, other=float("-inf")))
    b = clean(tl.load(lse_b + token * stride_lse_b + head * stride_lse_b_head, mask=real, other=float("-inf")))
    share_a, share_b, log_sum = merge_shares(a, b)
    live_a, live_b = real & (a > float("-inf")), real & (b > float("-inf"))  # the other outputs may be anything
    at_a, at_b = token * stride_a + head * stride_a_head, token * stride_b + head * stride_b_head
    at = token * stride_out + head * stride_out_head
    x = load_part(out_a, at_a, live_a, 0, WIDTH, SIZE, False).to(tl.float32)
    y = load_part(out_b, at_b, live_b, 0, WIDTH, SIZE, False).to(tl.float32)
    store_part(out, at, real, mix(x, y, share_a, share_b, live_a, live_b), 0, WIDTH, SIZE)
    if REST:
        x = load_part(out_a, at_a, live_a, WIDTH, REST, SIZE, False).to(tl.float32)
        y = load_part(out_b, at_b, live_b, WIDTH, REST, SIZE, False).to(tl.float32)
        store_part(out, at, real, mix(x, y, share_a, share_b, live_a, live_b), WIDTH, REST, SIZE)
    if lse is not None:
        tl.store(lse + token * stride_lse + head * stride_lse_head, log_sum, mask=real)
