"""The instruction VDPBF16PS (AVX512_BF16), which numba does not offer, and what brings bf16 into its order.

It adds, to each of 16 fp32 numbers, the products of two pairs of bf16 (Intel's manual, volume 2C). Keys and values come
as words of such pairs. Each function writes LLVM's instructions for one loop.
"""

from __future__ import annotations

import functools

from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np.arrayobj import make_array

binding.initialize_native_asmparser()  # for the instruction by its name
_I16, _I32, _I64 = ir.IntType(16), ir.IntType(32), ir.IntType(64)
_WORDS, _SUMS, _HALVES = ir.VectorType(_I32, 16), ir.VectorType(ir.FloatType(), 16), ir.VectorType(_I16, 32)


def _pointer(context, builder, kind, array, at, vector):
    """To ``vector`` at element ``at`` of an array."""
    data = make_array(kind)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [at]), vector.as_pointer())


def _load(builder, pointer):
    return builder.load(pointer, align=4)


def _dot(builder, sums, words, word):
    """sums + the products of each lane's pair of ``words`` with the pair ``word``."""
    kind = ir.FunctionType(_SUMS, [_WORDS, _WORDS, _SUMS])
    return builder.asm(kind, "vdpbf16ps $2, $1, $0", "=v,v,v,0", [words, _spread(builder, word), sums], False)


def _spread(builder, word):
    lane = builder.insert_element(ir.Constant(_WORDS, ir.Undefined), word, ir.Constant(_I32, 0))
    return builder.shuffle_vector(lane, ir.Constant(_WORDS, ir.Undefined), ir.Constant(_WORDS, [0] * 16))


def _groups(context, builder, kind, words, place, step, groups):
    offsets = [builder.add(place, builder.mul(step, ir.Constant(_I64, group))) for group in range(groups)]
    return [_load(builder, _pointer(context, builder, kind, words, offset, _WORDS)) for offset in offsets]


def _accumulated(context, builder, words, factors, turns, many, groups, masks=None):
    """Sums of products, [many * groups] cells: in each turn ``groups`` groups of words meet a word of ``many`` rows.

    words: (type, array, first, distance of groups). factors: (type, array, first, distance of rows).
    """
    kind, array, first, distance = words
    factor_kind, factor_array, factor_first, row = factors
    cells = [cgutils.alloca_once(builder, _SUMS) for _ in range(many * groups)]
    for cell in cells:
        builder.store(ir.Constant(_SUMS, None), cell)
    with cgutils.for_range(builder, turns) as loop:
        place = builder.add(first, builder.mul(loop.index, ir.Constant(_I64, 16)))
        here = _groups(context, builder, kind, array, place, distance, groups)
        if masks is not None:
            here = [builder.and_(group, masks) for group in here]
        for m in range(many):
            where = builder.add(builder.add(factor_first, builder.mul(row, ir.Constant(_I64, m))), loop.index)
            word = builder.load(_pointer(context, builder, factor_kind, factor_array, where, _I32))
            for group in range(groups):
                cell = cells[m * groups + group]
                builder.store(_dot(builder, builder.load(cell), here[group], word), cell)
    return cells


