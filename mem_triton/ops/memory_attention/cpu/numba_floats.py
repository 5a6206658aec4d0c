"""Numbers as numba's compiled loops take them: bf16 as uint16, or two of them as uint32, and powers of two."""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

TILE = 128
POWERS = (1.5403530e-4, 1.3333558e-3, 9.6181291e-3, 5.5504109e-2, 0.24022651, 0.69314718, 1.0)
"""2**f for f from -0.5 to 0.5: the highest power's factor first."""


def _bits(builder, value, shift):
    word = builder.shl(value, ir.Constant(ir.IntType(32), shift)) if shift else value
    return builder.bitcast(word, ir.FloatType())


@intrinsic
def as_float(typing, x):
    """A float32 as it is, a uint16 as the bf16 that it holds, a uint32 as the float32 that it holds."""

    def generate(context, builder, signature, args):
        if signature.args[0] == types.float32:
            return args[0]
        if signature.args[0] == types.uint16:
            return _bits(builder, builder.zext(args[0], ir.IntType(32)), 16)
        return _bits(builder, args[0], 0)

    return types.float32(x), generate


@intrinsic
def rounded(typing, x, like):
    """A float32 as ``like`` holds numbers: itself, or the nearest bf16 as uint16, of two the even one."""

    def generate(context, builder, signature, args):
        if signature.args[1] == types.float32:
            return args[0]
        word, constant = builder.bitcast(args[0], ir.IntType(32)), lambda n: ir.Constant(ir.IntType(32), n)
        odd = builder.and_(builder.lshr(word, constant(16)), constant(1))
        up = builder.lshr(builder.add(builder.add(word, odd), constant(0x7FFF)), constant(16))
        quiet = builder.or_(builder.lshr(word, constant(16)), constant(0x40))
        nan = builder.fcmp_unordered("uno", args[0], args[0])
        return builder.trunc(builder.select(nan, quiet, up), ir.IntType(16))

    return like(x, like), generate


@njit(inline="always")
def exp2(x):
    """2**x for x <= 0, to 2e-7; below 2**-126 that."""
    x = max(x, np.float32(-126))
    whole = np.floor(x + np.float32(0.5))
    f, power = x - whole, np.float32(POWERS[0])
    for i in range(1, len(POWERS)):
        power = np.float32(POWERS[i]) + f * power
    return power * as_float(np.uint32((np.int32(whole) + np.int32(127)) << np.int32(23)))
