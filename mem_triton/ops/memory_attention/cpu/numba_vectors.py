"""Vectors of 16 words for numba's compiled loops: products of a few rows with many columns, by LLVM's instructions.

Everything is named by its address in memory, in bytes. A word is a float32, or a pair of bf16; a group is 16 words
that lie beside each other. Each function writes LLVM's instructions for one loop.
"""

from __future__ import annotations

from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.core.registry import cpu_target
from numba.extending import intrinsic

binding.initialize_native_asmparser()  # for the instruction VDPBF16PS by its name
HAS_DOT = "+avx512bf16" in cpu_target.target_context.codegen().magic_tuple()[2].split(",")
"""Whether numba compiles for a CPU with the instruction VDPBF16PS; for another one LLVM would end the process."""
LANES = 16
GROUP = 4 * LANES  # bytes
_I16, _I32, _I64, _F32 = ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
WORDS, SUMS, _HALVES = ir.VectorType(_I32, LANES), ir.VectorType(_F32, LANES), ir.VectorType(_I16, 2 * LANES)


def number(number):
    return ir.Constant(_I64, number)


def load(builder, address, kind):
    return builder.load(builder.inttoptr(address, kind.as_pointer()), align=2)


def store(builder, value, address):
    builder.store(value, builder.inttoptr(address, value.type.as_pointer()), align=4)


def spread(builder, word):
    kind = ir.VectorType(word.type, LANES)
    lane = builder.insert_element(ir.Constant(kind, ir.Undefined), word, ir.Constant(_I32, 0))
    return builder.shuffle_vector(lane, ir.Constant(kind, ir.Undefined), ir.Constant(WORDS, [0] * LANES))


def _added(builder, sums, words, word, pairs):
    """sums + the products of each lane of ``words`` with ``word``; of pairs of bf16 both products, by VDPBF16PS
    (Intel's manual, volume 2C) where the CPU has it."""
    flags, word = ("contract",), spread(builder, word)
    if pairs and HAS_DOT:
        kind = ir.FunctionType(SUMS, [WORDS, WORDS, SUMS])
        return builder.asm(kind, "vdpbf16ps $2, $1, $0", "=v,v,v,0", [words, word, sums], False)
    if pairs:
        for a, b in zip(_halves(builder, words), _halves(builder, word), strict=True):
            sums = builder.fadd(builder.fmul(a, b, flags=flags), sums, flags=flags)
        return sums
    return builder.fadd(builder.fmul(words, word, flags=flags), sums, flags=flags)


def _halves(builder, words):
    """Pairs of bf16 as two vectors of floats: the second of each pair, and the first."""
    high = builder.and_(words, ir.Constant(WORDS, [0xFFFF0000] * LANES))
    low = builder.shl(words, ir.Constant(WORDS, [16] * LANES))
    return builder.bitcast(high, SUMS), builder.bitcast(low, SUMS)


def _sums(context, builder, args, many, groups, pairs, listed):
    """The loop of ``products`` for so many rows and groups: as many sums run side by side, as one waits for itself."""
    data, step, turn, turns, f, f_row, out, out_row = args
    vector, scalar = (WORDS, _I32) if pairs else (SUMS, _F32)
    places = [
        builder.add(builder.add(out, builder.mul(out_row, number(m))), number(4 * LANES * g))
        for m in range(many)
        for g in range(groups)
    ]
    cells = [cgutils.alloca_once(builder, SUMS) for _ in places]
    for cell, place in zip(cells, places, strict=True):
        builder.store(load(builder, place, SUMS), cell)
    with cgutils.for_range(builder, turns) as loop:
        if listed:
            at = builder.add(load(builder, builder.add(data, builder.mul(loop.index, number(8))), _I64), turn)
        else:
            at = builder.add(data, builder.mul(loop.index, turn))
        here = [load(builder, builder.add(at, builder.mul(step, number(g))), vector) for g in range(groups)]
        word_at = builder.add(f, builder.mul(loop.index, number(4)))
        for m in range(many):
            word = load(builder, builder.add(word_at, builder.mul(f_row, number(m))), scalar)
            for g in range(groups):
                cell = cells[m * groups + g]
                builder.store(_added(builder, builder.load(cell), here[g], word, pairs), cell)
    for cell, place in zip(cells, places, strict=True):
        store(builder, builder.load(cell), place)


