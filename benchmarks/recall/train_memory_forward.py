"""Explicit memory with gradients: the recall model encodes references alone, selects, and reads them in one softmax.

The same arithmetic as the product's (``mem_triton_transformers``), which has no gradients; ``explicit.py`` evaluates
with the product. Positions: token j of a reference at j - 128, the constant prefix before that, the context from 0;
a dense prefix of T tokens at -T ... -1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

REFERENCE_TOKENS = 128
KEEP = 8


@dataclass(frozen=True)
class EncodedLayer:
    """What one layer reads: rotated keys and values [B, Hkv, M, D], and a logit bias [B, Hkv, M] (-inf: not there)."""

    keys: Tensor
    values: Tensor
    bias: Tensor

    def take(self, rows: Tensor) -> EncodedLayer:
        """For each request b the memories ``rows[b]`` [B, R] side by side; -1 for none."""
        missing = (rows < 0)[:, :, None, None]

        def joined(x: Tensor) -> Tensor:  # [B, R, Hkv, M, ...] -> [B, Hkv, R * M, ...]
            return x.transpose(1, 2).flatten(2, 3)

        chosen = rows.clamp_min(0)
        bias = self.bias[chosen].masked_fill(missing, -torch.inf)
        return EncodedLayer(joined(self.keys[chosen]), joined(self.values[chosen]), joined(bias))


def rotate(model: Qwen3ForCausalLM, x: Tensor, positions: Tensor) -> Tensor:
    """RoPE. x: [..., T, D]; positions: [..., T]."""
    angle = positions[..., None].float() * model.model.rotary_emb.inv_freq
    angle = torch.cat([angle, angle], -1)
    first, second = x.chunk(2, -1)
    return x * angle.cos() + torch.cat([-second, first], -1) * angle.sin()


def forward(
    model: Qwen3ForCausalLM, ids: Tensor, memory: dict[int, EncodedLayer] | None = None, until: int | None = None
) -> tuple[Tensor, list[tuple[Tensor, Tensor, Tensor]]]:
    """Final hidden states [B, T, d], and each layer's (queries, keys, values) [B, heads, T, D] before RoPE.

    until: run only so many layers, for their queries, keys and values.
    """
    x = model.model.embed_tokens(ids)
    positions = torch.arange(ids.shape[1])
    future = torch.full((len(positions), len(positions)), -torch.inf).triu(1)
    captured = []
    for index, layer in enumerate(model.model.layers[:until]):
        attention, hidden = layer.self_attn, layer.input_layernorm(x)
        shape = (*ids.shape, -1, attention.head_dim)
        q = attention.q_norm(attention.q_proj(hidden).view(shape)).transpose(1, 2)
        k = attention.k_norm(attention.k_proj(hidden).view(shape)).transpose(1, 2)
        v = attention.v_proj(hidden).view(shape).transpose(1, 2)
        captured.append((q, k, v))
        if index + 1 == until:
            break
        q, k = rotate(model, q, positions), rotate(model, k, positions)
        group, mask = q.shape[1] // k.shape[1], future.expand(len(ids), q.shape[1], *future.shape)
        if memory and index in memory:
            read = memory[index]
            k, v = torch.cat([read.keys, k], 2), torch.cat([read.values, v], 2)
            seen = read.bias.repeat_interleave(group, 1)[:, :, None].expand(*mask.shape[:3], -1)
            mask = torch.cat([seen, mask], -1)
        k, v = (part.repeat_interleave(group, 1) for part in (k, v))
        read = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        x = x + attention.o_proj(read)
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return model.model.norm(x), captured


def selection_weights(q: Tensor, k: Tensor, valid: Tensor) -> Tensor:
    """How much all tokens of a text look at each of them, [B, Hkv, T]: softmax without mask and RoPE, summed over
    queries and over the query heads of a KV head (Memory³, arXiv 2407.01178, section 3.2)."""
    group = q.shape[1] // k.shape[1]
    logits = q @ k.repeat_interleave(group, 1).transpose(-1, -2) * q.shape[-1] ** -0.5
    logits = logits.masked_fill(~valid[:, None, None], -torch.inf)
    weights = (logits.softmax(-1) * valid[:, None, :, None]).sum(2)
    return weights.unflatten(1, (-1, group)).sum(2)


def write(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    texts: Sequence[str],
    layers: Sequence[int],
    keep: int | None,
    prefix: Sequence[int],
    sharpness: float | None = None,
) -> dict[int, EncodedLayer]:
    """Each text encoded alone behind ``prefix``, in these layers: an EncodedLayer of N rows each.

    keep: tokens kept per KV head, None for all. sharpness: instead of dropping the others, lower their logits by
    ``sharpness * log(weight / weight of the last kept one)``, which tells the gradient what should have been kept.
    """
    encoded = tokenizer(list(texts), padding=True, padding_side="right", return_tensors="pt")
    before = torch.tensor(list(prefix), dtype=torch.long).expand(len(texts), len(prefix))
    _, captured = forward(model, torch.cat([before, encoded.input_ids], 1), until=max(layers) + 1)
    valid = encoded.attention_mask.bool()
    memory = {}
    for layer in layers:
        q, k, v = (x[:, :, len(prefix) :] for x in captured[layer])
        positions = torch.arange(k.shape[2]).expand(k.shape[:3])
        bias = torch.zeros(k.shape[:3]).masked_fill(~valid[:, None], -torch.inf)
        if keep is not None and sharpness is not None:
            weights = selection_weights(q, k, valid).masked_fill(~valid[:, None], 0)
            last = weights.detach().topk(keep, -1).values[..., -1:]
            bias = bias + sharpness * ((weights + 1e-9).log() - last.log()).clamp_max(0)
        elif keep is not None:
            with torch.no_grad():  # in fp64, so that equal tokens are equal, and then the first of them is chosen
                weights = selection_weights(q.double(), k.double(), valid).float()
                order = weights.masked_fill(~valid[:, None], -1).sort(dim=-1, descending=True, stable=True).indices
                positions = order[..., :keep].sort(-1).values
            index = positions[..., None].expand(*positions.shape, k.shape[3])
            k, v, bias = k.gather(2, index), v.gather(2, index), bias.gather(2, positions)
        memory[layer] = EncodedLayer(rotate(model, k, positions - REFERENCE_TOKENS), v, bias)
    return memory


def write_prefix(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]
) -> dict[int, EncodedLayer]:
    """Each text's whole KV in all layers, at the positions right before the context (kind "prefix")."""
    encoded = tokenizer(list(texts), padding=True, padding_side="right", return_tensors="pt")
    _, captured = forward(model, encoded.input_ids, until=len(model.model.layers))
    valid = encoded.attention_mask.bool()
    positions = (torch.arange(valid.shape[1]) - valid.sum(1, keepdim=True))[:, None]
    return {
        layer: EncodedLayer(
            rotate(model, k, positions), v, torch.zeros(k.shape[:3]).masked_fill(~valid[:, None], -torch.inf)
        )
        for layer, (_, k, v) in enumerate(captured)
    }


def sink(model: Qwen3ForCausalLM, prefix: Sequence[int]) -> dict[int, EncodedLayer]:
    """The constant prefix in all layers, one row, before all references."""
    _, captured = forward(model, torch.tensor([list(prefix)]), until=len(model.model.layers))
    positions = torch.arange(len(prefix)) - REFERENCE_TOKENS - len(prefix)
    return {
        layer: EncodedLayer(rotate(model, k, positions), v, torch.zeros(k.shape[:3]))
        for layer, (_, k, v) in enumerate(captured)
    }


def requests_memory(
    references: dict[int, EncodedLayer], constant: dict[int, EncodedLayer], rows: Tensor
) -> dict[int, EncodedLayer]:
    """What each of B requests reads: the constant prefix and the references ``rows[b]`` [B, R] (-1: none)."""
    first = torch.zeros(len(rows), 1, dtype=torch.long)
    memory = {layer: part.take(first) for layer, part in constant.items()}
    for layer, part in references.items():
        own = part.take(rows)
        if layer in memory:
            pairs = zip(vars(memory[layer]).values(), vars(own).values(), strict=True)
            own = EncodedLayer(*(torch.cat(pair, 2) for pair in pairs))
        memory[layer] = own
    return memory
