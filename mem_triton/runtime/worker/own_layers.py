"""A Llama's own decoder layers, run beside an engine's batches (``systems.base.LayerIO``).

Norms, projections, rotary embedding and MLP are the engine's own modules, which vLLM and SGLang call alike; attention
is plain and causal over the rows of a call, as these are no tokens of any request. Nothing of the engine is changed,
and what wraps a linear (LoRA of requests, δ-mem) is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mem_triton.schema import ConfigError
from mem_triton.systems.base import Adapter

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GATE_UP = ("mlp.gate_proj", "mlp.up_proj")


class LlamaLayers:
    """Those on this rank. embed: the model's table of input embeddings; layers: by index in the model.

    known: the engine's classes of such a layer, its attention and its MLP. rank, ranks: that split heads, and
    all_reduce: their sum. unwatched: why its steps cannot be watched, None if they can. Raises ConfigError for other
    classes.
    """

    def __init__(
        self,
        embed: nn.Module,
        layers: Mapping[int, nn.Module],
        known: tuple[type, type, type],
        rank: int,
        ranks: int,
        all_reduce: Callable[[Tensor], Tensor],
        unwatched: str | None = None,
    ) -> None:
        for index, layer in layers.items():
            found = type(layer), type(getattr(layer, "self_attn", None)), type(getattr(layer, "mlp", None))
            if found != known:
                raise ConfigError(
                    f"layer {index} of the model is a {found[0].__name__}, and only layers of LlamaForCausalLM can be "
                    "run beside the engine's batches"
                )
            for linear in map(_own, (layer.self_attn.qkv_proj, layer.self_attn.o_proj)):
                if linear._forward_hooks or "forward" in vars(linear):
                    raise ConfigError(
                        f"layer {index} of the model does more than its weights: another memory has changed a "
                        "projection in place; configure one of the two"
                    )
        self._embed, self._layers, self._rank, self._ranks = embed, layers, rank, ranks
        self._all_reduce, self._unwatched, self._inside = all_reduce, unwatched, False

    def embed(self, ids: Sequence[int]) -> Tensor:
        table = _own(self._embed)
        return table(torch.tensor(ids, device=next(table.parameters()).device))

    def project(self, layer: int, rows: Tensor, adapter: Adapter) -> tuple[Tensor, Tensor]:
        module = self._layers[layer]
        _, *both = self._queries_keys_values(module, rows, adapter)
        size = module.self_attn.head_dim
        keys, values = (part.reshape(len(rows), -1, size).transpose(0, 1) for part in both)
        return keys, values

    def normed(self, layer: int, rows: Tensor) -> Tensor:
        return _own(self._layers[layer].input_layernorm)(rows)

    def watch(self, layer: int, seen: Callable[[Tensor], None]) -> None:
        if self._unwatched is not None:
            raise ConfigError(self._unwatched)

        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            if not self._inside:  # a call of our own is no step
                seen(args[0])

        self._layers[layer].self_attn.qkv_proj.register_forward_pre_hook(hook)

    def run(self, layer: int, hidden: Tensor, adapter: Adapter) -> Tensor:
        module = self._layers[layer]
        attention, mlp = module.self_attn, module.mlp
        query, key, value = self._queries_keys_values(module, hidden, adapter)
        positions = torch.arange(len(hidden), device=hidden.device)
        query, key = _own(attention.rotary_emb)(positions, query.contiguous(), key.contiguous())
        attended = _causal(query, key, value, attention.head_dim, attention.scaling)
        hidden = hidden + self._by_rows(attention.o_proj, attended, adapter.get("self_attn.o_proj"))
        normed = _own(module.post_attention_layernorm)(hidden)
        gated = mlp.act_fn(self._by_columns(mlp.gate_up_proj, normed, adapter, GATE_UP))
        return hidden + self._by_rows(mlp.down_proj, gated, adapter.get("mlp.down_proj"))

    def _queries_keys_values(self, module: nn.Module, hidden: Tensor, adapter: Adapter) -> tuple[Tensor, ...]:
        attention = module.self_attn
        widths = attention.q_size, attention.kv_size, attention.kv_size
        normed = _own(module.input_layernorm)(hidden)
        self._inside = True
        try:
            return self._by_columns(attention.qkv_proj, normed, adapter, QKV, widths).split(widths, dim=-1)
        finally:
            self._inside = False

    def _by_columns(
        self, linear: nn.Module, x: Tensor, adapter: Adapter, names: Sequence[str], widths: Sequence[int] = ()
    ) -> Tensor:
        """A joined linear, of whose outputs this rank has a part. widths: of each of the joined, here; alike if ()."""
        out = _output(_own(linear)(x))
        parts = out.split(list(widths) or out.shape[-1] // len(names), dim=-1)
        return torch.cat([self._column(part, x, adapter.get(n)) for part, n in zip(parts, names, strict=True)], -1)

    def _column(self, out: Tensor, x: Tensor, factors: tuple[Tensor, Tensor] | None) -> Tensor:
        if factors is None:
            return out
        down, up = factors
        width = out.shape[-1]
        place = self._rank if len(up) >= width * self._ranks else self._rank * (len(up) // width) // self._ranks
        return out + F.linear(F.linear(x, down), up[place * width : (place + 1) * width])

    def _by_rows(self, linear: nn.Module, x: Tensor, factors: tuple[Tensor, Tensor] | None) -> Tensor:
        """A linear of whose inputs this rank has a part: the sum over all ranks."""
        linear = _own(linear)
        out = _output(linear(x))
        if not linear.reduce_results:
            out = self._summed(out)
        if factors is None:
            return out
        down, up = factors
        width = x.shape[-1]
        return out + F.linear(self._summed(F.linear(x, down[:, self._rank * width : (self._rank + 1) * width])), up)

    def _summed(self, x: Tensor) -> Tensor:
        return self._all_reduce(x) if self._ranks > 1 else x


def _own(module: nn.Module) -> nn.Module:
    """The engine's module below what wraps it."""
    children = dict(module.named_children())
    below = children.get("base_layer", children.get("base"))
    return module if below is None else _own(below)


def _output(result: Any) -> Tensor:
    """Linears of engines give their output alone or with a bias."""
    return result[0] if isinstance(result, tuple) else result


def _causal(query: Tensor, key: Tensor, value: Tensor, size: int, scale: float) -> Tensor:
    """Plain causal attention over the rows of one call: [T, heads * D]."""
    q, k, v = (x.reshape(len(x), -1, size).transpose(0, 1) for x in (query, key, value))
    k, v = (x.repeat_interleave(len(q) // len(k), 0) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale).transpose(0, 1).flatten(1)
