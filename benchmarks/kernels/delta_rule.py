"""``delta_rule_paged``: decode steps and scans of δ-mem's state, which do not depend on a model's widths.

Not here: the projections to and from the state, which are part of a layer's matrix products.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.kernels import delta_rule_baselines as baselines
from benchmarks.kernels.registry import Case, Gate, Operation, Setup, Variant, relative_rms
from benchmarks.kernels.roofline import Work
from benchmarks.kernels.shapes import Model, Random
from mem_triton.ops.delta_rule import DeltaRuleInputs, DeltaRuleSpec, StateBatch, activate, delta_rule, delta_rule_paged

BLOCK = 16  # tokens of a KV block and of a state cell
TOLERANCE = 1e-5  # relative RMS: states and reads are fp32 whatever the projections are
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
LENGTHS = (128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)


class Layer(NamedTuple):
    projections: Tensor  # [T, P]
    reads: Tensor  # fp32 [T, H*r]
    batch: StateBatch  # its cells are NaN but for those that the rows start from


def cases(models: list[Model], dtype: str, gpu: bool) -> list[Case]:
    names, layers = tuple(m.name for m in models), min(m.layers for m in models)

    def case(name: str, batch: int, queries: int, computed: int, heads: int = 1, series: str = "") -> Case:
        sizes = {"batch": batch, "queries": queries, "context": computed, "rank": 8, "state_heads": heads}
        return Case("delta_rule", names, name, dtype, sizes, layers, series)

    scale = 1 if gpu else 16  # a CPU's scans are as long as its patience
    return [
        *(case(f"decode x{n}", n, 1, 100, series="decode_batch") for n in BATCHES),
        *(case(f"scan {n // scale}", 1, n // scale, 0, series="scan_length") for n in LENGTHS),
        case(f"scan 8 x {1024 // scale}", 8, 1024 // scale, 32),
        case("decode x32, 4 state heads", 32, 1, 100, heads=4),
        case(f"scan {8192 // scale}, 4 state heads", 1, 8192 // scale, 0, heads=4),
    ]


def spec_of(case: Case) -> DeltaRuleSpec:
    return DeltaRuleSpec(rank=case.sizes["rank"], heads=case.sizes["state_heads"])


def build(case: Case, device: str, seed: int) -> Layer:
    g, spec = Random(device, seed), spec_of(case)
    batch, queries, computed = (case.sizes[name] for name in ("batch", "queries", "context"))
    blocks = -(-(queries + computed) // BLOCK)
    table = g.permutation(batch * blocks).view(batch, blocks) + 1  # block 0 is the engine's placeholder
    cache = torch.full((batch * blocks + 1, 1, spec.state_size), torch.nan, device=device)
    if computed:
        cache[table[:, (computed - 1) // BLOCK].long(), 0] = g.normal(batch, spec.state_size)
    return Layer(
        g.normal(batch * queries, spec.projection_width, dtype=case.torch_dtype),
        torch.empty(batch * queries, spec.read_width, device=device),
        StateBatch(
            torch.full((spec.bias_width,), -1.5, device=device),
            cache,
            table.int(),
            torch.arange(batch + 1, dtype=torch.int32, device=device) * queries,
            torch.full((batch,), queries + computed, dtype=torch.int32, device=device),
        ),
    )


def work(case: Case) -> Work:
    """Projections in, reads out, a state in and each new cell out per row; 10 operations per token and element."""
    spec = spec_of(case)
    batch, queries = case.sizes["batch"], case.sizes["queries"]
    tokens, cells = batch * queries, batch * ((case.sizes["context"] > 0) + -(-queries // BLOCK))
    moved = tokens * (spec.projection_width * case.torch_dtype.itemsize + spec.read_width * 4)
    return Work(moved + cells * spec.state_size * 4, 10 * tokens * spec.state_size)


def start_states(case: Case, layer: Layer) -> Tensor:
    """fp32 [batch, H, r, r], a copy: the states that the rows start from."""
    spec, computed = spec_of(case), case.sizes["context"]
    shape = (case.sizes["batch"], spec.heads, spec.rank, spec.rank)
    if not computed:
        return torch.zeros(shape, device=layer.reads.device)
    states = layer.batch
    return states.state_cache[states.block_table[:, (computed - 1) // BLOCK].long(), 0].view(shape).clone()


def variants(case: Case, layer: Layer, setup: Setup) -> list[Variant]:
    spec, start = spec_of(case), start_states(case, layer)
    projections, reads, states = layer
    options = {"block_size": BLOCK, "tokens_per_state": BLOCK, "max_query_len": case.sizes["queries"]}

    @functools.cache
    def wanted() -> tuple[Tensor, Tensor]:
        inputs = activate(projections.cpu().double(), states.gate_bias.cpu().double(), spec)
        read, final, _ = delta_rule(inputs, start.cpu().double(), states.query_start_loc.cpu())
        return read.flatten(1), final.flatten(1)

    def error(_: object) -> float:
        last = states.state_cache[states.block_table[:, -1].long(), 0]
        return relative_rms((reads, wanted()[0]), (last, wanted()[1]))

    modes = {"delta_rule_paged": False}
    if setup.gpu and case.sizes["queries"] > 1:  # elsewhere it is the same code
        modes["delta_rule_paged, batch-invariant"] = True
    step = functools.partial(delta_rule_paged, projections, reads, states, spec, **options)
    ours = [
        Variant(
            name,
            functools.partial(step, batch_invariant=invariantly),
            Gate(error, TOLERANCE),
            work(case),
            writes=(reads,),
            updates=(states.state_cache,),
        )
        for name, invariantly in modes.items()
    ]
    batch = (case.sizes["batch"], case.sizes["queries"])
    inputs = activate(projections.float(), states.gate_bias, spec)
    inputs = DeltaRuleInputs(*(x.unflatten(0, batch) for x in inputs))  # [batch, queries, H, r]
    return [*ours, *baselines.variants(case, inputs, start, setup)]


OPERATION = Operation("delta_rule", cases, build, variants)
