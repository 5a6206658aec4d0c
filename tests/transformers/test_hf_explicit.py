"""Explicit memory in transformers: what is encoded, and the one softmax that reads it, against runs of the text."""

from __future__ import annotations

import pytest
import torch

from mem_triton.store.block import MemoryBlock
from mem_triton.store.pool.placement import place, place_sink
from mem_triton.store.pool.plan import FOREVER
from mem_triton.write import EncodedText, dense, sparsify
from mem_triton_transformers import MemorySegment, TransformersEncoder, apply_mem_triton, read_memory
from mem_triton_transformers.encode import UnsupportedModelError
from mem_triton_transformers.explicit import model_ropes
from tests.support.models import FAMILIES, VOCAB, random_adapter, tiny_model

TOLERANCE = 2e-5  # relative to the largest logit, fp32


def tokens(count: int, seed: int = 0) -> list[int]:
    return torch.randint(4, VOCAB, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def logits(model, *rows: list[int], **options) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.tensor(rows), **options).logits


def close(a: torch.Tensor, b: torch.Tensor, scale: float = 1.0) -> bool:
    return float((a - b).abs().max()) <= scale * TOLERANCE * float(b.abs().max())


def segment(model, ids, layers, *, at: int = 0, prefix=(), keep=None, first=0, end=FOREVER) -> MemorySegment:
    """``ids`` encoded alone, placed as a reference of ``at`` tokens (0: of its own length)."""
    encoder = TransformersEncoder(model)
    text = encoder.encode([ids], layers=layers, prefix_ids=prefix)[0]
    block = dense(text) if keep is None else sparsify(text, keep, scale=encoder.scale)
    return MemorySegment(place(block, model_ropes(model, layers), "memory3", at or len(ids)), tuple(layers), first, end)


# --- encoding ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_batch_encodes_as_each_text_alone(family, implementation):
    encoder = TransformersEncoder(tiny_model(family, layers=3, attn_implementation=implementation))
    texts = [tokens(n, seed=n) for n in (5, 33, 1, 17)]
    alone = encoder.encode(texts, layers=[0, 2])
    batch = encoder.encode(texts, layers=[0, 2], batch_size=3)
    for ids, a, b in zip(texts, alone, batch, strict=True):
        assert a.tokens == b.tokens == len(ids)
        for x, y in ((a.queries, b.queries), (a.keys, b.keys), (a.values, b.values)):
            assert x.shape == y.shape and close(x, y)
    assert torch.equal(encoder.encode([texts[1]], layers=[0, 2])[0].keys, alone[1].keys)


def test_only_the_layers_needed_are_run():
    model = tiny_model(layers=4)
    ran = []
    for i, layer in enumerate(model.model.layers):
        layer.register_forward_hook(lambda *_, i=i: ran.append(i))
    encoder = TransformersEncoder(model)
    encoder.encode([tokens(8)], layers=[0, 1])
    ran.clear()
    text = encoder.encode([tokens(8)], layers=[0, 1])[0]
    assert ran == [0]  # layer 1 is left behind its projections
    everywhere = encoder.encode([tokens(8)])[0]
    assert torch.equal(everywhere.keys[:2], text.keys) and torch.equal(everywhere.queries[:2], text.queries)


def test_the_prefix_is_seen_and_not_returned():
    encoder = TransformersEncoder(tiny_model(layers=2))
    prefix, ids = tokens(4, seed=9), tokens(6)
    after = encoder.encode([ids], prefix_ids=prefix)[0]
    together = encoder.encode([prefix + ids])[0]
    assert after.tokens == 6 and torch.equal(after.keys, together.keys[:, :, 4:])
    assert not close(after.keys[1], encoder.encode([ids])[0].keys[1])


def test_encoding_leaves_the_model_as_it_was():
    model = tiny_model()
    before = logits(model, tokens(9))
    TransformersEncoder(model).encode([tokens(5)])
    assert torch.equal(before, logits(model, tokens(9)))
    assert not any(module._forward_hooks for module in model.modules())


