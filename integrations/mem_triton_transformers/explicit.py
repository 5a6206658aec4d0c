"""Explicit memory read by a model that transformers runs: one softmax over [sink | memory | context].

The plain way to do it: the memory's keys are put before those of the context, with a mask that says which queries see
them, and the model's own attention does the rest. Slow and simple, so it is the oracle for the engines.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mem_triton.compat import require
from mem_triton.ops.reposition import RotaryEmbedding, rope_from_config
from mem_triton.store.block import MemoryBlock
from mem_triton.store.pool.placement import place, place_sink, tempered
from mem_triton.store.pool.plan import FOREVER, Attachment
from mem_triton_transformers.contexts import cache_argument, cache_of
from mem_triton_transformers.encode import attention_layers

if TYPE_CHECKING:
    from mem_triton.store.bank import Bank

READING = "_mem_triton_reading"
NAME = "mem_triton_"
"""Stands before the attention implementation that memory is added to: ``mem_triton_sdpa``, ``mem_triton_eager``."""


@dataclass(frozen=True)
class MemorySegment:
    """One memory in one batch row.

    block: placed, that is rotated to its (negative) positions. layers: the model's layers that the block has, in order.
    first, end: the query positions [first, end) that attend to it.
    """

    block: MemoryBlock
    layers: tuple[int, ...]
    first: int = 0
    end: int = FOREVER


@dataclass
class CurrentReads:
    """What a model reads at present: ``rows[b]`` are batch row b's segments. May be exchanged between forwards."""

    base: Callable[..., Any]  # the attention function that memory is added to
    rows: list[list[MemorySegment]] = field(default_factory=list)
    _layers: dict[int, _LayerSegments | None] = field(default_factory=dict)

    def set(self, rows: Sequence[Sequence[MemorySegment]]) -> None:
        """Read these segments from the next forward on."""
        for b, row in enumerate(rows):
            for segment in row:
                if segment.block.keys.shape[0] != len(segment.layers):
                    raise ValueError(
                        f"rows[{b}]: a block of {segment.block.keys.shape[0]} layers for {len(segment.layers)} layers"
                    )
        self.rows, self._layers = [list(row) for row in rows], {}

    def add(self, row: int, segment: MemorySegment) -> None:
        """Let one row read another segment, too; in layers that come."""
        self.rows[row].append(segment)
        for layer in segment.layers:
            self._layers.pop(layer, None)

    def layer(self, index: int) -> _LayerSegments | None:
        """Layer ``index``'s memory, None if no row has any there."""
        if index not in self._layers:
            self._layers[index] = _layer_segments(self.rows, index)
        return self._layers[index]


@dataclass(frozen=True)
class _LayerSegments:
    keys: Tensor  # [B, Hkv, M, D], rows padded to the longest
    values: Tensor
    first: Tensor  # int64 [B, M], query positions [first, end) see the key; padding: first == end
    end: Tensor


def _layer_segments(rows: list[list[MemorySegment]], layer: int) -> _LayerSegments | None:
    parts = [[(s, s.layers.index(layer)) for s in row if layer in s.layers and s.block.tokens] for row in rows]
    longest = max((sum(s.block.tokens for s, _ in row) for row in parts), default=0)
    if longest == 0:
        return None
    sample = next(s for row in parts for s, _ in row).block.keys
    keys = sample.new_zeros(len(rows), sample.shape[1], longest, sample.shape[3])
    values = torch.zeros_like(keys)
    first = torch.zeros(len(rows), longest, dtype=torch.int64, device=sample.device)
    end = torch.zeros_like(first)
    for b, row in enumerate(parts):
        at = 0
        for segment, i in row:
            to = at + segment.block.tokens
            keys[b, :, at:to], values[b, :, at:to] = segment.block.keys[i], segment.block.values[i]
            first[b, at:to], end[b, at:to] = segment.first, segment.end
            at = to
    return _LayerSegments(keys, values, first, end)


@contextmanager
def read_memory(model: PreTrainedModel, rows: Sequence[Sequence[MemorySegment]]) -> Iterator[CurrentReads]:
    """Within this context ``model`` attends to ``rows[b]`` in batch row b, in forward() and in generate().

    One softmax over the segments' keys and the context's causal ones (Memory³, arXiv 2407.01178, section 3.1); a layer
    in which no row has memory runs exactly as before. Query positions are the model's ``position_ids``, so left padding
    is fine. Beam search is not: rows are those of the call. Raises ValueError for attention implementations other than
    eager and sdpa, for a model that reads already, and, in the forward, for a batch of another size.

    Example::

        with read_memory(model, [[MemorySegment(place(block, ropes, "memory3", 128), layers)]]):
            model.generate(ids, max_new_tokens=20)
    """
    require("transformers")
    attentions = attention_layers(model.get_decoder() if hasattr(model, "get_decoder") else model)
    if any(READING in attention.__dict__ for attention in attentions):
        raise ValueError("this model reads memory already; exchange it with reading.set(rows)")
    implementation = model.config._attn_implementation
    if implementation not in ("eager", "sdpa"):
        raise ValueError(
            f"attn_implementation={implementation!r}: memory is added to eager and sdpa attention; "
            'call model.set_attn_implementation("sdpa") first'
        )
    reading = CurrentReads(_stock_attention(attentions[0], implementation))
    reading.set(rows)
    AttentionInterface.register(NAME + implementation, attend)
    AttentionMaskInterface.register(NAME + implementation, ALL_MASK_ATTENTION_FUNCTIONS[implementation])
    for attention in attentions:
        attention.__dict__[READING] = reading
    model.set_attn_implementation(NAME + implementation)
    try:
        yield reading
    finally:
        model.set_attn_implementation(implementation)
        for attention in attentions:
            del attention.__dict__[READING]


