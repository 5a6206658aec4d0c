"""The fused attention kernel compiles for the GPUs we name, within its resources, and reads what it must."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import pytest
import torch

from mem_triton.ops import denylist
from mem_triton.ops.memory_attention.arguments.types import MemoryTable
from mem_triton.ops.tuning.memory_attention_fused import FusedConfig, select
from tests.ops.attention_case import FP8, INT8, make_case
from tests.support.aot import (
    TARGETS,
    Resources,
    check_prefetch,
    compile_for,
    types_of,
)
from tests.support.aot_suite import *  # noqa: F403
from tests.support.aot_suite import Budget, Suite

BF16, FP32 = torch.bfloat16, torch.float32
SHARED_BUDGET = {"sm80": 163, "sm90": 227, "sm100": 227, "gfx942": 64}  # KiB that one program can have
REGISTER_BUDGET = {"gfx942": 512}  # 255 elsewhere, and what does not fit them spills
OCCUPANCY = {"gfx942": 4}  # warps at a time: one on every scheduler; 8 on NVIDIA, two on each
PAGE_SIZE = 16
SPILL_BUDGET = 8  # bytes: ptxas spills two registers of 170 where one more program then fits a multiprocessor


class Case(NamedTuple):
    target: str
    size: int = 128
    dtype: torch.dtype = BF16
    memory: torch.dtype | None = BF16  # None: the variant for steps without any memory
    queries: int = 1
    full: bool = False  # bias, soft-cap, sinks, LSE
    part: int = 0  # of the batch-invariant way
    columns: int = 1  # of the table of pages, which is as wide as the pool has pages


CASES = [
    *(Case(target, 128, queries=q) for target in TARGETS for q in (1, 200)),
    *(Case(target, 80, memory=INT8, queries=200) for target in ("sm80", "sm90")),
    *(Case(target, 80, memory=FP8, full=True) for target in TARGETS),
    *(Case(target, 80, queries=8) for target in ("sm80", "sm90")),
    *(Case("sm90", size, queries=200) for size in (64, 96, 256)),
    Case("sm80", 256, memory=FP8, full=True),
    Case("gfx942", 256, memory=INT8, queries=200),
    *(Case("sm90", 128, memory=None, queries=q) for q in (1, 200)),
    *(Case("sm90", 128, FP32, FP32, q) for q in (1, 200)),
    Case("sm90", 32, torch.float16, torch.float16, full=True),
    Case("sm90", part=1),
    Case("sm90", queries=200, part=2),
    *(Case("sm90", queries=q, columns=16_384) for q in (1, 200)),
]


def config_of(case: Case) -> FusedConfig:
    return denylist.allowed("attention", select, case.target, case.size, case.dtype.itemsize, 4 * case.queries)


def least_bytes(case: Case) -> dict[str, tuple[int, int]]:
    """What a program cannot do without: (once, a turn of the loop over these keys, or over splits)."""
    config, size, item = config_of(case), case.size, case.dtype.itemsize
    rows, parts = config.block_m, config.block_m * (size + 2) * 4
    least = dict.fromkeys(("query.data", "output.data"), (rows * size * item, 0)) | {"splits.partial": (parts, parts)}
    least |= dict.fromkeys(("context.k", "context.v"), (0, config.tile * size * item))
    if case.full:
        least["output.lse"] = (rows * 4, 0)
    if case.memory is not None:
        quantised = case.memory.itemsize == 1
        tile = config.quantised_tile if quantised else config.memory_tile
        names = ("shared.k", "shared.v", "pages.k", "pages.v")
        least |= dict.fromkeys(names, (0, tile * size * case.memory.itemsize))
        if quantised:
            least |= dict.fromkeys(("shared.v_scale", "pages.v_scale"), (0, tile * 4))
            least["pages.k_scale"] = (0, -(-tile // PAGE_SIZE) * size * 4)
            least["shared.k_scale"] = (0, size * 4)  # once would do; it stays in the L1 cache
    return least


def compile_case(case: Case, config: FusedConfig | None = None) -> Resources:
    """Compile with the very arguments of a launch, whose tensors become pointers and whose numbers stay numbers."""
    from mem_triton.ops.memory_attention.fused import kernels, launch

    memory = {}
    if case.memory is not None:
        memory = {"memories": [[(8, 0, 9)]], "page_dtype": case.memory, "shared": 16, "page_size": PAGE_SIZE}
    batch = make_case(
        [(case.queries, 4000)],
        heads=(4, 1),
        size=case.size,
        dtype=case.dtype,
        bias=case.full and bool(memory),
        soft_cap=5.0 * case.full,
        sinks=case.full,
        **memory,
    )
    if batch.table is not None:
        wide = [None if x is None else x[:, :1].repeat(1, case.columns) for x in batch.table[:4] + batch.table[5:]]
        batch = replace(batch, table=MemoryTable(*wide[:4], batch.table.count, *wide[4:]))
    config = config or config_of(case)
    grid = launch.choose_grid(case.queries, 1, 1, 4, batch.context, config)._replace(part=case.part)
    workspace = launch.workspace_for(torch.device("cpu"), config, case.size) if grid.splits > 1 else None
    call = batch.call() if case.full else batch.call(lse=None)
    arguments = launch.kernel_arguments(call, config, grid, workspace)
    types = {name: types_of(value, integer, name) for name, value in arguments.items()}
    constants = {name: types.pop(name) for name in list(types) if types[name] is None}
    options = {"num_warps": config.warps, "num_stages": config.stages, **launch.OPTIONS}
    return compile_for(case.target, kernels.attention_kernel, types, constants, **options)


def integer(name: str, value: int) -> str:
    """An integer's type: nearly all strides are multiples of 16."""
    aligned = "stride" in name and name not in ("table.stride", "stride_block_table", "stride_lse")
    return "i32:16" if aligned else "i32"