def test_a_model_whose_keys_are_something_else_is_refused():
    """Negative control of the check: a model that turns its keys otherwise than its config says."""
    model = tiny_model()
    original = model.model.rotary_emb.forward
    model.model.rotary_emb.forward = lambda x, position_ids: original(x, position_ids + 1)
    with pytest.raises(UnsupportedModelError, match=r"layer 0 .* KV cache"):
        TransformersEncoder(model).encode([tokens(5)])


def test_errors_name_what_is_wrong():
    model = tiny_model()
    encoder = TransformersEncoder(model)
    with pytest.raises(ValueError, match=r"token_ids\[1\] is empty"):
        encoder.encode([tokens(2), []])
    with pytest.raises(ValueError, match="4097 tokens, the model takes 4096"):
        encoder.encode([tokens(4097)])
    for layers in ([2], [1, 0], [], [-1]):
        with pytest.raises(ValueError, match=r"layers must ascend within 0\.\.1"):
            encoder.encode([tokens(2)], layers=layers)
    apply_mem_triton(model, {"delta": {"adapter": random_adapter(model)}})
    with pytest.raises(ValueError, match="remove_mem_triton"):
        encoder.encode([tokens(2)])


# --- reading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_b1_without_memory_it_is_the_base_model(family, implementation):
    model = tiny_model(family, attn_implementation=implementation)
    prompt = tokens(20)
    stock = logits(model, prompt)
    answer = model.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False)
    with read_memory(model, [[]]):
        assert torch.equal(stock, logits(model, prompt))
        assert torch.equal(answer, model.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False))
    assert model.config._attn_implementation == implementation
    assert torch.equal(stock, logits(model, prompt))


def test_b1_with_the_constant_prefix_alone_it_is_the_base_model_given_those_tokens():
    model, sink, prompt = tiny_model(layers=3), tokens(4, seed=5), tokens(20)
    block = dense(TransformersEncoder(model).encode([sink])[0])
    placed = place_sink(block, model_ropes(model, range(3)), reference_tokens=0)
    with read_memory(model, [[MemorySegment(placed, (0, 1, 2))]]):
        assert close(logits(model, prompt), logits_of_stock(model, sink + prompt)[:, 4:])


def logits_of_stock(model, ids: list[int], **options) -> torch.Tensor:
    """In the middle of a reading: a copy of the same model that reads nothing."""
    stock = type(model)(model.config.__class__.from_dict(model.config.to_dict()))
    stock.set_attn_implementation("eager")
    stock.load_state_dict(model.state_dict())
    return logits(stock.eval(), ids, **options)


def test_b4_the_order_of_references_is_irrelevant():
    model, prompt = tiny_model(layers=4), tokens(30)
    references = [segment(model, tokens(n, seed=n), [0, 1], at=32, keep=8) for n in (32, 20, 9, 3, 31)]
    with read_memory(model, [references]) as reading:
        one = logits(model, prompt)
        reading.set([references[::-1]])
        other = logits(model, prompt)
        reading.set([references[:4]])
        fewer = logits(model, prompt)
    assert float((one - other).abs().max()) <= 1e-6 * float(one.abs().max())
    assert not close(one, fewer, 100), "the fifth reference is not read at all"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_b5_all_tokens_in_all_layers_are_the_same_as_the_text(family, implementation):
    model = tiny_model(family, layers=3, attn_implementation=implementation)
    reference, prompt = tokens(17, seed=1), tokens(20)
    text = logits(model, reference + prompt)[:, 17:]
    with read_memory(model, [[segment(model, reference, range(3))]]):
        assert close(logits(model, prompt), text)
    assert not close(logits(model, prompt), text, 100), "the reference makes no difference"


