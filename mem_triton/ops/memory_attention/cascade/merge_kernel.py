"""The merge of two partial softmaxes on a GPU: one program per few rows, a row being one query head of one token."""

import triton
import triton.language as tl

from mem_triton.ops.memory_attention.cascade.kernel_parts import clean, merge_shares
from mem_triton.ops.memory_attention.fused.kernel_output import store_part
from mem_triton.ops.memory_attention.fused.kernel_parts import load_part

ROWS, WARPS = 16, 4
STRIDES = ("stride_a", "stride_a_head", "stride_b", "stride_b_head", "stride_lse", "stride_lse_head")
"""Of the three log-sum-exps."""


@triton.jit
def mix(x, y, share_x, share_y, live_x, live_y):
    """Rows with one live side are that side bit by bit, the sign of a zero included."""
    both = x * share_x[:, None] + y * share_y[:, None]
    return tl.where(live_y[:, None], tl.where(live_x[:, None], both, y), x)


@triton.jit(do_not_specialize=["num_rows", *STRIDES])
def merge_kernel(
    a,
    b,
    output,
    num_rows,
    stride_a,
    stride_a_head,
    stride_b,
    stride_b_head,
    stride_lse,
    stride_lse_head,
    HEAD,
    ROWS: tl.constexpr,
):
    """Grid (groups of ROWS rows). a, b, output: ``operands.Output``, of which the last may be one of the others.

    HEAD: its GROUP is all query heads.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    real = row < num_rows
    token, head = row // HEAD.GROUP, row % HEAD.GROUP
    lse_a = clean(tl.load(a.lse + token * stride_a + head * stride_a_head, mask=real, other=float("-inf")))
    lse_b = clean(tl.load(b.lse + token * stride_b + head * stride_b_head, mask=real, other=float("-inf")))
    share_a, share_b, log_sum = merge_shares(lse_a, lse_b)
    live_a, live_b = real & (lse_a > float("-inf")), real & (lse_b > float("-inf"))  # other outputs may be anything
    at_a, at_b = token * a.stride + head * a.stride_head, token * b.stride + head * b.stride_head
    at = token * output.stride + head * output.stride_head
    x = load_part(a.data, at_a, live_a, 0, HEAD, False).to(tl.float32)
    y = load_part(b.data, at_b, live_b, 0, HEAD, False).to(tl.float32)
    store_part(output.data, at, real, mix(x, y, share_a, share_b, live_a, live_b), 0, HEAD)
    if HEAD.REST:
        x = load_part(a.data, at_a, live_a, 1, HEAD, False).to(tl.float32)
        y = load_part(b.data, at_b, live_b, 1, HEAD, False).to(tl.float32)
        store_part(output.data, at, real, mix(x, y, share_a, share_b, live_a, live_b), 1, HEAD)
    if output.lse is not None:
        tl.store(output.lse + token * stride_lse + head * stride_lse_head, log_sum, mask=real)
