"""Every kernel compiles for the GPUs we name, within its registers, without a spill, and reads what it must."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import pytest

from mem_triton.ops.delta_rule import DeltaRuleSpec
from tests.support.aot import EXCESS, SPILLS, TARGETS, Resources, check_budget, check_traffic, compile_for
from tests.support.aot_suite import Suite, needs_the_compiler

pytestmark = [needs_the_compiler, pytest.mark.kernels]

RANKS = (4, 8, 16, 32)
KERNELS = ("recurrent", "chunk_maps", "chunk_scan")
VARIANTS = {  # spec fields, projection dtype, optional tensors given
    "tsw": (dict(heads=1), "*bf16", True),
    "msw": (dict(heads=4, rankwise_gates=False, couple_lambda=False, update_mode="lambda_outside"), "*fp32", False),
    "odd": (dict(heads=3, update_mode="no_lambda", normalize_qk=False), "*fp16", True),
}
REGISTER_BUDGET = {4: 72, 8: 128, 16: 128, 32: 192}  # of 255; a program is one warp, so only spills would cost time
OCCUPANCY = {  # warps at a time, of programs of one warp; 32 is the most
    "recurrent": {4: 32, 8: 24, 16: 24, 32: 16},
    "chunk_maps": {4: 32, 8: 16, 16: 16, 32: 12},
    "chunk_scan": {4: 32, 8: 20, 16: 11, 32: 6},
}
CHUNK_TURNS = 64  # tokens of a chunk, chunks before it
SHARED_BUDGET = 48 * 1024  # what a program may use without opting in


class Case(NamedTuple):
    kernel: str
    rank: int
    variant: str
    target: str


# The released shape everywhere; the others on one GPU of each maker.
CASES = [
    case
    for case in itertools.starmap(Case, itertools.product(KERNELS, RANKS, VARIANTS, TARGETS))
    if case.variant == "tsw" or case.target in ("sm90", "gfx942")
]


def least_bytes(case: Case) -> dict[str, tuple[int, int]]:
    """What a program cannot do without: (once, a token's turn or a map's)."""
    from mem_triton.ops.delta_rule import launch
    from mem_triton.ops.tuning.delta_rule import select

    fields, projections, optional = VARIANTS[case.variant]
    spec, rank = DeltaRuleSpec(rank=case.rank, **fields), case.rank
    chunked, maps = case.kernel != "recurrent", case.kernel == "chunk_maps"
    rows, _ = launch.program_shape(select(case.target, rank), spec, chunked)
    heads, state = -(-rows // rank), rows * rank * 4
    gates = (rows if spec.rankwise_gates else heads) * (1 if spec.couple_lambda else 2)
    # Maps read no queries, but gates twice: for the state and for its images, which lie otherwise in the registers.
    token = heads * rank * (1 if maps else 2) + rows + gates * (2 if maps else 1)
    least = {
        "projections": (0, token * (4 if projections == "*fp32" else 2)),
        "batch.state_cache": (state, 0 if maps else state),  # a state is stored where a cell ends
    }
    if optional:
        least |= {"batch.initial_states": (state, 0)} | ({} if maps else {"batch.last_states": (state, 0)})
    if maps:
        least["maps"] = (state * (rank + 2), 0)  # chunk 0 stores start and end, any other its map
    else:
        least["reads"] = (0, rows * 4)
        if chunked:
            least["maps"] = (2 * state, state * (rank + 1))
    return least


def compile_case(case: Case, **options) -> Resources:
    from mem_triton.ops.delta_rule import kernels, launch, operands
    from mem_triton.ops.tuning.delta_rule import select

    fields, projections, optional = VARIANTS[case.variant]
    spec, config = DeltaRuleSpec(rank=case.rank, **fields), select(case.target, case.rank)
    chunked = case.kernel != "recurrent"
    kernel = kernels.chunk_maps_kernel if case.kernel == "chunk_maps" else kernels.recurrent_kernel
    rows, warps = launch.program_shape(config, spec, chunked)
    rule = operands.rule_of(spec, block_size=16, tokens_per_state=16)
    constants = {"ROWS": rows, "CHUNK": config.chunk if chunked else 0}
    i32, fp32 = "*i32", "*fp32"
    optionals = (fp32, i32, i32, fp32) if optional else (None,) * 4
    batch = operands.Batch(fp32, fp32, i32, i32, i32, *optionals, "i32", "i32")
    arguments = {"projections": projections, "reads": fp32, "batch": batch, "maps": fp32, "RULE": rule}
    arguments |= dict.fromkeys(("num_rows", "stride_token", "stride_read", "stride_table"), "i32")
    if not chunked:
        del arguments["maps"]
        constants["maps"] = None
    arguments = {name: value for name, value in arguments.items() if name in kernel.arg_names}
    return compile_for(case.target, kernel, arguments, constants, num_warps=warps, **launch.OPTIONS, **options)


suite = Suite(compile_case, CASES)


@suite.each
def test_compiles_within_budget(case: Case):
    result = suite[case]
    check_budget(result, REGISTER_BUDGET[case.rank], SHARED_BUDGET, occupancy=OCCUPANCY[case.kernel][case.rank])


@suite.each
def test_reads_and_writes_what_it_must(case: Case):
    # A map of rank 4 takes so few bytes a token that what the compiler loads in a second layout shows.
    excess = 1.3 if case.kernel == "chunk_maps" and case.rank == 4 else EXCESS
    check_traffic(suite[case], least_bytes(case), turns=CHUNK_TURNS, excess=excess)


def test_a_spill_is_seen():
    """Negative control: 32 registers a thread are too few for a state of rank 16."""
    assert compile_case(Case("recurrent", 16, "tsw", "sm90"), maxnreg=32).spills > SPILLS


def test_a_rank_without_kernels_is_refused():
    from mem_triton.ops.tuning.delta_rule import select

    with pytest.raises(ValueError, match="rank=5: the GPU kernels support ranks"):
        select("sm90", 5)


def test_another_batch_needs_no_new_kernel():
    """SGLang's block tables are as wide as the longest row of the step."""
    from mem_triton.ops.delta_rule import kernels

    for kernel in (kernels.recurrent_kernel, kernels.chunk_maps_kernel):
        assert {"num_rows", "stride_table"} <= {p.name for p in kernel.params if p.do_not_specialize}