@pytest.mark.parametrize("family", FAMILIES)
def test_b5_all_tokens_in_some_layers_are_a_prefix_of_those_layers(family):
    """The oracle: the stock model over reference and prompt, where the layers without memory mask the reference off."""
    model, (memory, total), gap = tiny_model(family, layers=4), (2, 4), 7
    reference, prompt = tokens(17, seed=1), tokens(20)
    with read_memory(model, [[segment(model, reference, range(memory), at=17 + gap)]]):
        ours = logits(model, prompt)

    def blind(module, args, kwargs):
        mask = kwargs["attention_mask"].clone()
        mask[..., 17:, :17] = torch.finfo(mask.dtype).min
        return args, {**kwargs, "attention_mask": mask}

    for layer in model.model.layers[memory:total]:
        layer.self_attn.register_forward_pre_hook(blind, with_kwargs=True)
    positions = torch.tensor([[*range(17), *range(17 + gap, 37 + gap)]])
    assert close(ours, logits(model, reference + prompt, position_ids=positions)[:, 17:])


def test_b5_the_constant_prefix_stands_before_the_references():
    model, sink, reference, prompt = tiny_model(layers=3), tokens(4, seed=5), tokens(10, seed=1), tokens(20)
    block = dense(TransformersEncoder(model).encode([sink])[0])
    segments = [
        MemorySegment(place_sink(block, model_ropes(model, range(3)), 10), (0, 1, 2)),
        segment(model, reference, range(3), prefix=sink),
    ]
    text = logits(model, sink + reference + prompt)[:, 14:]
    with read_memory(model, [segments]):
        assert close(logits(model, prompt), text)


def test_b7_a_chunk_of_the_prompt_is_not_influenced_by_another_chunks_memory():
    """Every later layer reads what earlier chunks have become, so the statement is one about a layer.

    In the first layer, whose inputs no memory has touched, chunk c's attention is bit for bit the same whatever chunk
    c' reads. In the whole model that holds for all chunks before c'.
    """
    model, prompt, layers = tiny_model(layers=3), tokens(48), [0, 1]
    one, other = (segment(model, tokens(16, seed=s), layers, first=16, end=32) for s in (1, 2))
    seen: list[torch.Tensor] = []
    model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with read_memory(model, [[one]]) as reading:
        first = logits(model, prompt)
        reading.set([[other]])
        second = logits(model, prompt)
    in_layer = (seen[0] != seen[1]).any(-1)[0]
    assert not in_layer[:16].any() and in_layer[16:32].all() and not in_layer[32:].any()
    assert torch.equal(first[:, :16], second[:, :16])
    assert not close(first[:, 16:32], second[:, 16:32], 100) and not close(first[:, 32:], second[:, 32:])


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_rows_of_a_padded_batch_read_their_own_memory(implementation):
    model = tiny_model(layers=3, attn_implementation=implementation)
    long, short = tokens(20), tokens(12, seed=3)
    mine = [segment(model, tokens(9, seed=7), [0, 1], first=4, end=15), segment(model, tokens(6, seed=8), [0, 1])]
    alone = []
    for prompt, row in ((long, mine), (short, []), (short, mine[:1])):
        with read_memory(model, [row]):
            alone.append(model.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False)[0, len(prompt) :])
    padded = torch.tensor([long, [0] * 8 + short, [0] * 8 + short])
    mask = torch.tensor([[1] * 20, [0] * 8 + [1] * 12, [0] * 8 + [1] * 12])
    with read_memory(model, [mine, [], mine[:1]]):
        batch = model.generate(padded, attention_mask=mask, max_new_tokens=8, do_sample=False)[:, 20:]
    assert [row.tolist() for row in batch] == [row.tolist() for row in alone]
    assert alone[1].tolist() != alone[2].tolist(), "memory changes nothing"


