"""Texts in, their attention inputs out: the write side of explicit memory, on a model that transformers runs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedModel

from mem_triton.compat import require
from mem_triton.ops.reposition import RotaryEmbedding, rope_from_config, rotate
from mem_triton.write.encoder import EncodedText
from mem_triton_transformers.attach import ATTRIBUTE
from mem_triton_transformers.contexts import cache_argument

GATE_TOKENS = 32
"""Length of the text on which a model is checked before anything of it is stored."""


class UnsupportedModelError(ValueError):
    """A model whose keys before RoPE cannot be read off its modules."""


class TransformersEncoder:
    """Encodes texts alone, by an ordinary causal forward (Memory³, arXiv 2407.01178, section 3.2).

    model: a causal LM or its decoder with separate q, k and v projections (Qwen3, Qwen2, Llama, Mistral and SmolLM3 are
    tested). tokenizer: kept for callers. Queries and keys are read by hooks behind q/k-norm: nothing is un-rotated, no
    bit is lost. Before a layer's first use the model is checked once: its keys, rotated by ``ops.reposition``, must be
    those in its own KV cache.
    Raises UnsupportedModelError if they are not, or if the model has no such projections; ValueError for a model with
    δ-mem attached; and what ``rope_from_config`` raises for a RoPE whose keys depend on the text's length.

    Example::

        encoder = TransformersEncoder(model)
        text, = encoder.encode([tokenizer.encode("The locker of Mara Stone is falcon.")], layers=range(18))
        text.keys.shape                              # [18, Hkv, T, D]
    """

    def __init__(self, model: PreTrainedModel, tokenizer: Any = None) -> None:
        require("transformers")
        self.model, self.tokenizer = model, tokenizer
        self.decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
        self.attentions = attention_layers(self.decoder)
        self.num_layers = len(self.attentions)
        self.scale: float = getattr(self.attentions[0], "scaling", self.attentions[0].head_dim ** -0.5)
        self.max_tokens: int | None = getattr(self.config, "max_position_embeddings", None)
        self._checked: set[int] = set()

    @classmethod
    def load(cls, model: str, *, dtype: str = "auto", device: str | None = None) -> TransformersEncoder:
        """Load it from a folder or Hugging Face id. device: None chooses the GPU if there is one.

        Raises ValueError for a tokenizer whose longest text is no number: transformers would fail at the first text.
        """
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).to(device).eval()
        tokenizer = AutoTokenizer.from_pretrained(model)
        if not isinstance(longest := tokenizer.model_max_length, int | float):
            raise ValueError(f"{model}: tokenizer_config.json: model_max_length is {longest!r}, expected a number")
        return cls(loaded, tokenizer)

    @property
    def config(self) -> Any:
        """The decoder's configuration."""
        return self.decoder.config

    def rope(self, layer: int) -> RotaryEmbedding:
        """RoPE of one layer."""
        return rope_from_config(self.config.to_dict(), layer)

    def encode(
        self,
        token_ids: Sequence[Sequence[int]],
        *,
        layers: Sequence[int] | None = None,
        prefix_ids: Sequence[int] | None = None,
        batch_size: int = 1,
    ) -> list[EncodedText]:
        """Encode every text alone, after ``prefix_ids`` if given, which is not in the result.

        layers: None for all; those behind the last one are not run. batch_size: texts that share a forward, padded on
        the right. The same text gives the same bits only in batches of the same shape, so a batch of 1 makes a bank
        independent of what was written with what. Raises ValueError for an empty text, or one longer than the model.
        """
        layers = list(range(self.num_layers)) if layers is None else [int(layer) for layer in layers]
        prefix = [int(token) for token in prefix_ids or ()]
        texts = [prefix + [int(token) for token in ids] for ids in token_ids]
        self._check_arguments(texts, layers, len(prefix), batch_size)
        self._check_model(texts, layers)
        order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))  # texts of one length together: less padding
        encoded: dict[int, EncodedText] = {}
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            longest = len(texts[chosen[0]])
            rows = [texts[i] + [0] * (longest - len(texts[i])) for i in chosen]  # causal: what follows is not seen
            captured = self._forward(rows, layers)
            for row, i in enumerate(chosen):
                encoded[i] = _cut(captured, row, len(prefix), len(texts[i]))
        return [encoded[i] for i in range(len(texts))]

    def _check_arguments(self, texts: list[list[int]], layers: list[int], prefix: int, batch_size: int) -> None:
        if getattr(self.model, ATTRIBUTE, None) is not None:
            raise ValueError(
                "this model has δ-mem attached, which would change what is stored: remove_mem_triton(model)"
            )
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if not layers or sorted(set(layers)) != layers or layers[0] < 0 or layers[-1] >= self.num_layers:
            raise ValueError(f"layers must ascend within 0..{self.num_layers - 1}, got {layers}")
        for i, text in enumerate(texts):
            if len(text) == prefix:
                raise ValueError(f"token_ids[{i}] is empty")
            if self.max_tokens is not None and len(text) > self.max_tokens:
                raise ValueError(
                    f"token_ids[{i}] and its prefix are {len(text)} tokens, the model takes {self.max_tokens}: split it"
                )

    def _check_model(self, texts: list[list[int]], layers: list[int]) -> None:
        new = [layer for layer in layers if layer not in self._checked]
        if not texts or not new:
            return
        sample = max(texts, key=len)[:GATE_TOKENS]
        cache = DynamicCache()
        captured = self._forward([sample], new, cache)
        positions = torch.arange(len(sample), dtype=torch.int32, device=self.decoder.device)
        for i, layer in enumerate(new):
            keys, seen = captured[1][i], cache.layers[layer].keys  # [1, T, Hkv, D], [1, Hkv, T, D]
            ours = rotate(keys.transpose(1, 2), positions, self.rope(layer))
            error = (ours.float() - seen.float()).abs().max()
            if not error <= 16 * torch.finfo(seen.dtype).eps * seen.float().abs().max().clamp_min(1e-6):
                raise UnsupportedModelError(
                    f"layer {layer} of {type(self.model).__name__}: its keys before RoPE do not give those of its "
                    f"KV cache (off by {error:.3g}); this architecture is not supported"
                )
        self._checked.update(new)

    @torch.inference_mode()
    def _forward(
        self, rows: list[list[int]], layers: list[int], cache: DynamicCache | None = None
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Queries, keys and values [B, T, heads, D] by layer; stops behind the last one unless the cache is wanted."""
        ids = torch.tensor(rows, device=self.decoder.device)
        recorder = _Recorder(self.attentions, layers, stop=cache is None)
        with recorder:
            self.decoder(input_ids=ids, use_cache=cache is not None, **{cache_argument(self.decoder): cache})
        return recorder.captured(*ids.shape)


class _Enough(Exception):
    """Everything asked for is captured: leaves the forward."""


class _Recorder:
    """Hooks on the last module before RoPE of each of q, k and v, for the time of one forward."""

    def __init__(self, attentions: list[nn.Module], layers: list[int], stop: bool) -> None:
        self.attentions, self.layers, self.stop = attentions, layers, stop
        self.taken: dict[tuple[str, int], Tensor] = {}
        self.handles: list[Any] = []

    def __enter__(self) -> None:
        for layer in self.layers:
            for name, module in _last_before_rope(self.attentions[layer]).items():
                self.handles.append(module.register_forward_hook(partial(self._take, (name, layer))))

    def __exit__(self, kind: type | None, *_: Any) -> bool:
        for handle in self.handles:
            handle.remove()
        return kind is _Enough

    def _take(self, place: tuple[str, int], module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        self.taken[place] = output
        if self.stop and len(self.taken) == 3 * len(self.layers):
            raise _Enough

    def captured(self, batch: int, tokens: int) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        def shaped(name: str, layer: int) -> Tensor:
            output = self.taken.get((name, layer))
            if output is None:
                raise UnsupportedModelError(f"layer {layer} never ran its {name} projection")
            dim = self.attentions[layer].head_dim
            if output.shape[:2] != (batch, tokens) or output[0, 0].numel() % dim:
                raise UnsupportedModelError(
                    f"layer {layer}: its {name} has shape {tuple(output.shape)}, "
                    f"expected [{batch}, {tokens}, heads * {dim}]"
                )
            return output.reshape(batch, tokens, -1, dim)

        q, k, v = ([shaped(name, layer) for layer in self.layers] for name in "qkv")
        return q, k, v


def attention_layers(decoder: nn.Module) -> list[nn.Module]:
    """The decoder's attention modules in order of layers. Raises UnsupportedModelError if one is of another kind."""
    layers = getattr(decoder, "layers", None)
    if layers is None:
        raise UnsupportedModelError(f"{type(decoder).__name__} has no list of layers")
    attentions = [getattr(layer, "self_attn", None) for layer in layers]
    for i, attention in enumerate(attentions):
        missing = [name for name in ("q_proj", "k_proj", "v_proj", "head_dim") if not hasattr(attention, name)]
        if missing:
            raise UnsupportedModelError(f"layer {i} of {type(decoder).__name__} has no self_attn.{missing[0]}")
    return attentions


def _last_before_rope(attention: nn.Module) -> dict[str, nn.Module]:
    def last(x: str) -> nn.Module:
        return getattr(attention, f"{x}_norm", None) or getattr(attention, f"{x}_proj")

    return {"q": last("q"), "k": last("k"), "v": attention.v_proj}


def _cut(captured: tuple[list[Tensor], ...], row: int, first: int, end: int) -> EncodedText:
    q, k, v = (torch.stack([layer[row, first:end] for layer in part]) for part in captured)  # [L, T, heads, D]
    return EncodedText(q, k.transpose(1, 2).contiguous(), v.transpose(1, 2).contiguous())