def _places(context, builder, kind, array, first, row, many, groups):
    """Pointers to where the cells of ``_accumulated`` belong: rows ``row`` apart, groups side by side."""
    for i in range(many * groups):
        where = builder.add(first, builder.mul(row, ir.Constant(_I64, i // groups)))
        where = builder.add(where, ir.Constant(_I64, i % groups * 16))
        yield _pointer(context, builder, kind, array, where, _SUMS)


@functools.cache
def logits_of_words(many, groups):
    """(words, at, step, half, q, q_at, out, out_at, out_stride): logits of ``many`` queries and ``groups`` groups of 16
    tokens, whose words are ``step`` apart. As many sums run side by side: one alone waits for itself."""

    @intrinsic
    def run(typing, words, at, step, half, q, q_at, out, out_at, out_stride):
        def generate(context, builder, signature, args):
            kinds = signature.args
            keys, queries = (kinds[0], *args[:3]), (kinds[4], args[4], args[5], args[3])
            cells = _accumulated(context, builder, keys, queries, args[3], many, groups)
            for cell, place in zip(cells, _places(context, builder, kinds[6], *args[6:9], many, groups), strict=True):
                builder.store(builder.load(cell), place, align=4)

        return types.void(words, at, step, half, q, q_at, out, out_at, out_stride), generate

    return run


@functools.cache
def add_words(many, groups):
    """(words, at, step, pairs, mask, p, p_at, p_stride, acc, acc_at, acc_stride): the weighted sum over pairs of tokens
    of ``groups`` groups of 16 channels, whose words are ``step`` apart, is added to ``many`` accumulators. mask: of
    each word, for a pair whose second token is none."""

    @intrinsic
    def run(typing, words, at, step, pairs, mask, p, p_at, p_stride, acc, acc_at, acc_stride):
        def generate(context, builder, signature, args):
            kinds = signature.args
            values, weights = (kinds[0], *args[:3]), (kinds[5], *args[5:8])
            masks = _spread(builder, args[4])
            cells = _accumulated(context, builder, values, weights, args[3], many, groups, masks)
            for cell, place in zip(cells, _places(context, builder, kinds[8], *args[8:11], many, groups), strict=True):
                builder.store(builder.fadd(_load(builder, place), builder.load(cell)), place, align=4)

        return types.void(words, at, step, pairs, mask, p, p_at, p_stride, acc, acc_at, acc_stride), generate

    return run


@intrinsic
def transpose(typing, rows, at, stride, count, out, out_at):
    """16 words of each of 16 tokens, uint16 ``stride`` apart, as 16 words by channel pair. count: tokens there are."""

    def generate(context, builder, signature, args):
        kinds, last = signature.args, builder.sub(args[3], ir.Constant(_I64, 1))
        lines = []
        for n in range(16):
            index = ir.Constant(_I64, n)
            index = builder.select(builder.icmp_signed("<", index, last), index, last)
            place = builder.add(args[1], builder.mul(index, args[2]))
            lines.append(builder.load(_pointer(context, builder, kinds[0], args[0], place, _WORDS), align=2))
        for step in (1, 2, 4, 8):
            for n in range(16):
                if n & step:
                    continue
                a, b = lines[n], lines[n + step]
                first = [i if not i & step else i - step + 16 for i in range(16)]
                second = [i + step if not i & step else i + 16 for i in range(16)]
                lines[n] = builder.shuffle_vector(a, b, ir.Constant(_WORDS, first))
                lines[n + step] = builder.shuffle_vector(a, b, ir.Constant(_WORDS, second))
        for n, line in enumerate(lines):
            place = builder.add(args[5], ir.Constant(_I64, 16 * n))
            builder.store(line, _pointer(context, builder, kinds[4], args[4], place, _WORDS), align=4)

    return types.void(rows, at, stride, count, out, out_at), generate


@intrinsic
def interleave(typing, rows, at, other, out, out_at, out_stride):
    """32 channels of the tokens at ``at`` and ``other`` as two groups of 16 words."""

    def generate(context, builder, signature, args):
        kinds = signature.args
        a, b = (
            builder.load(_pointer(context, builder, kinds[0], args[0], place, _HALVES), align=2) for place in args[1:3]
        )
        for half in range(2):
            order = [16 * half + i // 2 + 32 * (i % 2) for i in range(32)]
            mixed = builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(_I32, 32), order))
            place = builder.add(args[4], builder.mul(args[5], ir.Constant(_I64, half)))
            pointer = _pointer(context, builder, kinds[3], args[3], place, _WORDS)
            builder.store(builder.bitcast(mixed, _WORDS), pointer, align=4)

    return types.void(rows, at, other, out, out_at, out_stride), generate
