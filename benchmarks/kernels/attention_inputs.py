"""``attention_inputs``: from a layer's projection to its attention, with δ-mem; beside the model's own norm and RoPE.

Models named qwen3 norm the heads of q and k. The adapter is the released shape: rank 8, one state head, corrects q.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.kernels.registry import Case, Gate, Operation, Setup, Variant, relative_rms
from benchmarks.kernels.roofline import Work
from benchmarks.kernels.shapes import Model, Random
from mem_triton.ops.attention_inputs import HeadInputs, attention_inputs, attention_inputs_reference
from mem_triton.ops.delta_rule import DeltaRuleSpec, StateBatch, activate, delta_rule, delta_rule_paged
from mem_triton.systems.delta_mem.folding import columns

BLOCK = 16  # tokens of a KV block and of a state cell
SPEC = DeltaRuleSpec(rank=8, heads=1)
ROUNDED = {"bf16": 4e-3, "fp16": 5e-4, "fp32": 1e-5}  # q, k and v are rounded once
STEPWISE = {"bf16": 2e-2, "fp16": 2e-3, "fp32": 1e-5}  # and after every step where each is an operator


class Layer(NamedTuple):
    projected: Tensor  # [T, q + k + v + projections + padding]
    reads: Tensor  # fp32 [T, 8]
    inputs: HeadInputs
    batch: StateBatch
    positions: Tensor  # int64 [T]


def cases(models: list[Model], dtype: str, gpu: bool) -> list[Case]:
    found = []
    prompt = 2048 if gpu else 64
    for batch, queries in ((1, 1), (8, 1), (32, 1), (128, 1), (256, 1), (1, prompt)):
        for model in models:
            sizes = {
                "batch": batch,
                "queries": queries,
                "context": 100,
                "query_heads": model.query_heads,
                "kv_heads": model.kv_heads,
                "head_dim": model.head_dim,
                "norms": int(model.name.startswith("qwen3")),
            }
            name = f"decode x{batch}" if queries == 1 else f"prompt of {queries}"
            found.append(Case("attention_inputs", (model.name,), name, dtype, sizes, model.layers))
    return found


def build(case: Case, device: str, seed: int) -> Layer:
    g, s, dtype = Random(device, seed), case.sizes, case.torch_dtype
    batch, queries, size = s["batch"], s["queries"], s["head_dim"]
    length, tokens = s["context"] + queries, batch * queries
    norms = [1 + g.normal(size, dtype=dtype) / 8 for _ in range(2)] if s["norms"] else [None, None]
    angles = g.normal(length, size // 2) * 3
    inputs = HeadInputs(
        s["query_heads"],
        s["kv_heads"],
        size,
        "q",
        g.normal(s["query_heads"] * size, SPEC.read_width, dtype=dtype) / 8,
        *norms,
        cos_sin=torch.cat([angles.cos(), angles.sin()], 1).to(dtype),
    )
    blocks = -(-length // BLOCK)
    integers = {"dtype": torch.int32, "device": device}
    states = StateBatch(
        torch.full((SPEC.bias_width,), -1.5, device=device),
        g.normal(batch * blocks + 1, 1, SPEC.state_size),
        g.permutation(batch * blocks).view(batch, blocks) + 1,  # block 0 is the engine's placeholder
        torch.arange(batch + 1, **integers) * queries,
        torch.full((batch,), length, **integers),
    )
    width = columns(inputs.width, SPEC.projection_width)
    reads = torch.empty(tokens, SPEC.read_width, device=device)
    positions = torch.arange(s["context"], length, device=device).repeat(batch)
    return Layer(g.normal(tokens, width, dtype=dtype), reads, inputs, states, positions)


def work(case: Case, layer: Layer, memory: bool = True) -> Work:
    """q, k and their table; with memory Δ and the projections, reads, and for each row a state in and a cell out."""
    s, inputs, item = case.sizes, layer.inputs, case.torch_dtype.itemsize
    tokens, heads = s["batch"] * s["queries"], inputs.touched()[1]
    elements = tokens * heads * inputs.head_dim
    moved = 2 * elements * item + s["queries"] * inputs.rotated * item
    if not memory:
        return Work(moved, 6 * elements)
    cells = s["batch"] * (1 + -(-s["queries"] // BLOCK))
    moved += inputs.delta.numel() * item + tokens * (SPEC.projection_width * item + SPEC.read_width * 4)
    flops = 6 * elements + 2 * tokens * inputs.delta.numel() + 10 * tokens * SPEC.state_size
    return Work(moved + cells * SPEC.state_size * 4, flops)


def norm_and_rope(qkv: Tensor, reads: Tensor | None, positions: Tensor, inputs: HeadInputs) -> Tensor:
    """As a model has them: an operator each, rounded after each. reads: also add Δq of them."""
    q, k, v = qkv.split([x * inputs.head_dim for x in (inputs.heads, inputs.kv_heads, inputs.kv_heads)], dim=-1)
    if reads is not None:
        q = q + torch.nn.functional.linear(reads.to(q.dtype), inputs.delta)
    cos, sin = inputs.cos_sin[positions][:, None].chunk(2, dim=-1)
    turned = []
    for x, norm in ((q, inputs.q_norm), (k, inputs.k_norm)):
        x = x.unflatten(-1, (-1, inputs.head_dim))
        if norm is not None:
            x = torch.nn.functional.rms_norm(x, norm.shape, norm, inputs.eps)
        a, b = x.chunk(2, dim=-1)
        turned.append(torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(1))
    return torch.cat([*turned, v], dim=-1)


def variants(case: Case, layer: Layer, setup: Setup) -> list[Variant]:
    projected, reads, inputs, batch, positions = layer
    width, queries = inputs.width, case.sizes["queries"]
    qkv, projections = projected[:, :width], projected[:, width : width + SPEC.projection_width]
    start, cells = projected.clone(), batch.state_cache.clone()
    layout = {"block_size": BLOCK, "tokens_per_state": BLOCK, "max_query_len": queries}
    stock = torch.compile(norm_and_rope, dynamic=False) if setup.gpu else norm_and_rope

    @functools.cache
    def wanted(memory: bool) -> tuple[Tensor, Tensor, Tensor]:
        old = cells[batch.block_table[:, (case.sizes["context"] - 1) // BLOCK].long(), 0].cpu().double()
        raw = start[:, width : width + SPEC.projection_width].cpu().double()
        read, final, _ = delta_rule(
            activate(raw, batch.gate_bias.cpu().double(), SPEC), old.view(-1, 1, 8, 8), batch.query_start_loc.cpu()
        )
        moved = {name: x.cpu() for name, x in vars(inputs).items() if isinstance(x, Tensor)}
        on_cpu = HeadInputs(**{**vars(inputs), **moved})
        read = read.flatten(1)
        exact = start[:, :width].cpu().double()
        given = read if memory else torch.zeros_like(read)
        return attention_inputs_reference(exact, given, positions.cpu(), on_cpu), read, final.flatten(1)

    def error(made: Any) -> float:
        """made: q | k | v, or None = in place."""
        out, read, final = wanted(True)
        last = batch.state_cache[batch.block_table[:, -1].long(), 0]
        return relative_rms((qkv if made is None else made, out), (reads, read), (last, final))

    def separately() -> Tensor:
        delta_rule_paged(projections, reads, batch, SPEC, **layout)
        return stock(qkv, reads, positions, inputs)

    without = Gate(lambda made: relative_rms((made, wanted(False)[0])), STEPWISE[case.dtype])
    return [
        Variant(
            "attention_inputs",
            lambda: attention_inputs(qkv, projections, reads, inputs, batch, SPEC, **layout),
            Gate(error, ROUNDED[case.dtype]),
            work(case, layer),
            writes=(reads,),
            updates=(projected, batch.state_cache),
        ),
        Variant(
            "step, then norm and RoPE",
            separately,
            Gate(error, STEPWISE[case.dtype]),
            work(case, layer),
            writes=(reads,),
            updates=(batch.state_cache,),
            baseline=True,
            note="a launch for the states",
        ),
        Variant(
            "norm and RoPE alone",
            lambda: stock(qkv, None, positions, inputs),
            without,
            work(case, layer, memory=False),
            baseline=True,
            note="stock: no memory at all",
        ),
    ]


OPERATION = Operation("attention_inputs", cases, build, variants)
