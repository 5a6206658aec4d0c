"""``memory_selection``: which tokens of a reference each KV head keeps. Part of writing a bank, not of serving."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.kernels.registry import Case, Gate, Operation, Setup, Variant
from benchmarks.kernels.roofline import Work
from benchmarks.kernels.shapes import Model, Random, by_attention
from mem_triton.ops.memory_selection import reference, select_tokens, selection_weights

KEEP = 8
TOLERANCE = 1e-4  # RMS of the logarithm of a weight, which is a relative error of the weight
ROUNDED = {"bf16": 5e-2, "fp16": 1e-2, "fp32": 1e-4}  # of logits that went through the case's dtype


class Layer(NamedTuple):
    q: Tensor  # [B, T, Hq, D]
    k: Tensor  # [B, T, Hkv, D]
    valid: Tensor  # bool [B, T]
    weights: Tensor  # fp32 [B, Hkv, T], of the baseline


def cases(models: list[Model], dtype: str, gpu: bool) -> list[Case]:
    found = []
    for batch, tokens in ((1, 128), (8, 128), (64, 128), (512, 128), (32, 512)) if gpu else ((1, 128), (4, 64)):
        for model, names in by_attention(models):
            sizes = {
                "references": batch,
                "tokens": tokens,
                "query_heads": model.query_heads,
                "kv_heads": model.kv_heads,
                "head_dim": model.head_dim,
            }
            name = f"{batch} references of {tokens}"
            found.append(Case("memory_selection", names, name, dtype, sizes, model.layers))
    return found


def build(case: Case, device: str, seed: int) -> Layer:
    g, s, dtype = Random(device, seed), case.sizes, case.torch_dtype
    batch, tokens, size = s["references"], s["tokens"], s["head_dim"]
    q, k = (g.normal(batch, tokens, heads, size, dtype=dtype) for heads in (s["query_heads"], s["kv_heads"]))
    valid = torch.ones(batch, tokens, dtype=torch.bool, device=device)
    return Layer(q, k, valid, torch.empty(batch, s["kv_heads"], tokens, device=device))


def work(case: Case, result_bytes: int) -> Work:
    """Queries and keys in, the result out; every query meets every key."""
    s = case.sizes
    vectors = s["references"] * s["tokens"] * (s["query_heads"] + s["kv_heads"])
    products = s["references"] * s["query_heads"] * s["tokens"] ** 2
    return Work(vectors * s["head_dim"] * case.torch_dtype.itemsize + result_bytes, 2 * products * s["head_dim"])


def torch_weights(layer: Layer, scale: float) -> Tensor:
    """As one writes it in torch: logits in the inputs' dtype, softmax and sum in fp32. ln of weights [B, Hkv, T]."""
    batch, _, kv_heads, _ = layer.k.shape
    q, k = layer.q.transpose(1, 2), layer.k.transpose(1, 2)
    logits = q.unflatten(1, (kv_heads, -1)) @ k.unsqueeze(2).mT  # [B, Hkv, group, T, T]
    share = (logits.float() * scale).masked_fill(~layer.valid.view(batch, 1, 1, 1, -1), -torch.inf).softmax(-1)
    return share.sum((2, 3)).log()


def variants(case: Case, layer: Layer, setup: Setup) -> list[Variant]:
    batch, tokens, scale = case.sizes["references"], case.sizes["tokens"], case.sizes["head_dim"] ** -0.5
    chosen = sorted({0, batch // 2, batch - 1})

    @functools.cache
    def wanted() -> Tensor:
        return torch.stack(
            [
                reference.log_weights(layer.q[i].double(), layer.k[i].double(), layer.valid[i], scale, "softmax")
                for i in chosen
            ]
        )

    def weights_error(weights: Tensor) -> float:
        return rms(weights[chosen].double() - wanted())

    def picks_error(picked: tuple[Tensor, Tensor]) -> float:
        """The true weights of the tokens kept against the largest there are: two of equal weight may change places."""
        kept = wanted().gather(-1, picked[0][chosen].long())
        return rms(kept.sort(-1, descending=True).values - wanted().topk(kept.shape[-1], -1).values)

    heads, keep = layer.k.shape[2], min(KEEP, tokens)
    weights_work = work(case, batch * heads * tokens * 4)
    return [
        Variant(
            "selection_weights",
            lambda: selection_weights(layer.q, layer.k, layer.valid),
            Gate(weights_error, TOLERANCE),
            weights_work,
        ),
        Variant(
            "select_tokens",
            lambda: select_tokens(layer.q, layer.k, keep=keep, valid=layer.valid),
            Gate(picks_error, TOLERANCE),
            work(case, batch * (heads * keep + 1) * 4),
            note="the weights, and the picks by torch's stable sort",
        ),
        Variant(
            "torch",
            lambda: layer.weights.copy_(torch_weights(layer, scale)),
            Gate(weights_error, ROUNDED[case.dtype]),
            weights_work,
            writes=(layer.weights,),
            baseline=True,
            note="the weights alone; logits rounded to the dtype, and kept in memory",
        ),
    ]


def rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


OPERATION = Operation("memory_selection", cases, build, variants)
