"""Every kernel compiles for the GPUs we name, within its registers, without a spill, and reads what it must."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import pytest

from mem_triton.ops.delta_rule import DeltaRuleSpec
from tests.support.aot import SPILLS, TARGETS, Resources, compile_for
from tests.support.aot_suite import (  # noqa: F401
    Budget,
    Suite,
    pytest_generate_tests,
    pytestmark,
    test_compiles_within_budget,
    test_reads_and_writes_what_it_must,
)

RANKS = (4, 8, 16, 32)
KERNELS = ("recurrent", "activate", "chunk_maps", "chunk_scan")
VARIANTS = {  # spec fields, projection dtype, optional tensors given
    "tsw": (dict(heads=1), "*bf16", True),
    "msw": (dict(heads=4, rankwise_gates=False, couple_lambda=False, update_mode="lambda_outside"), "*fp32", False),
    "odd": (dict(heads=3, update_mode="no_lambda", normalize_qk=False), "*fp16", True),
}
REGISTER_BUDGET = {
    4: 96,
    8: 128,
    16: 128,
    32: 192,
}  # of 255; with so few warps only spills would cost time
OCCUPANCY = {  # warps at a time; 32 is the most of programs of one warp
    "recurrent": {4: 32, 8: 24, 16: 24, 32: 16},
    "activate": {4: 32, 8: 32, 16: 32, 32: 16},
    "chunk_maps": {4: 32, 8: 16, 16: 16, 32: 12},
    "chunk_scan": {4: 32, 8: 20, 16: 11, 32: 6},
}
INSTRUCTIONS = {4: 60, 8: 80, 16: 140, 32: 260}
"""Of a token's turn in ``chunk_maps_kernel``, which is its longest loop, on sm90. No lane may ask another."""
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
    spec, rank, config = DeltaRuleSpec(rank=case.rank, **fields), case.rank, select(case.target, case.rank)
    size = 4 if projections == "*fp32" else 2
    gates = 1 if spec.couple_lambda else 2
    if case.kernel == "activate":
        read, tokens = (3 + gates) * rank if spec.rankwise_gates else 3 * rank + gates, launch.ACTIVATED
        return {"projections": (tokens * read * size, 0), "active": (tokens * 5 * rank * 4, 0)}
    recurrent, maps = case.kernel == "recurrent", case.kernel == "chunk_maps"
    rows = launch.program_rows(config, spec) if recurrent else config.chunk_rows
    state = rows * rank * 4
    least = {"batch.state_cache": (state, 0 if maps else state)}  # a state is stored where a cell ends
    if recurrent:
        heads = -(-rows // rank)
        token = 2 * heads * rank + rows + (rows if spec.rankwise_gates else heads) * gates
        least["projections"] = (0, token * size)
    else:
        token = ((1 if maps else 2) * rank + 3 * rows) * 4  # a map reads no queries
        least["active"] = (config.chunk * token, 0) if maps else (0, token)
    if optional:
        least |= {"batch.initial_states": (state, 0)} | ({} if maps else {"batch.last_states": (state, 0)})
    if maps:
        least["maps"] = (state * (rank + 2), 0)  # chunk 0 stores start and end, any other its map
    else:
        least["reads"] = (0, rows * 4)
        if not recurrent:
            least["maps"] = (2 * state, state * (rank + 1))
    return least


def compile_case(case: Case, **options) -> Resources:
    from mem_triton.ops.delta_rule import chunk_kernels, kernels, launch, operands
    from mem_triton.ops.tuning.delta_rule import select

    fields, projections, optional = VARIANTS[case.variant]
    spec, config = DeltaRuleSpec(rank=case.rank, **fields), select(case.target, case.rank)
    kernel, rows, warps = {
        "recurrent": (kernels.recurrent_kernel, launch.program_rows(config, spec), config.warps),
        "activate": (chunk_kernels.activate_kernel, 0, 4),
        "chunk_maps": (chunk_kernels.chunk_maps_kernel, config.chunk_rows, config.maps_warps),
        "chunk_scan": (chunk_kernels.chunk_scan_kernel, config.chunk_rows, 1),
    }[case.kernel]
    constants = {"ROWS": rows, "CHUNK": config.chunk, "TOKENS": launch.ACTIVATED}
    i32, fp32 = "*i32", "*fp32"
    optionals = (fp32, i32, i32, fp32) if optional else (None,) * 4
    batch = operands.Batch(fp32, fp32, i32, i32, i32, *optionals, "i32", "i32")
    arguments = dict.fromkeys(("reads", "active", "maps", "gate_bias"), fp32)
    arguments |= dict.fromkeys(("num_rows", "num_tokens", "stride_token", "stride_read", "stride_table"), "i32")
    arguments |= {"projections": projections, "batch": batch}
    arguments["RULE"] = operands.rule_of(spec, block_size=16, tokens_per_state=16)
    arguments, constants = (
        {name: value for name, value in values.items() if name in kernel.arg_names} for values in (arguments, constants)
    )
    return compile_for(case.target, kernel, arguments, constants, num_warps=warps, **launch.OPTIONS, **options)


def budget_of(case: Case) -> Budget:
    return Budget(
        REGISTER_BUDGET[case.rank],
        SHARED_BUDGET,
        OCCUPANCY[case.kernel][case.rank],
        least=least_bytes(case),
        turns=CHUNK_TURNS,
    )


suite = Suite(compile_case, CASES, budget_of)


@pytest.mark.parametrize("rank", RANKS)
def test_a_token_of_a_map_takes_few_instructions_and_no_lane_asks_another(rank: int):
    longest = max(compile_case(Case("chunk_maps", rank, "tsw", "sm90"), machine_code=True).loops)
    assert longest.instructions <= INSTRUCTIONS[rank] and longest.shuffles == 0, longest


def test_a_shuffle_is_seen():
    """Negative control: in ``recurrent_kernel`` a state row lies in several lanes, which must add up."""
    assert max(compile_case(Case("recurrent", 8, "tsw", "sm90"), machine_code=True).loops).shuffles > 0


def test_a_spill_is_seen():
    """Negative control: 32 registers a thread are too few for a state of rank 16."""
    assert compile_case(Case("recurrent", 16, "tsw", "sm90"), maxnreg=32).spills > SPILLS


def test_a_rank_without_kernels_is_refused():
    from mem_triton.ops.tuning.delta_rule import select

    with pytest.raises(ValueError, match="rank=5: the GPU kernels support ranks"):
        select("sm90", 5)


def test_another_batch_needs_no_new_kernel():
    """SGLang's block tables are as wide as the longest row of the step."""
    from mem_triton.ops.delta_rule import chunk_kernels, kernels

    scan = (chunk_kernels.chunk_maps_kernel, chunk_kernels.chunk_scan_kernel)
    for kernel in (kernels.recurrent_kernel, chunk_kernels.activate_kernel, *scan):
        changing = {"num_rows", "num_tokens", "stride_table"} & set(kernel.arg_names)
        assert changing and changing <= {p.name for p in kernel.params if p.do_not_specialize}
