"""``memory_attention`` on a CPU where the engine has packed its KV cache: every order, by numba and by torch."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mem_triton.ops.memory_attention import FOREVER, memory_attention
from mem_triton.ops.memory_attention.arguments.packing import Packing, learn, unpack_keys, unpack_values
from mem_triton.ops.memory_attention.cpu import paged_numba
from tests.ops.attention_case import AttentionCase, assert_matches, make_case, random_case

KINDS = ("columns", "pairs", "other")
DTYPES = (torch.float32, torch.bfloat16)


def packing_of(kind: str, tokens: int, size: int) -> Packing:
    """A packing; an order of no system for the kind "other"."""
    if kind != "other":
        return Packing(kind, tokens)
    g = torch.Generator().manual_seed(3)
    return Packing(kind, tokens, *(torch.randperm(tokens * size, generator=g) for _ in range(2)))


def pack(x: Tensor, unpack, packing: Packing) -> Tensor:
    """[..., N, D] as [..., N * D]: what ``unpack`` makes [..., N, D] of again."""
    places = unpack(torch.arange(x.shape[-2] * x.shape[-1]), packing).flatten()
    packed = torch.empty(*x.shape[:-2], len(places), dtype=x.dtype)
    packed[..., places] = x.flatten(-2)
    return packed


def packed(case: AttentionCase, kind: str) -> AttentionCase:
    keys, values = case.context.keys, case.context.values
    packing = packing_of(kind, *keys.shape[2:])
    halves = torch.stack([pack(keys, unpack_keys, packing), pack(values, unpack_values, packing)], 2)
    keys, values = halves.unbind(2)
    return replace(case, context=case.context._replace(keys=keys, values=values, packing=packing))


def check(case: AttentionCase, kind: str) -> None:
    after = packed(case, kind).fresh()
    memory_attention(after.call())
    assert_matches(replace(case, out=after.out, lse=after.lse))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"soft_cap": 3.0, "sinks": True, "bias": True}, {"shared": 21}])
def test_every_packing_equals_the_oracle(kind, dtype, threads, options):
    """Decoding, short and long prompts, blocks longer than a tile, odd lengths, pages and none; poison behind all."""
    case = make_case(
        [(1, 300), (1, 4), (5, 62), (40, 100), (1, 159), (2, 0)],
        heads=(6, 2),
        size=64,
        block_size=160,
        memories=[[(8, 0, FOREVER)] * 5, None, [(8, 64, FOREVER), (3, 0, 65)], [(7, 0, FOREVER)], [], [(1, 0, 1)]],
        dtype=dtype,
        **options,
    )
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        check(case, kind)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("size", [32, 80, 96, 128])
@pytest.mark.parametrize("group", [1, 2, 4, 7])
def test_every_size_and_group_in_bf16(size, group):
    """What VDPBF16PS takes in threes, fours and pairs, and the sizes that it does not."""
    case = make_case(
        [(1, 70), (3, 200)],
        heads=(group * 2, 2),
        size=size,
        block_size=32,
        page_size=150,
        memories=[[(150, 0, FOREVER), (131, 0, FOREVER)], None],
        dtype=torch.bfloat16,
        shared=33,
    )
    for kind in ("columns", "pairs"):
        check(case, kind)


@pytest.mark.parametrize("kind", ["columns", "pairs"])
@pytest.mark.parametrize("block", [32, 64, 96, 128, 256])
def test_fp32_contexts_of_any_block_size(block, kind):
    """By channel a tile is several blocks, if they make a whole one: prompts that end in each of them, and decoding."""
    case = make_case(
        [(1, 127), (1, 128), (1, 300), (200, 0), (40, 97), (3, 31)],
        heads=(6, 2),
        size=32,
        block_size=block,
        memories=[[(8, 0, FOREVER)] * 3, None, [(8, 64, FOREVER)], None, [(5, 0, FOREVER)], None],
        dtype=torch.float32,
        soft_cap=4.0,
    )
    check(case, kind)


@pytest.mark.parametrize("dot", [True, False])
@pytest.mark.parametrize("seed", range(20))
def test_any_batch_with_and_without_the_instruction(seed, dot, monkeypatch):
    """The ways of other CPUs, for which this one may have to stand in."""
    monkeypatch.setattr(paged_numba, "HAS_DOT", dot)
    case = random_case(random.Random(seed))
    after = case.fresh()
    memory_attention(after.call())
    assert_matches(after)


def test_a_wrong_order_would_be_seen():
    """Negative control: keys packed otherwise than is said."""
    case = make_case([(1, 60)], size=64, block_size=32)
    wrong = packed(case, "columns")
    wrong = replace(wrong, context=wrong.context._replace(packing=Packing("pairs", 32)))
    memory_attention(wrong.call())
    with pytest.raises(AssertionError):
        assert_matches(replace(case, out=wrong.out, lse=wrong.lse))


@pytest.mark.parametrize("kind", KINDS)
def test_an_order_is_learned_from_what_is_written(kind):
    tokens, heads, size = 32, 3, 48
    packing = packing_of(kind, tokens, size)

    def write(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = (x.transpose(0, 1).bfloat16() for x in (keys, values))
        return pack(keys, unpack_keys, packing), pack(values, unpack_values, packing)

    learned = learn(write, tokens, heads, size)
    assert learned.kind == kind and learned.tokens == tokens
    x = torch.randn(tokens, heads, size)
    for wrote, unpack in zip(write(x, x), (unpack_keys, unpack_values), strict=True):
        assert torch.equal(unpack(wrote, learned), x.transpose(0, 1).bfloat16())


def test_what_is_no_order_is_refused():
    with pytest.raises(ValueError, match="the values of a KV-cache block are not what was written"):
        learn(lambda keys, values: (keys.transpose(0, 1).flatten(1), values.transpose(0, 1).flatten(1) * 0), 16, 2, 16)


def test_the_instruction_is_found_where_it_is():
    assert ("avx512_bf16" in Path("/proc/cpuinfo").read_text()) == paged_numba.HAS_DOT


def test_pairs_are_multiplied_on_a_cpu_without_the_instruction():
    """LLVM ends a process that writes an instruction which its CPU lacks: every server on an older CPU."""
    environment = os.environ | {"NUMBA_CPU_NAME": "x86-64-v3", "NUMBA_CPU_FEATURES": "+avx2,+fma"}
    done = subprocess.run([sys.executable, "-c", _PAIRS], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["False", "11.0"], "1 + 2 * 3 + 1 * 4"


_PAIRS = """
import numpy as np
from numba import njit
from mem_triton.ops.memory_attention.cpu.numba_vectors import HAS_DOT, multiply_pairs

@njit
def run(data, word, out):
    multiply_pairs(1, 1, data, 64, 64, 1, word, 4, out, 64)

def halves(first, second):
    return np.array([first, second], np.float32).view(np.uint32) >> 16

words = np.tile(halves(2, 1).astype(np.uint16), 16)
word = halves(3, 4).astype(np.uint16)
out = np.ones(16, np.float32)
run(words.ctypes.data, word.ctypes.data, out.ctypes.data)
assert (out == out[0]).all()
print(HAS_DOT, out[0])
"""
