"""The cascade's kernels compile for the GPUs we name, within registers and shared memory, and read what they must."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import pytest
import torch

from mem_triton.ops import denylist
from mem_triton.ops.tuning.memory_attention import select_pages, select_shared
from mem_triton.ops.tuning.memory_attention_fused import FusedConfig
from tests.ops.attention_case import make_case
from tests.support.aot import (
    TARGETS,
    Resources,
    check_matrix,
    check_no_padding,
    compile_for,
    types_of,
)
from tests.support.aot_suite import *  # noqa: F403
from tests.support.aot_suite import Budget, Suite

DATA = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "int8": torch.int8,
    "fp8": torch.float8_e4m3fn,
}
GROUP, PAGE_SIZE = 4, 16
REGISTERS = 255
SHARED_BUDGET = {"sm80": 82, "sm90": 113, "sm100": 113, "gfx942": 64}  # KiB; on NVIDIA half of what there is
OCCUPANCY = {"gfx942": 4}  # warps at a time: one on every scheduler; 8 on NVIDIA, two on each


class Case(NamedTuple):
    target: str
    kernel: str  # shared, pages, merge
    rows: int  # packed query rows, which choose the tile
    size: int
    query: str
    data: str


DECODE, BATCH, PREFILL = 16, 256, 8192
SERVED = [(128, "bf16", "bf16"), (128, "bf16", "fp8")]
ODD = [(80, "bf16", "bf16"), (128, "fp16", "int8"), (256, "bf16", "fp8"), (128, "fp32", "fp32")]
CASES = [  # the common shapes everywhere; the others on one GPU of each maker
    *(Case(target, "shared", BATCH, *shape) for target in TARGETS for shape in SERVED),
    *(Case(target, "pages", BATCH, *shape) for target in TARGETS for shape in SERVED),
    *(Case("sm90", "shared", rows, *shape) for rows in (DECODE, PREFILL) for shape in SERVED),
    *(Case(target, "shared", BATCH, *shape) for target in ("sm90", "gfx942") for shape in ODD),
    *(Case(target, "pages", DECODE, *shape) for target in ("sm90", "gfx942") for shape in ODD),
    *(Case(target, "merge", 0, 80, "bf16", "bf16") for target in ("sm90", "gfx942")),
]


def config_of(case: Case) -> FusedConfig:
    kernel, select = ("pages", select_pages) if case.kernel == "pages" else ("shared", select_shared)
    return denylist.allowed(kernel, select, case.target, case.size, DATA[case.query].itemsize, case.rows)


def least_bytes(case: Case) -> dict[str, tuple[int, int]]:
    """What a program cannot do without: (once, a turn of its loop over keys, or over splits)."""
    from mem_triton.ops.memory_attention.cascade.merge_kernel import ROWS

    query, data, size = DATA[case.query].itemsize, DATA[case.data].itemsize, case.size
    if case.kernel == "merge":
        return {name: (ROWS * size * query, 0) for name in ("a.data", "b.data", "output.data")}
    config = config_of(case)
    rows, tile, quantised = config.block_m, config.tile, data == 1
    merges = case.kernel == "shared" or case.rows == BATCH
    parts = rows * (size + 2) * 4
    least = {
        "query.data": (rows * size * query, 0),
        "output.data": (rows * size * query * (1 + merges), 0),
        "output.lse": (rows * 4 * (1 + merges), 0),
        "splits.partial": (parts, parts),
    }
    if case.kernel == "shared":
        least |= dict.fromkeys(("shared.k", "shared.v"), (0, tile * size * data))
        scales = {"shared.k_scale": (size * 4, 0), "shared.v_scale": (0, tile * 4)}
    else:
        least |= dict.fromkeys(("pages.k", "pages.v"), (0, tile * size * data))
        scales = {"pages.k_scale": (0, -(-tile // PAGE_SIZE) * size * 4), "pages.v_scale": (0, tile * 4)}
    return least | (scales if quantised else {})


def compile_case(case: Case, **changes) -> Resources:
    """Compile with the very arguments of a launch, whose tensors become pointers and whose numbers stay numbers."""
    from mem_triton.ops.memory_attention.cascade import launch as cascade_launch
    from mem_triton.ops.memory_attention.fused import launch

    config = config_of(case)
    heads = {"heads": (40, 8)} if case.kernel == "merge" else {"heads": (GROUP, 1)}
    memory = {"memories": [[(8, 0, 9)]], "page_size": PAGE_SIZE, "page_dtype": DATA[case.data], "shared": 16}
    batch = make_case([(1, 30)], size=case.size, dtype=DATA[case.query], bias=True, **heads, **memory)
    call = batch.memory_call(batch.out, batch.lse)
    options = {"num_warps": config.warps, "num_stages": config.stages, **launch.OPTIONS, **changes}
    workspace = launch.workspace_for(torch.device("cpu"), config, case.size)
    if case.kernel == "shared":
        kernel = cascade_launch.shared_kernel
        arguments = cascade_launch.shared_arguments(call, config, workspace, True, config.tile)
    elif case.kernel == "pages":
        kernel = cascade_launch.memory_only_kernel
        arguments = cascade_launch.pages_arguments(call, config, workspace, True, 1, case.rows == BATCH)
    else:
        kernel, options = cascade_launch.merge_kernel, {"num_warps": cascade_launch.WARPS, "enable_fp_fusion": False}
        arguments = cascade_launch.merge_arguments(*(batch.out, batch.lse) * 3)
    constants = {name: arguments.pop(name) for name in ("MERGE", "ROWS") if name in arguments}
    found = {name: types_of(value, integer, name) for name, value in arguments.items()}
    return compile_for(case.target, kernel, found, constants, **options)


def integer(name: str, value: int) -> str:
    """An integer's type: but for those of a log-sum-exp, strides are multiples of 16."""
    aligned = "stride" in name and name not in LSE_STRIDES
    return "i32:16" if aligned else "i32"