def test_generating_step_by_step_reads_as_one_forward_does():
    model, prompt = tiny_model(layers=3), tokens(20)
    rows = [[segment(model, tokens(9, seed=7), [0, 1], first=10, end=22), segment(model, tokens(6, seed=8), [1])]]
    with read_memory(model, rows):
        ids = model.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False)[0].tolist()
        assert logits(model, ids)[0, 19:-1].argmax(-1).tolist() == ids[20:]


def test_reading_refuses_what_it_cannot_do():
    model = tiny_model()
    row = [segment(model, tokens(5), [0])]
    with read_memory(model, [row]):
        with pytest.raises(ValueError, match="a batch of 2 rows, but memory was given for 1"):
            logits(model, tokens(4), tokens(4))
        with pytest.raises(ValueError, match="reads memory already"), read_memory(model, [row]):
            pass
    with (
        pytest.raises(ValueError, match=r"rows\[0\]: a block of 1 layers for 2"),
        read_memory(model, [[MemorySegment(row[0].block, (0, 1))]]),
    ):
        pass
    model.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(ValueError, match="flash_attention_2"), read_memory(model, [row]):
        pass


def test_a_reading_that_fails_ends():
    model, prompt = tiny_model(), tokens(6)
    stock = logits(model, prompt)
    with pytest.raises(RuntimeError, match="mine"), read_memory(model, [[segment(model, tokens(5), [0])]]):
        raise RuntimeError("mine")
    assert torch.equal(stock, logits(model, prompt))


# --- sparse blocks ----------------------------------------------------------------------------------------------------


def test_sparsify_keeps_what_is_attended_to_most_and_never_what_is_invalid():
    encoder = TransformersEncoder(tiny_model(layers=2))
    text = encoder.encode([tokens(20)])[0]
    valid = [i not in (0, 3, 19) for i in range(20)]
    block = sparsify(text, 8, scale=encoder.scale, valid=valid)
    assert block.keys.shape == (2, 2, 8, 32) and block.positions.dtype == torch.int32
    for layer in range(2):
        q, k = text.queries[layer].double(), text.keys[layer].double()  # [T, 4, D], [2, T, D]
        for head in range(2):
            group = q[valid][:, 2 * head : 2 * head + 2]
            weights = torch.einsum("qgd,td->gqt", group, k[head]) * encoder.scale
            weights[..., ~torch.tensor(valid)] = -torch.inf
            best = weights.softmax(-1).sum((0, 1)).topk(8).indices.sort().values
            kept = block.positions[layer, head]
            assert kept.tolist() == best.tolist()
            assert torch.equal(block.keys[layer, head], text.keys[layer, head, kept])
            assert torch.equal(block.values[layer, head], text.values[layer, head, kept])


def test_b3_short_texts_keep_what_they_have():
    encoder = TransformersEncoder(tiny_model(layers=2))
    text = encoder.encode([tokens(5)])[0]
    assert torch.equal(sparsify(text, 8, scale=encoder.scale).keys, text.keys)
    block = sparsify(text, 8, scale=encoder.scale, valid=[False, True, False, True, True])
    assert block.positions.tolist() == [[[1, 3, 4]] * 2] * 2
    assert sparsify(text, None, scale=1.0, valid=[False] + [True] * 4).positions[0, 0].tolist() == [1, 2, 3, 4]
    with pytest.raises(ValueError, match="special tokens alone"):
        sparsify(text, 8, scale=1.0, valid=[False] * 5)
    with pytest.raises(ValueError, match="4 flags for 5 tokens"):
        sparsify(text, 8, scale=1.0, valid=[True] * 4)


def test_a_slice_of_an_encoded_text():
    text = EncodedText(torch.randn(1, 6, 4, 2), torch.randn(1, 2, 6, 2), torch.randn(1, 2, 6, 2))
    part = text.slice(2, 5)
    assert part.tokens == 3 and isinstance(dense(part), MemoryBlock)
    assert torch.equal(part.queries, text.queries[:, 2:5]) and torch.equal(part.keys, text.keys[:, :, 2:5])
