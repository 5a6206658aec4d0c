"""Groups of 16 logits for numba's compiled loops: scaled, masked, and made weights, by LLVM's instructions.

A loop that LLVM makes vectors of by itself ends with up to 31 numbers one by one, and most tiles have hardly more.
Everything is named by its address in memory, in bytes, as in ``numba_vectors``.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from mem_triton.ops.memory_attention.cpu.numba_floats import POWERS
from mem_triton.ops.memory_attention.cpu.numba_vectors import (
    GROUP,
    LANES,
    SUMS,
    WORDS,
    larger,
    load,
    number,
    reduced,
    spread,
    store,
)

_FLAGS = ("contract",)
_NOTHING = float("-inf")


def _floats(value):
    return ir.Constant(SUMS, [value] * LANES)


def _product(builder, a, b, c):
    """a * b + c."""
    return builder.fadd(builder.fmul(a, b, flags=_FLAGS), c, flags=_FLAGS)


def _exp2(builder, x):
    """2**x for x <= 0, to 2e-7; below 2**-126 that: ``numba_floats.exp2`` for 16 numbers."""
    x = builder.select(builder.fcmp_unordered(">", x, _floats(-126.0)), x, _floats(-126.0))  # NaN stays
    kind = ir.FunctionType(SUMS, [SUMS])
    floor = cgutils.get_or_insert_function(builder.module, kind, f"llvm.floor.v{LANES}f32")
    whole = builder.call(floor, [builder.fadd(x, _floats(0.5))])
    f = builder.fsub(x, whole)
    power = _floats(POWERS[0])
    for factor in POWERS[1:]:
        power = _product(builder, f, power, _floats(factor))
    exponent = builder.add(builder.fptosi(whole, WORDS), ir.Constant(WORDS, [127] * LANES))
    scale = builder.bitcast(builder.shl(exponent, ir.Constant(WORDS, [23] * LANES)), SUMS)
    return builder.fmul(power, scale)


@intrinsic
def weigh(typing, data, groups, factor, worth, worth_factor, seen_from, seen_to, at):
    """Turn products at ``data`` into logits, product * factor + worth * worth_factor, and give the largest.

    A token that is not seen from position ``at``, which lies outside its ``seen_from`` to ``seen_to``, gets -inf.
    """

    def generate(context, builder, signature, args):
        data, groups, factor, worth, worth_factor, seen_from, seen_to, at = args
        factor, worth_factor = spread(builder, factor), spread(builder, worth_factor)
        at = spread(builder, at)
        cell = cgutils.alloca_once(builder, SUMS)
        builder.store(_floats(_NOTHING), cell)
        with cgutils.for_range(builder, groups) as loop:
            step = builder.mul(loop.index, number(GROUP))
            x, worths = (load(builder, builder.add(place, step), SUMS) for place in (data, worth))
            first, end = (load(builder, builder.add(place, step), WORDS) for place in (seen_from, seen_to))
            logit = _product(builder, x, factor, builder.fmul(worths, worth_factor, flags=_FLAGS))
            seen = builder.and_(builder.icmp_signed("<=", first, at), builder.icmp_signed("<", at, end))
            logit = builder.select(seen, logit, _floats(_NOTHING))
            store(builder, logit, builder.add(data, step))
            builder.store(larger(builder, logit, builder.load(cell)), cell)
        return reduced(builder, builder.load(cell), larger)

    place, real = types.int64, types.float32
    return real(place, types.int64, real, place, real, place, place, types.int32), generate


@intrinsic
def weights_of(typing, data, groups, highest):
    """Turn logits at ``data`` into weights, 2**(logit - highest) and 0 for -inf, and give their sum."""

    def generate(context, builder, signature, args):
        data, groups, highest = args
        highest = spread(builder, highest)
        cell = cgutils.alloca_once(builder, SUMS)
        builder.store(_floats(0.0), cell)
        with cgutils.for_range(builder, groups) as loop:
            place = builder.add(data, builder.mul(loop.index, number(GROUP)))
            x = load(builder, place, SUMS)
            nothing = builder.fcmp_unordered("==", x, _floats(_NOTHING))
            weight = builder.select(nothing, _floats(0.0), _exp2(builder, builder.fsub(x, highest)))
            store(builder, weight, place)
            builder.store(builder.fadd(weight, builder.load(cell)), cell)
        return reduced(builder, builder.load(cell), lambda builder, a, b: builder.fadd(a, b))

    return types.float32(types.int64, types.int64, types.float32), generate
