"""Device functions of the kernels that merge their softmax into what another kernel left in ``out`` and ``lse``.

As in ``fused.kernel_parts``, a program holds BLOCK_M rows and a head's channels come in two parts, WIDTH and REST.
"""

import triton
import triton.language as tl

from mem_triton.ops.memory_attention.fused.kernel_output import store_part
from mem_triton.ops.memory_attention.fused.kernel_parts import LOG2E, load_part


@triton.jit
def merge_shares(lse_a, lse_b):
    """Weights of two partial softmaxes and the log-sum-exp of both; 0, 0 and -inf where neither saw a key."""
    top = tl.maximum(lse_a, lse_b)
    none = top == float("-inf")
    anchor = tl.where(none, 0.0, top)
    a, b = tl.exp(lse_a - anchor), tl.exp(lse_b - anchor)
    both = tl.where(none, 1.0, a + b)
    log_sum = tl.where(lse_a == float("-inf"), lse_b, anchor + tl.log(both))
    return a / both, b / both, tl.where(lse_b == float("-inf"), lse_a, log_sum)


@triton.jit
def clean(lse):
    """+inf is FlashAttention 2's word for a row that saw no key."""
    return tl.where(lse == float("inf"), float("-inf"), lse)


@triton.jit
def store_merged(output, row, lse_row, real, softmax, HEAD, MERGE: tl.constexpr):
    """Store the running softmax of the rows that are ``real``; top and total are in base 2.

    row, lse_row: where each begins. MERGE: into the softmax that is there. Then a row that saw no key keeps its bits,
    and is not even read.
    """
    seen = softmax.total > 0
    total = tl.where(seen, softmax.total, 1.0)
    log_sum = tl.where(seen, (softmax.top + tl.log2(total)) / LOG2E, float("-inf"))
    share, acc0, acc1 = 1.0 / total, softmax.acc0, softmax.acc1
    if MERGE:
        real = real & seen
        before = clean(tl.load(output.lse + lse_row, mask=real, other=float("-inf")))
        kept = real & (before > float("-inf"))  # what is there is worth something
        old_share, new_share, log_sum = merge_shares(before, log_sum)
        share *= new_share
        old = load_part(output.data, row, kept, 0, HEAD, False).to(tl.float32)
        acc0 = acc0 * share[:, None] + old * old_share[:, None]
        if HEAD.REST:
            old = load_part(output.data, row, kept, 1, HEAD, False).to(tl.float32)
            acc1 = acc1 * share[:, None] + old * old_share[:, None]
    else:
        acc0 *= share[:, None]
        acc1 *= share[:, None]
    store_part(output.data, row, real, acc0, 0, HEAD)
    if HEAD.REST:
        store_part(output.data, row, real, acc1, 1, HEAD)
    tl.store(output.lse + lse_row, log_sum, mask=real)