def budget_of(case: Case) -> Budget:
    return Budget(
        REGISTER_BUDGET.get(case.target, 255),
        SHARED_BUDGET[case.target] * 1024,
        OCCUPANCY.get(case.target, 8),
        SPILL_BUDGET,
        least_bytes(case),
        pads=False,
        matrix=(config_of(case).block_m, case.dtype.itemsize),
    )


suite = Suite(compile_case, CASES, budget_of)


@pytest.mark.parametrize(
    "case", suite.of(lambda case: case.target in ("sm80", "sm90") and case.memory == BF16 and case.size <= 128)
)
def test_keys_are_on_their_way_while_others_are_multiplied(case: Case):
    """Those of the next tile, of shared segment, pages and context; and three splits where blocks are small."""
    merge = (4,) if config_of(case).merge_stages(case.size) > 1 else ()
    check_prefetch(suite[case], 2, 2, 2, *merge)


def test_a_loop_that_waits_for_what_it_asks_for_is_seen():
    """Negative control: without stages no loop copies ahead but the one that merges."""
    case = Case("sm90")
    with pytest.raises(AssertionError):
        check_prefetch(compile_case(case, replace(config_of(case), stages=1)), 2, 2, 2, 4)


def test_a_wide_table_costs_nothing():
    """A pool of 8 GiB has 16,384 pages, and so many columns has the table."""
    narrow, wide = (suite[Case("sm90", columns=n)] for n in (1, 16_384))
    assert isinstance(wide, Resources) and isinstance(narrow, Resources), wide
    assert wide.spills == 0 and wide.occupancy == narrow.occupancy == 12, (narrow, wide)


def test_another_batch_needs_no_new_kernel():
    """SGLang's block tables are as wide as the longest row of the step."""
    from mem_triton.ops.memory_attention.fused import kernels

    varying = {p.name for p in kernels.attention_kernel.params if p.do_not_specialize}
    assert {"num_rows", "stride_block_table"} <= varying


def test_a_spill_is_seen():
    """Negative control: 128 rows of 256 channels cannot fit four warps' registers."""
    result = compile_case(Case("sm80", 256, queries=200), FusedConfig(128, 64, 4, 2))
    assert isinstance(result, Resources) and result.spills > 4 * SPILL_BUDGET, result
