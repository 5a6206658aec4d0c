"""``memory_attention``: one layer's attention of a batch to its context, memory pages and a shared segment.

Ours are the three routes of the op, see ``mem_triton/ops/memory_attention/policy.py``. On the pool's cases ``fused``
reads the pool once per request and ``shared_batched`` once per batch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.kernels import memory_attention_baselines as baselines
from benchmarks.kernels.memory_attention_case import BLOCK, Layer, build, gate, work
from benchmarks.kernels.registry import Case, Operation, Setup, Variant
from benchmarks.kernels.shapes import Model, by_attention
from mem_triton.ops.common.architecture import architecture
from mem_triton.ops.memory_attention import AttentionCall, PagedContext, Policy, add_memory, memory_attention
from mem_triton.ops.memory_attention.policy import choose

REFERENCES, POOL = 5, 12800
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


def cases(models: list[Model], dtype: str, gpu: bool) -> list[Case]:
    """A CPU gets a sixteenth of the tokens, and a sixteenth of the largest batch."""
    scale, groups, found = (1 if gpu else 16), by_attention(models), []
    batches = BATCHES if gpu else BATCHES[:5]

    def add(name: str, batch: int, queries: int, context: int, pages: int, shared: int, series="", fp8=0) -> None:
        for model, names in groups:
            sizes = {
                "batch": batch,
                "queries": queries,
                "context": context,
                "references": pages,
                "shared": shared,
                "fp8_pool": fp8,
                "query_heads": model.query_heads,
                "kv_heads": model.kv_heads,
                "head_dim": model.head_dim,
            }
            found.append(Case("memory_attention", names, name, dtype, sizes, model.layers, series))

    context, pool = 4096 // scale, POOL // scale
    for n in batches:
        add(f"decode x{n}", n, 1, context, REFERENCES, 0, "decode_batch")
    for n in batches:
        add(f"pool {pool} decode x{n}", n, 1, context // 4, 0, pool, "pool_batch")
    add(f"memory3 prefill {context // 2}", 1, context // 2, 0, REFERENCES, 32)
    add(f"pool {pool} prefill {context // 2}", 1, context // 2, 0, 0, pool)
    for n in batches[::2]:
        add(f"pool {pool} fp8 decode x{n}", n, 1, context // 4, 0, pool, fp8=1)
    for n in (1, 8):
        add(f"long decode x{n}", n, 1, 8 * context, REFERENCES, 0)
    for tokens in (2048, 512, 128):  # where batching the shared segment begins to pay
        for n in batches[3::4]:
            add(f"prefix {max(BLOCK, tokens // scale)} decode x{n}", n, 1, context // 4, 0, max(BLOCK, tokens // scale))
    return found


def variants(case: Case, layer: Layer, setup: Setup) -> list[Variant]:
    """The routes, then the baselines. The shared segment of ``shared_batched`` is read once, by others per row."""
    s, scale = case.sizes, case.sizes["head_dim"] ** -0.5
    judge, own = gate(case, layer), {"scale": scale, "lse": layer.lse, **layer.memory}
    routes = ("fused", "shared_batched") if setup.gpu and s["shared"] else ("fused",)
    chosen = policy_route(case) if setup.gpu else "fused"
    attend_by = functools.partial(memory_attention, AttentionCall(layer.query, layer.context, layer.out, **own))
    calls: dict[str, Callable[[], Any]] = {
        **{route: functools.partial(attend_by, policy=Policy(route)) for route in routes},
        "fused, batch-invariant": functools.partial(attend_by, policy=Policy("fused", batch_invariant=True)),
    }
    stock = baselines.stock(case, layer, setup)
    attend, by = baselines.with_lse(case, layer, setup, stock)
    rows = PagedContext.elsewhere(*layer.context[3:6])
    calls[f"stock_context ({by})"] = lambda: add_memory(
        AttentionCall(layer.query, rows, layer.out, scale, lse=attend().t(), **layer.memory)
    )
    note = {chosen: "the policy's choice"}
    found = [
        Variant(name, call, judge, work(case), writes=(layer.out, layer.lse), note=note.get(name, ""))
        for name, call in calls.items()
    ]
    return found + baselines.variants(case, layer, setup, stock)


def policy_route(case: Case) -> str:
    s = case.sizes
    return choose(
        architecture(torch.device("cuda")),
        rows=s["batch"],
        shared_tokens=s["shared"],
        head_dim=s["head_dim"],
    ).route


OPERATION = Operation("memory_attention", cases, build, variants)
