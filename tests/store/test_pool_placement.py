"""Where keys lie when they are read: relative to a context that starts at 0, as if their text had come before it."""

from __future__ import annotations

import pytest
import torch

from mem_triton.ops.reposition import RotaryEmbedding, rope_from_config, rotate
from mem_triton.store.block import MemoryBlock
from mem_triton.store.pool import placement
from mem_triton.store.pool.placement import place, place_sink

ROPES = [
    rope_from_config({"model_type": "llama", "head_dim": 16, "rope_theta": 10000.0}),
    RotaryEmbedding(0),  # a layer without positions
]


def block(tokens: int, positions: torch.Tensor | None = None) -> MemoryBlock:
    keys, values = torch.randn(2, 2, 3, tokens, 16, generator=torch.Generator().manual_seed(tokens)).double()
    dense = torch.arange(tokens, dtype=torch.int32).expand(2, 3, tokens)
    return MemoryBlock(keys, values, dense if positions is None else positions)


def logits(query: torch.Tensor, at: int, keys: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """A query at ``at`` against keys before RoPE at ``positions``, from the definition of RoPE."""
    angle = (positions.double() - at)[..., None] * torch.tensor(ROPES[0].inv_freq, dtype=torch.float64)
    x, y = keys.chunk(2, -1)
    turned = torch.cat([x * angle.cos() - y * angle.sin(), y * angle.cos() + x * angle.sin()], -1)
    return turned @ query


def read_at(at: int, placed: MemoryBlock) -> tuple[torch.Tensor, torch.Tensor]:
    """A query, and its logits from position ``at`` of the context against the placed keys of the first layer."""
    query = torch.randn(16, generator=torch.Generator().manual_seed(1)).double()
    return query, placed.keys[0] @ rotate(query, torch.tensor(at), ROPES[0])


@pytest.mark.parametrize("at", [0, 5, 700])
def test_a_prefix_is_read_as_the_text_just_before_the_context(at):
    """As in one long context: the text at 0 ... T - 1, the query T + at."""
    b = block(9)
    placed = place(b, ROPES, "prefix", reference_tokens=128)
    assert placed.positions[0, 0].tolist() == list(range(-9, 0))
    query, got = read_at(at, placed)
    assert torch.allclose(got, logits(query, 9 + at, b.keys[0], b.positions[0]), atol=1e-9)


@pytest.mark.parametrize("at", [0, 5, 700])
def test_references_lie_side_by_side_and_each_head_where_its_own_tokens_stood(at):
    kept = torch.tensor([[[0, 5, 127], [1, 2, 3], [7, 8, 100]]] * 2, dtype=torch.int32)
    b = block(3, kept)
    placed = place(b, ROPES, "memory3", reference_tokens=128)
    assert torch.equal(placed.positions, kept - 128) and placed.positions.max() == -1
    query, got = read_at(at, placed)
    assert torch.allclose(got, logits(query, 128 + at, b.keys[0], kept[0]), atol=1e-9)


def test_the_constant_prefix_lies_before_all_references():
    placed = place_sink(block(4), ROPES, reference_tokens=128)
    assert placed.positions[1, 2].tolist() == [-132, -131, -130, -129]


def test_values_and_layers_without_positions_stay_bit_for_bit():
    b = block(6)
    for placed in (place(b, ROPES, "prefix", 128), place(b, ROPES, "memory3", 128), place_sink(b, ROPES, 128)):
        assert torch.equal(placed.values, b.values) and torch.equal(placed.keys[1], b.keys[1])
        assert not torch.equal(placed.keys[0], b.keys[0])


def test_a_missing_rope_is_an_error():
    with pytest.raises(ValueError):
        place(block(2), ROPES[:1], "prefix", 128)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dense", [True, False])
def test_layers_that_are_turned_together_get_the_bits_of_each_alone(dtype, dense, monkeypatch):
    """Runs of layers that turn alike, others between them, and layers without positions."""
    other = rope_from_config({"model_type": "llama", "head_dim": 16, "rope_theta": 500.0})
    ropes = [ROPES[0], ROPES[0], other, ROPES[1], ROPES[0], other, ROPES[0], ROPES[0]]
    g = torch.Generator().manual_seed(3)
    keys, values = torch.randn(2, 8, 3, 40, 16, generator=g).to(dtype)
    where = torch.arange(40).expand(8, 3, 40) if dense else torch.randint(0, 50, (8, 3, 40), generator=g)
    b = MemoryBlock(keys, values, where.int())
    for size in (1, 3 * 40 * 16 * 4 * 2, 1 << 30):  # one layer, two, all
        monkeypatch.setattr(placement, "CHUNK_BYTES", size)
        placed = place(b, ropes, "memory3", reference_tokens=64)
        for layer, rope in enumerate(ropes):
            assert torch.equal(placed.keys[layer], rotate(keys[layer], b.positions[layer] - 64, rope))
