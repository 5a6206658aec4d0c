"""Device functions that the kernels of several ops call."""

import triton
import triton.language as tl


@triton.jit
def tanh(x):
    """tanh from exp, which both the interpreter and the GPU have; a polynomial where 1 - exp(-2x) would cancel."""
    e = tl.exp(-2.0 * tl.abs(x))
    large = (1.0 - e) / (1.0 + e)
    s = x * x
    small = x * (1.0 + s * (-1.0 / 3 + s * (2.0 / 15 + s * (-17.0 / 315 + s * (62.0 / 2835)))))
    return tl.where(tl.abs(x) < 0.25, small, tl.where(x < 0, -large, large))


@triton.jit
def find_block(query_start_loc, num_rows, block, TOKENS: tl.constexpr):
    """Row of block ``block`` of TOKENS tokens, and its number in it: row n owns those from start[n] // TOKENS + n on.

    That is enough for each row, and depends on no length but those before it.
    """
    low, high = 0, num_rows
    while high - low > 1:
        middle = (low + high) // 2
        after = tl.load(query_start_loc + middle) // TOKENS + middle <= block
        low, high = tl.where(after, middle, low), tl.where(after, high, middle)
    return low, block - (tl.load(query_start_loc + low) // TOKENS + low)


@triton.jit
def is_last(counter, programs):
    """Whether the other programs of ``counter`` are through; their stores are then visible, and it is 0 again."""
    tl.debug_barrier()  # every thread's stores come before the one thread's atomic
    last = tl.atomic_add(counter, 1, sem="acq_rel") == programs - 1
    if last:
        tl.atomic_xchg(counter, 0, sem="relaxed")  # for the next launch, so that a captured graph can be replayed
    tl.debug_barrier()
    return last
