"""bf16 tiles of attention by the instruction VDPBF16PS.

A block that vLLM has packed for AMX has words of pairs already. Rows of tokens become words here, keys by transposing
16 x 16 words in registers, values by interleaving two tokens. Queries and weights are words, too.
"""

from __future__ import annotations

from numba import njit

from mem_triton.ops.common.compiled import OPTIONS
from mem_triton.ops.memory_attention.cpu.numba_floats import LANES
from mem_triton.ops.memory_attention.cpu.numba_words import add_words, interleave, logits_of_words, transpose


def supported() -> bool:
    """Whether this CPU has the instruction."""
    try:
        with open("/proc/cpuinfo") as file:
            return any("avx512_bf16" in line for line in file if line.startswith("flags"))
    except OSError:
        return False


_logits11, _logits12, _logits13 = (logits_of_words(n, 1) for n in (1, 2, 3))
_logits41, _logits42, _logits43 = (logits_of_words(n, 4) for n in (1, 2, 3))
_add21, _add22, _add23 = (add_words(n, 2) for n in (1, 2, 3))
_add41, _add42, _add43 = (add_words(n, 4) for n in (1, 2, 3))


@njit(**OPTIONS)
def logits_of_groups(words, at, groups, half, q, many, out, n, width):
    """Logits of ``groups`` groups of 16 tokens, [D / 2, 16] words each from ``at`` on, of all queries, at out[:, n].

    q: words [many * D / 2]; out: [many * width].
    """
    step = half * 16
    while groups > 0:
        m = 0
        while m < many:
            left, place, here = many - m, m * width + n, m * half
            if groups >= 4:
                if left >= 3:
                    _logits43(words, at, step, half, q, here, out, place, width)
                elif left == 2:
                    _logits42(words, at, step, half, q, here, out, place, width)
                else:
                    _logits41(words, at, step, half, q, here, out, place, width)
            elif left >= 3:
                _logits13(words, at, step, half, q, here, out, place, width)
            elif left == 2:
                _logits12(words, at, step, half, q, here, out, place, width)
            else:
                _logits11(words, at, step, half, q, here, out, place, width)
            m += 3
        done = 4 if groups >= 4 else 1
        at, n, groups = at + done * step, n + done * 16, groups - done


@njit(**OPTIONS)
def add_groups(words, at, step, pairs, mask, p, p_at, width, many, acc, size):
    """The weighted sums of [pairs, 16 channels] words, from ``at`` on and ``step`` apart, go to acc [many * D]."""
    done = 4 if size % 64 == 0 else 2
    for channel in range(0, size, done * 16):
        m = 0
        while m < many:
            left, place, to = many - m, p_at + m * width, m * size + channel
            if done == 4:
                if left >= 3:
                    _add43(words, at, step, pairs, mask, p, place, width, acc, to, size)
                elif left == 2:
                    _add42(words, at, step, pairs, mask, p, place, width, acc, to, size)
                else:
                    _add41(words, at, step, pairs, mask, p, place, width, acc, to, size)
            elif left >= 3:
                _add23(words, at, step, pairs, mask, p, place, width, acc, to, size)
            elif left == 2:
                _add22(words, at, step, pairs, mask, p, place, width, acc, to, size)
            else:
                _add21(words, at, step, pairs, mask, p, place, width, acc, to, size)
            m += 3
        at += done * step


@njit(**OPTIONS)
def words_of_keys(rows, base, stride, count, size, out, out_at):
    """Keys of up to 16 tokens, ``stride`` apart, as words [D / 2, 16] from ``out_at`` on."""
    for block in range(size // 32):
        transpose(rows, base + 32 * block, stride, count, out, out_at + block * 16 * LANES)


@njit(**OPTIONS)
def words_of_values(rows, base, stride, count, size, out, width):
    """Values of ``count`` tokens, ``stride`` apart, as words [D / 16, width]: count / 2 groups of 16,
    rounded up; of an odd last token both halves."""
    for n in range(0, count, 2):
        at = base + n * stride
        other = at + stride if n + 1 < count else at
        for block in range(size // 32):
            interleave(rows, at + 32 * block, other + 32 * block, out, 2 * block * width + n // 2 * LANES, width)
