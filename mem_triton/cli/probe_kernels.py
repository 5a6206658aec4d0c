import triton
import triton.language as tl


@triton.jit
def scale(x, factor, BLOCK: tl.constexpr):
    """The smallest kernel that needs the whole compiler."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x + at, tl.load(x + at) * factor)