def _products(pairs, listed):
    """(many, groups, data, step, turn, turns, f, f_row, out, out_row): to ``many`` rows, 1 to 4, of ``groups`` groups,
    1, 2 or 4, at ``out`` are added, turn by turn, a row's next word from ``f`` on times the groups at ``data``, which
    are ``step`` apart. The next turn's lie at ``data`` + ``turn``; of a list of addresses, at the next + ``turn``."""

    @intrinsic
    def run(typing, many, groups, data, step, turn, turns, f, f_row, out, out_row):
        def generate(context, builder, signature, args):
            which = builder.add(builder.mul(args[0], number(8)), args[1])
            over = builder.append_basic_block("over")
            choice = builder.switch(which, over)
            for rows in (1, 2, 3, 4):
                for wide in (1, 2, 4):
                    block = builder.append_basic_block(f"rows{rows}x{wide}")
                    choice.add_case(number(8 * rows + wide), block)
                    builder.position_at_end(block)
                    _sums(context, builder, args[2:], rows, wide, pairs, listed)
                    builder.branch(over)
            builder.position_at_end(over)

        return types.void(*[types.int64] * 10), generate

    return run


multiply_floats = _products(pairs=False, listed=False)
multiply_listed = _products(pairs=False, listed=True)
multiply_pairs = _products(pairs=True, listed=False)


def reduced(builder, vector, operation):
    """All lanes of a vector as one, halves with halves."""
    width = LANES
    while width > 1:
        width //= 2
        low, high = (ir.Constant(ir.VectorType(_I32, width), list(range(i, i + width))) for i in (0, width))
        nothing = ir.Constant(vector.type, ir.Undefined)
        halves = (builder.shuffle_vector(vector, nothing, part) for part in (low, high))
        vector = operation(builder, *halves)
    return builder.extract_element(vector, ir.Constant(_I32, 0))


def larger(builder, a, b):
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


@intrinsic
def transpose(typing, listed, count, offset, out):
    """16 words of each of 16 tokens, at the addresses in the list + offset, as 16 groups: a word of each token.

    count: tokens there are; the last stands for the rest.
    """

    def generate(context, builder, signature, args):
        listed, count, offset, out = args
        last, lines = builder.sub(count, number(1)), []
        for n in range(LANES):
            index = builder.select(builder.icmp_signed("<", number(n), last), number(n), last)
            at = load(builder, builder.add(listed, builder.mul(index, number(8))), _I64)
            lines.append(load(builder, builder.add(at, offset), WORDS))
        for step in (1, 2, 4, 8):
            for n in range(LANES):
                if n & step:
                    continue
                a, b = lines[n], lines[n + step]
                first = [i if not i & step else i - step + 16 for i in range(16)]
                second = [i + step if not i & step else i + 16 for i in range(16)]
                lines[n] = builder.shuffle_vector(a, b, ir.Constant(WORDS, first))
                lines[n + step] = builder.shuffle_vector(a, b, ir.Constant(WORDS, second))
        for n, line in enumerate(lines):
            store(builder, line, builder.add(out, number(64 * n)))

    return types.void(*[types.int64] * 4), generate


@intrinsic
def interleave(typing, first, second, out, out_step):
    """32 bf16 at ``first`` and at ``second`` as two groups of pairs."""

    def generate(context, builder, signature, args):
        a, b = (load(builder, place, _HALVES) for place in args[:2])
        for half in range(2):
            order = [LANES * half + i // 2 + 32 * (i % 2) for i in range(32)]
            mixed = builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(_I32, 32), order))
            place = builder.add(args[2], builder.mul(args[3], number(half)))
            store(builder, builder.bitcast(mixed, WORDS), place)

    return types.void(*[types.int64] * 4), generate