def _stock_attention(attention: nn.Module, implementation: str) -> Callable[..., Any]:
    if implementation in ALL_ATTENTION_FUNCTIONS:
        return ALL_ATTENTION_FUNCTIONS[implementation]
    return inspect.unwrap(type(attention).forward).__globals__[
        "eager_attention_forward"
    ]  # eager is each model file's own


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """The attention function that transformers calls. query: [B, Hq, T, D]; key, value: [B, Hkv, S, D]."""
    reading: CurrentReads = module.__dict__[READING]
    memory = reading.layer(module.layer_idx)
    if memory is None:
        return reading.base(module, query, key, value, attention_mask, **kwargs)
    if query.shape[0] != len(reading.rows):
        raise ValueError(f"a batch of {query.shape[0]} rows, but memory was given for {len(reading.rows)}")
    positions = _query_positions(query, key, kwargs)  # [B, T]
    seen = (memory.first[:, None] <= positions[..., None]) & (positions[..., None] < memory.end[:, None])  # [B, T, M]
    mask = torch.cat(
        [_as_mask(seen[:, None], attention_mask, query.dtype), _context_mask(attention_mask, query, key)], -1
    )
    key = torch.cat([memory.keys.to(key), key], dim=2)
    value = torch.cat([memory.values.to(value), value], dim=2)
    return reading.base(module, query, key, value, mask, **kwargs)


def _query_positions(query: Tensor, key: Tensor, kwargs: dict[str, Any]) -> Tensor:
    positions = kwargs.get("position_ids")
    if positions is None:
        raise ValueError(
            "this model does not tell its attention the position_ids, so nothing says what each query sees"
        )
    return positions.expand(query.shape[0], query.shape[2])


def _as_mask(seen: Tensor, like: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``seen`` in the form of the stock mask: boolean, or added to the logits."""
    if like is None or like.dtype == torch.bool:
        return seen
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)


def _context_mask(mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor:
    """The stock mask [B, 1, T, S]; None means causal."""
    batch, tokens, length = query.shape[0], query.shape[2], key.shape[2]
    if mask is None:
        ones = torch.ones(tokens, length, dtype=torch.bool, device=query.device)
        return ones.tril(length - tokens).expand(batch, 1, tokens, length)
    return mask.expand(batch, 1, tokens, mask.shape[-1])


def model_ropes(model: PreTrainedModel, layers: Sequence[int]) -> list[RotaryEmbedding]:
    """RoPE of each of the layers."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    config = decoder.config.to_dict()
    return [rope_from_config(config, layer) for layer in layers]


def segments_of(model: PreTrainedModel, bank: Bank, plan: Sequence[Attachment]) -> list[MemorySegment]:
    """Load a plan's entries, placed; the bank's constant prefix first, unless the plan is empty.

    Of a bank of kind "parallel" that is the head of a chat, which the prompt does not repeat.
    """
    if not plan:
        return []
    spec = bank.spec
    blocks = {ref: bank.load(ref) for ref in dict.fromkeys(a.ref for a in plan)}
    behind = max(block.tokens for block in blocks.values()) if spec.kind == "parallel" else spec.reference_tokens
    everywhere = tuple(range(model.config.get_text_config().num_hidden_layers))
    segments = []
    if (sink := bank.sink()) is not None:
        placed = place_sink(sink, model_ropes(model, everywhere), behind)
        segments.append(MemorySegment(_on(model, placed), everywhere))
    ropes = model_ropes(model, spec.layers)
    placed = {
        ref: _on(model, tempered(place(block, ropes, spec.kind, spec.reference_tokens), spec.temperature))
        for ref, block in blocks.items()
    }
    return segments + [MemorySegment(placed[a.ref], tuple(spec.layers), a.first, a.end) for a in plan]


def _on(model: PreTrainedModel, block: MemoryBlock) -> MemoryBlock:
    return MemoryBlock(block.keys.to(model.device), block.values.to(model.device), block.positions)


@contextmanager
def read_plans(model: PreTrainedModel, bank: Bank, plans: Sequence[Sequence[Attachment]]) -> Iterator[CurrentReads]:
    """Attach what ``plans[b]`` names to batch row b, out of a bank, see ``read_memory``.

    Example::

        with read_plans(model, bank, [retriever.plan(prompt_ids)]):
            model.generate(torch.tensor([prompt_ids]), max_new_tokens=64)
    """
    with read_memory(model, [segments_of(model, bank, plan) for plan in plans]) as reading:
        yield reading


@torch.inference_mode()
def generate_with_retrieval(
    model: PreTrainedModel, bank: Bank, retriever: Any, prompt_ids: Sequence[int], max_new_tokens: int, **options: Any
) -> tuple[list[int], tuple[Attachment, ...]]:
    """Greedy tokens of one request whose references are refreshed while it answers, and its whole plan (Memory³, arXiv
    2407.01178, section 3).

    retriever: a ``mem_triton.write.Retriever``; options go to its ``plan`` and ``extend`` (top_k, tenant). Stops only
    after ``max_new_tokens``.
    """
    plan = tuple(retriever.plan(prompt_ids, refreshes=True, **options))
    ids, generated, cache = torch.tensor([list(prompt_ids)], device=model.device), [], None
    with read_plans(model, bank, [plan]) as reading:
        while len(generated) < max_new_tokens:
            if generated and len(generated) % retriever.every == 0:
                plan = retriever.extend(plan, len(prompt_ids), generated, **options)
                reading.set([segments_of(model, bank, plan)])
            out = model(input_ids=ids, use_cache=True, **{cache_argument(model): cache})
            cache, ids = cache_of(out), out.logits[:, -1:].argmax(-1)
            generated.append(int(ids))
    return generated, plan
