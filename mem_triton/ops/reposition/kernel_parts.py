"""Cosine and sine that are as good at position 1e6 as at 1, on every GPU and in the interpreter."""

import triton
import triton.language as tl


@triton.jit
def cos_and_sin(quarters):
    """fp32 cosine and sine of fp64 angles in quarter turns, to about one unit in the last place.

    The library's functions reduce fp32 angles, which have lost their last bits by then, and need local memory for it.
    Here fp64 takes off whole quarter turns, and short Taylor series do for the rest, at most pi / 4.
    """
    nearest = tl.floor(quarters + 0.5)
    x = (quarters - nearest).to(tl.float32) * 1.5707963267948966
    s = x * x
    sin = x * (1.0 + s * (-1.0 / 6 + s * (1.0 / 120 + s * (-1.0 / 5040 + s * (1.0 / 362880)))))
    cos = 1.0 + s * (-1.0 / 2 + s * (1.0 / 24 + s * (-1.0 / 720 + s * (1.0 / 40320 + s * (-1.0 / 3628800)))))
    quadrant = nearest.to(tl.int64) & 3
    odd = (quadrant & 1) == 1
    turned_cos, turned_sin = tl.where(odd, sin, cos), tl.where(odd, cos, sin)
    turned_cos = tl.where((quadrant == 1) | (quadrant == 2), -turned_cos, turned_cos)
    return turned_cos, tl.where(quadrant >= 2, -turned_sin, turned_sin)
