"""The fused attention kernel against the fp64 oracle, with memory watched and everything unused poisoned."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mem_triton.ops.memory_attention import FOREVER
from mem_triton.ops.memory_attention.fused import launch
from mem_triton.ops.tuning.memory_attention_fused import FusedConfig
from tests.ops.attention_case import (
    FP8,
    INT8,
    AttentionCase,
    assert_matches,
    expected,
    in_order,
    make_case,
    random_case,
)
from tests.support.interp import sanitize

WHOLE = FusedConfig(block_m=16, tile=16, warps=4, stages=1, programs=1, memory_tile=16)
SPLIT = replace(WHOLE, programs=64, min_tiles=1)  # every tile a split, where the grid is small
BOTH = pytest.mark.parametrize("config", [WHOLE, SPLIT], ids=["whole", "split"])


def run(case: AttentionCase, config: FusedConfig, order: str = "forward") -> AttentionCase:
    """The case after a launch; fails on any finding of the memory checker, and if the counters are not zero again."""
    after = case.fresh()
    workspace = launch.workspace_for(torch.device("cpu"), config, case.query.shape[2])
    workspace.partial.fill_(float("nan"))
    with sanitize(order) as findings:
        launch.attend(after.call(), config=config, workspace=workspace)
    assert not findings, "\n".join(findings)
    assert not workspace.counter.any(), "a counter is not zero: the next launch would never merge"
    return after


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-6) -> bool:
    return float((a.double() - b.double()).abs().max()) <= tolerance


@settings(max_examples=8, deadline=None, derandomize=True)
@given(seed=st.integers(0, 100_000), config=st.sampled_from([WHOLE, SPLIT, replace(SPLIT, tile=32, quantised_tile=32)]))
def test_any_batch(seed, config):
    pick = random.Random(seed)
    assert_matches(run(random_case(pick), config, pick.choice(["forward", "reverse", "shuffle"])))


@BOTH
@pytest.mark.parametrize("size", [32, 40, 80, 96, 112])
def test_every_kind_of_head(config, size):
    """Powers of two, two powers, and sizes whose rest is padded: what pads them is neither read nor written."""
    case = make_case([(3, 5), (1, 20)], memories=[[(8, 0, FOREVER)], None], size=size, heads=(2, 1), shared=5)
    assert_matches(run(case, config))


@BOTH
@pytest.mark.parametrize("group", [1, 5, 20])
def test_every_group(config, group):
    config = replace(config, block_m=32) if group > 16 else config
    assert_matches(run(make_case([(4, 5), (1, 20)], heads=(group, 1), size=32, sinks=True), config))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("page_dtype", [None, INT8, FP8])
def test_every_dtype(dtype, page_dtype):
    case = make_case(
        [(5, 10), (1, 33)],
        memories=[[(8, 0, FOREVER), (3, 11, 13)], [(7, 0, FOREVER)]],
        dtype=dtype,
        page_dtype=page_dtype,
        shared=9,
        shared_bias=-0.5,
        bias=True,
        heads=(2, 1),
    )
    assert_matches(run(case, SPLIT))


def test_every_value_of_an_8_bit_float():
    """The kernel decodes e4m3 itself, as not every GPU can: all finite values, subnormals among them."""
    case = make_case([(1, 0)], memories=[[(16, 0, FOREVER)]], page_dtype=FP8, page_size=16, heads=(1, 1), size=16)
    page = int(case.table.page[case.row_slot[0], 0])
    values = torch.arange(256, dtype=torch.uint8)
    values[(values & 0x7F) == 0x7F] = 0  # NaN
    case.pages.values[page, 0] = values.view(16, 16).view(FP8)
    case.pages.value_scale[page] = 1.0
    assert_matches(run(case, WHOLE))
    case.pages.keys[page, 0] = values.view(16, 16).view(FP8)
    assert_matches(run(case, WHOLE))


@BOTH
def test_b6_mixed_batches_with_changes_every_64_tokens_equal_the_oracle(config):
    pages = [[(8, c * 64, FOREVER if c == 2 else c * 64 + 64)] * n for c, n in enumerate((5, 3, 4))]
    case = make_case(
        [(70, 60), (1, 200), (1, 90), (1, 5), (0, 3)],
        memories=[[*pages[0], *pages[1], *pages[2]], [*pages[1], *pages[2]], None, [(8, 0, FOREVER)] * 2, []],
        heads=(2, 1),
        padding_tokens=3,
        size=16,
        dtype=torch.float32,
    )
    assert_matches(run(case, replace(config, tile=32, memory_tile=32), "shuffle"))


@BOTH
def test_pages_that_no_query_sees_are_not_read(config):
    """Decode reads the last list of many; the others may hold anything."""
    case = make_case([(1, 30)], memories=[[(8, 0, 10)] * 4 + [(8, 20, FOREVER)] + [(8, 40, 50)] * 3])
    slot = int(case.row_slot[0])
    for column in (0, 1, 2, 3, 5, 6, 7):
        case.pages.keys[int(case.table.page[slot, column])] = float("nan")
        case.pages.values[int(case.table.page[slot, column])] = float("nan")
        case.table.page[slot, column] = 1 << 28  # the memory checker would see a read
    want = replace(
        case,
        table=case.table._replace(
            **{name: getattr(case.table, name).roll(-4, 1) for name in ("page", "tokens", "first", "end")},
            count=case.table.count.clamp(max=1),
        ),
    )
    assert_matches(run(case, config), expected(want))


@BOTH
def test_rows_without_memory_are_bit_equal_to_a_call_without(config):
    case = make_case(
        [(20, 3), (1, 50), (1, 9), (5, 30)],
        memories=[[(8, 0, FOREVER)] * 3, None, [(8, 0, FOREVER)], None],
        heads=(2, 1),
        size=48,
        sinks=True,
        shared=12,
        shared_range=[(0, FOREVER), (0, 0), (0, FOREVER), (0, 0)],
        page_dtype=INT8,
    )
    with_memory, without = run(case, config), run(case.without_memory(), config)
    starts = case.context.query_start_loc.tolist()
    for row, same in enumerate([False, True, False, True]):
        tokens = slice(starts[row], starts[row + 1])
        assert torch.equal(with_memory.out[tokens], without.out[tokens]) == same
        assert torch.equal(with_memory.lse[tokens], without.lse[tokens]) == same


@settings(max_examples=3, deadline=None, derandomize=True)
@given(order=st.permutations(range(4)))
def test_b4_the_order_of_memories_does_not_matter(order):
    case = make_case([(4, 5), (1, 30)], memories=[[(8, 0, FOREVER), (5, 0, 8), (3, 7, 99), (8, 0, 9)], None], size=16)
    slot = int(case.row_slot[0])
    columns = [x.clone() for x in case.table[:4]]
    for mine, old in zip(columns, case.table[:4], strict=True):
        mine[slot, :4] = old[slot, list(order)]
    swapped = replace(case, table=case.table._replace(**dict(zip(case.table._fields[:4], columns, strict=True))))
    assert close(run(swapped, SPLIT).out, run(case, SPLIT).out)


@settings(max_examples=3, deadline=None, derandomize=True)
@given(order=st.permutations([0, 1, 2, 3, None]), padding=st.integers(0, 3), config=st.sampled_from([WHOLE, SPLIT]))
def test_a_row_is_bit_equal_whatever_stands_beside_it(order, padding, config):
    case = make_case(
        [(1, 9), (20, 3), (1, 40), (5, 0)],
        memories=[[(8, 0, FOREVER)] * 2, [(4, 7, 12)], None, []],
        shared=7,
        heads=(2, 1),
        size=16,
    )
    after = run(case, config)
    other, places = in_order(case, order, padding)
    other = run(other, config, "shuffle")
    for mine, theirs in places:
        if launch_splits(other, config) == launch_splits(case, config):
            assert torch.equal(other.out[mine], after.out[theirs]) and torch.equal(other.lse[mine], after.lse[theirs])
        else:  # another number of rows may split the keys otherwise
            assert close(other.out[mine], after.out[theirs])


def launch_splits(case: AttentionCase, config: FusedConfig) -> int:
    rows, heads = len(case.context.seq_lens), case.context.keys.shape[1]
    group = case.query.shape[1] // heads
    return launch.choose_grid(len(case.query), rows, heads, group, case.context, config).splits


@settings(max_examples=3, deadline=None, derandomize=True)
@given(cut=st.integers(1, 39), first=st.sampled_from([WHOLE, SPLIT]))
def test_a_prompt_split_anywhere_gives_the_same(cut, first):
    whole = make_case([(40, 0)], memories=[[(8, 0, 30), (8, 20, FOREVER)]], heads=(2, 1), size=16)
    after, parts = run(whole, WHOLE), whole.fresh()
    for begin, end, config in ((0, cut, first), (cut, 40, SPLIT)):
        context = whole.context._replace(
            query_start_loc=torch.tensor([0, end - begin], dtype=torch.int32),
            seq_lens=torch.tensor([end], dtype=torch.int32),
            max_query_len=end - begin,
        )
        part = replace(
            parts, query=whole.query[begin:end], out=parts.out[begin:end], lse=parts.lse[begin:end], context=context
        )
        part = run(part, config)
        parts.out[begin:end], parts.lse[begin:end] = part.out, part.lse
    assert close(parts.out, after.out) and close(parts.lse, after.lse, 2e-6)


def test_a_workspace_serves_one_launch_after_another():
    """As a replayed graph does: same buffers, other lengths, whichever program came last before."""
    workspace = launch.workspace_for(torch.device("cpu"), SPLIT, 32)
    for seed, computed in enumerate((60, 3, 40)):
        case = make_case([(1, computed), (1, 7)], memories=[[(8, 0, FOREVER)], None], heads=(2, 1), seed=seed)
        case = replace(case, context=case.context._replace(max_query_len=1))
        launch.attend(case.call(), config=SPLIT, workspace=workspace)
        assert_matches(case)


def test_the_grid_depends_on_shapes_alone():
    case = make_case([(1, 100), (1, 3)], memories=[[(8, 0, FOREVER)] * 5, None])
    grids = [
        launch.choose_grid(2, 2, 2, 2, c.context, SPLIT)
        for c in (
            case,
            case.without_memory(),
            replace(case, context=case.context._replace(seq_lens=torch.tensor([1, 1]))),
        )
    ]
    assert grids[0] == grids[1] == grids[2] and grids[0].splits > 1
    assert launch.choose_grid(2, 2, 2, 2, case.context, WHOLE).splits == 1


def test_the_checker_sees_a_merge_at_the_wrong_time():
    """Negative control: a counter that starts at -1 never makes anybody last, at 1 somebody merges before the last."""
    case = make_case([(1, 60)], heads=(2, 1))
    for start in (-1, 1):
        after = case.fresh()
        workspace = launch.workspace_for(torch.device("cpu"), SPLIT, 32)
        workspace.counter.fill_(start)
        with sanitize() as findings:
            launch.attend(after.call(lse=None), config=SPLIT, workspace=workspace)
        if start < 0:
            assert after.out.isnan().all() and workspace.counter.any()
        else:
            assert any("[race]" in line for line in findings), findings


def test_the_checker_sees_a_table_that_points_outside():
    """Negative control: a page and a block behind the end are out of bounds."""
    case = make_case([(1, 20)], memories=[[(8, 0, FOREVER)]])
    for table in (case.table.page, case.context.block_table):
        old = table.clone()
        table[:, 0] = 1 << 20
        with pytest.raises(AssertionError, match=r"\[oob\]"):
            run(case, WHOLE)
        table.copy_(old)
    run(case, WHOLE)
