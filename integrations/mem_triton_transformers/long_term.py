"""M+'s long-term rows on a model of transformers (arXiv 2502.00592, section 3.2): chosen in each layer by the prompt.

A layer's retriever scores the rows against all tokens of the prompt, so they are known only when the layer runs: hooks
before attention choose them, and put their keys and values before the pool. Answers go on with what the prompt chose.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mem_triton.ops.reposition import RotaryEmbedding, rotate
from mem_triton.ops.reposition.given import GIVEN
from mem_triton.store.block import MemoryBlock
from mem_triton.systems.memoryllm.long_term import LongTerm, gather
from mem_triton.systems.memoryllm.retriever import RowRetriever
from mem_triton.systems.memoryllm.shape import PoolShape
from mem_triton_transformers.contexts import cache_argument
from mem_triton_transformers.explicit import CurrentReads, MemorySegment, model_ropes

STOCK = "_mem_triton_stock_inv_freq"
"""Where a rotary embedding keeps the frequencies that it was made with."""


@dataclass
class Choosing:
    """Chooses for each row of a batch. rows: the long-term memory of each, None for one that reads none.

    picks: what was chosen last, by row and layer, as indices into ``LongTerm.rows``.
    """

    model: PreTrainedModel
    shape: PoolShape
    retriever: RowRetriever
    rows: Sequence[LongTerm | None]
    reading: CurrentReads
    picks: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    _real: Tensor | None = None  # bool [B, T] of the prompt that runs; None: no prompt runs

    def __post_init__(self) -> None:
        self._plain = [list(row) for row in self.reading.rows]
        self._ropes = model_ropes(self.model, range(self.shape.layers))

    def begin(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the decoder: whether a prompt begins, and which of its tokens are no padding."""
        cache = kwargs.get(cache_argument(decoder))
        if cache is not None and cache.get_seq_length() > 0:
            self._real = None
            return
        given = kwargs.get("input_ids", args[0] if args else None)
        given = kwargs["inputs_embeds"] if given is None else given
        mask = kwargs.get("attention_mask")
        if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
            raise ValueError("attention_mask: rows are chosen by a prompt's tokens, so give the mask [B, T] of padding")
        if len(given) != len(self.rows):
            raise ValueError(f"a batch of {len(given)} rows, but pools were given for {len(self.rows)}")
        ones = torch.ones(given.shape[:2], dtype=torch.bool, device=given.device)
        self._real = ones if mask is None else mask[:, -given.shape[1] :].bool()
        self.picks.clear()
        self.reading.set(self._plain)

    def choose(self, layer: int, attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before a layer's attention: choose, and let it read what was chosen."""
        if self._real is None:
            return
        hidden = kwargs.get("hidden_states", args[0] if args else None)  # behind the layer's first norm
        for b, long in enumerate(self.rows):
            if long is not None:
                queries = self.retriever.queries(layer, hidden[b][self._real[b]])
                self.reading.add(b, self._segment(b, layer, long, queries))

    def _segment(self, b: int, layer: int, long: LongTerm, queries: Tensor) -> MemorySegment:
        shape, read = self.shape, self.shape.long_term.read
        chosen = self.picks[b, layer] = long.chosen(layer, queries, read)
        module, (content,) = self.model.get_decoder().layers[layer], gather(long.rows(layer), chosen)
        keys, values = project(module, content.to(queries))
        where = torch.arange(-(shape.rows + read), -shape.rows, device=keys.device)
        keys = rotate(keys, where, self._ropes[layer])
        block = MemoryBlock(keys[None], values[None], where.int().expand(1, len(keys), -1))
        return MemorySegment(block, (layer,))


def project(layer: nn.Module, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Keys before RoPE and values [Hkv, n, D] that a layer makes of its input rows [n, d]."""
    attention, given = layer.self_attn, layer.input_layernorm(rows)
    shaped = (linear(given).view(len(rows), -1, attention.head_dim) for linear in (attention.k_proj, attention.v_proj))
    keys, values = (part.transpose(0, 1) for part in shaped)
    return keys, values


@contextmanager
def choosing(
    model: PreTrainedModel,
    shape: PoolShape,
    retriever: RowRetriever,
    rows: Sequence[LongTerm | None],
    reading: CurrentReads,
) -> Iterator[Choosing]:
    """Within this context prompts choose long-term rows; ``reading`` has the pools that stand behind them."""
    decoder = model.get_decoder()
    chooser = Choosing(model, shape, retriever, rows, reading)
    handles = [decoder.register_forward_pre_hook(chooser.begin, with_kwargs=True)]
    try:
        for index, layer in enumerate(decoder.layers):
            hook = partial(chooser.choose, index)
            handles.append(layer.self_attn.register_forward_pre_hook(hook, with_kwargs=True))
        yield chooser
    finally:
        for handle in handles:
            handle.remove()


def use_frequencies(model: PreTrainedModel) -> None:
    """Turn by the frequencies that the model's configuration lists, where it lists some."""
    config, rotary = model.config.to_dict(), model.get_decoder().rotary_emb
    if config.get(GIVEN) is None:
        return
    (rope,) = model_ropes(model, [0])
    if getattr(rotary, STOCK, None) is None:
        setattr(rotary, STOCK, rotary.inv_freq)
    rotary.inv_freq = _as_tensor(rope, rotary.inv_freq)


def stock_frequencies(model: PreTrainedModel) -> None:
    """Take ``use_frequencies`` back; harmless where nothing was changed."""
    rotary = model.get_decoder().rotary_emb
    if (stock := getattr(rotary, STOCK, None)) is not None:
        rotary.inv_freq = stock
        delattr(rotary, STOCK)


def _as_tensor(rope: RotaryEmbedding, like: Tensor) -> Tensor:
    return torch.tensor(rope.inv_freq, dtype=like.dtype, device=like.device)