LSE_STRIDES = {f"{name}{head}" for name in ("stride_lse", "stride_a", "stride_b") for head in ("", "_head")}


def budget_of(case: Case) -> Budget:
    return Budget(
        512 if case.target == "gfx942" else REGISTERS,
        SHARED_BUDGET[case.target] * 1024,
        OCCUPANCY.get(case.target, 8),
        least=least_bytes(case),
        pads=False,
        matrix=None if case.kernel == "merge" else (config_of(case).block_m, DATA[case.query].itemsize),
    )


ALWAYS = [Case("sm90", "shared", BATCH, size, "bf16", "bf16") for size in (80, 128)]
suite = Suite(compile_case, CASES, budget_of, ALWAYS)


def test_a_spill_is_seen():
    """Negative control: two warps cannot hold the sums of 64 rows of 256 channels."""
    result = compile_case(Case("sm90", "shared", BATCH, 256, "bf16", "fp8"), num_warps=2)
    assert isinstance(result, Resources) and result.spills > 0, result


def test_a_padded_head_is_seen(monkeypatch):
    """Negative control: 80 channels as one part of 128 move no more bytes, but keep 48 lanes of nothing."""
    from mem_triton.ops.memory_attention.fused import operands

    case = Case("sm90", "shared", BATCH, 80, "bf16", "bf16")
    monkeypatch.setattr(operands, "channel_parts", lambda size: (128, 0))
    with pytest.raises(AssertionError, match=r"padding=[1-9]"):
        check_no_padding(compile_case(case))


def test_tiles_too_small_for_wgmma_are_seen(monkeypatch):
    """Negative control: Hopper's matrix instruction takes 64 rows."""
    case = Case("sm90", "shared", BATCH, 128, "bf16", "bf16")
    config = replace(config_of(case), block_m=32)
    monkeypatch.setitem(globals(), "config_of", lambda case: config)
    with pytest.raises(AssertionError, match="mma"):
        check_matrix(compile_case(case), "sm90", 64, 2)


def test_a_head_of_80_is_not_padded():
    """What a step keeps in shared memory grows with the head: 80 takes 80 / 128 of 128."""
    whole = suite[Case("sm90", "shared", BATCH, 128, "bf16", "bf16")]
    odd = suite[Case("sm90", "shared", BATCH, 80, "bf16", "bf16")]
    assert odd.shared <= whole.shared * 80 / 128 + 4096


def test_no_batch_needs_a_new_kernel():
    """What changes from step to step is not specialised; nothing compiles while serving."""
    from mem_triton.ops.memory_attention.cascade import launch as cascade_launch

    varying = {
        cascade_launch.shared_kernel: {"num_rows", "search_steps", "length", "split_length", "stride_lse_head"},
        cascade_launch.memory_only_kernel: {"num_tokens", "num_rows", "split_pages", "stride_lse_head"},
        cascade_launch.merge_kernel: {"num_rows", "stride_a_head", "stride_lse_head"},
    }
    for kernel, names in varying.items():
        assert names <= {p.name for p in kernel.params if p.do_not_specialize}
