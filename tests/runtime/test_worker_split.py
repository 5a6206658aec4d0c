"""What a rank of a split model holds: its rows of δ-mem's corrections, its heads and layers of a bank, its pages."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from mem_triton.config import ConfigError
from mem_triton.systems.delta_mem import pack_layer
from mem_triton.systems.delta_mem.attach import shard
from mem_triton.systems.engine import EngineShape
from mem_triton.systems.explicit.layout import GIB, MOST_PAGES, join_captured, layout_of
from mem_triton.systems.explicit.section import MemorySection
from mem_triton.systems.explicit.worker import _heads
from tests.support.models import attention_dims, random_adapter, tiny_model

SHAPE = {
    "engine": "test",
    "model": "m",
    "revision": None,
    "hf_config": {},
    "dtype": torch.bfloat16,
    "hidden": 128,
    "heads": 4,
    "kv_heads": 4,
    "head_dim": 32,
    "tp_size": 1,
    "pp_spans": ((0, 8),),
    "max_requests": 4,
    "max_step_tokens": 640,
    "max_model_len": 4096,
}


def shape(**fields) -> EngineShape:
    return EngineShape(**{**SHAPE, **fields})


def spec(**fields) -> SimpleNamespace:
    stock = {"layers": (0, 1, 2, 5), "kv_heads": 4, "head_dim": 32, "keep_tokens": None, "reference_tokens": 128}
    stock |= {"kind": "memory3", "temperature": 1.0}
    return SimpleNamespace(**{**stock, **fields})


def section(**fields) -> MemorySection:
    return MemorySection(bank="/somewhere", **fields)


# δ-mem's corrections.


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_hold_the_rows_of_their_heads_and_repeat_what_engines_repeat(ranks):
    """A model of four query heads and two KV heads: four ranks have the KV heads twice."""
    model = tiny_model()
    adapter = random_adapter(model, delta_heads=("q", "k", "v", "o"))
    dims = attention_dims(model)["model.layers.0.self_attn"]
    whole = pack_layer(adapter.config, adapter.layers["model.layers.0.self_attn"])
    heads, kv_heads = model.config.num_attention_heads, model.config.num_key_value_heads
    own = max(1, kv_heads // ranks) * dims.k // kv_heads  # width of a rank's keys
    parts = [shard(whole, (dims.q // ranks, own, own), rank, ranks) for rank in range(ranks)]
    assert (heads, kv_heads) == (4, 2)
    twice = max(1, ranks // kv_heads)
    for name, copies in (("delta_q", 1), ("delta_k", twice), ("delta_v", twice)):
        held = [getattr(part, name) for part in parts]
        assert torch.equal(torch.cat(held[::copies]), getattr(whole, name))
        assert all(torch.equal(rows, held[i // copies * copies]) for i, rows in enumerate(held))
    assert all(part.delta_o is whole.delta_o for part in parts), "it is added once, whole"


# A bank's heads and layers.


@pytest.mark.parametrize(
    ("total", "ranks", "expected"),
    [
        (4, 1, [(0, 4)]),
        (4, 2, [(0, 2), (2, 4)]),
        (2, 4, [(0, 1), (0, 1), (1, 2), (1, 2)]),
        (1, 3, [(0, 1)] * 3),
    ],
)
def test_ranks_read_their_heads_of_the_bank(total, ranks, expected):
    here = max(1, total // ranks)
    assert [(s.start, s.stop) for s in (_heads(total, here, rank, ranks) for rank in range(ranks))] == expected


def test_what_ranks_captured_is_one_entry(tmp_path):
    """Two stages of two ranks, and two that repeat a head; layers and heads come back in order."""
    true = torch.randn(2, 3, 2, 5, 4)  # keys and values, layers, heads, tokens, size
    files = []
    for first_layer, layers in ((0, (0, 1)), (2, (2,))):
        for rank, head in enumerate((1, 0, 1)):
            tensors = {f"{n}.keys": true[0, n, head : head + 1].contiguous() for n in layers}
            tensors |= {f"{n}.values": true[1, n, head : head + 1].contiguous() for n in layers}
            files.append(str(tmp_path / f"{first_layer}.{rank}"))
            save_file(tensors, files[-1], metadata={"first_head": str(head)})
    block = join_captured(spec(layers=(0, 1, 2)), files[::-1])
    assert torch.equal(block.keys, true[0]) and torch.equal(block.values, true[1])
    assert block.positions.shape == (3, 2, 5) and block.positions[2, 1].tolist() == [0, 1, 2, 3, 4]


# The pool.


def test_the_pool_is_as_large_as_its_bytes_on_every_rank():
    whole = layout_of(shape(), section(pool_gib=1), spec())
    assert (whole.page_tokens, whole.kv_heads, whole.dtype) == (16, 4, torch.bfloat16)
    assert whole.page_bytes == 4 * 4 * 16 * 2 * 32 * 2 and whole.num_pages == GIB // whole.page_bytes
    assert whole.max_pages == min(whole.num_pages, MOST_PAGES)
    halves = layout_of(shape(tp_size=2), section(pool_gib=1), spec())
    assert halves.num_pages == 2 * whole.num_pages and halves.kv_heads == 2
    stages = layout_of(shape(pp_spans=((0, 4), (4, 8))), section(pool_gib=1), spec())
    assert stages.page_bytes == whole.page_bytes * 3 // 4, "the stage with most memory layers decides for all"
    sparse = layout_of(shape(), section(pool_gib=1, pool_dtype="int8"), spec(keep_tokens=8))
    assert (sparse.page_tokens, sparse.dtype) == (8, torch.int8)
    with pytest.raises(ConfigError, match=r"mem_triton\.memory\.pool_gib: .* does not hold one page"):
        layout_of(shape(), section(pool_gib=1e-6), spec())


def test_tables_hold_what_one_step_of_a_request_that_retrieves_may_see():
    """Every chunk of the step, with 64 references of one page each, and two chunks that it only touches."""
    asked = section(pool_gib=4, retrieval={"top_k": 5, "every": 64})
    assert layout_of(shape(), asked, spec(keep_tokens=8)).max_pages == max(MOST_PAGES, (640 // 64 + 2) * 64)
    long = shape(max_step_tokens=16384, max_model_len=16384)
    assert layout_of(long, asked, spec(keep_tokens=8)).max_pages == (16384 // 64 + 2) * 64
    short = shape(max_step_tokens=16384, max_model_len=8192)
    assert layout_of(short, asked, spec(keep_tokens=8)).max_pages == (8192 // 64 + 2) * 64
