"""``memory_attention`` against the fp64 oracle, wherever it runs: values, invariances, what stays untouched, checks.

On a GPU and in the interpreter the fused kernel; ``test_memory_cascade.py`` and ``tests/gpu`` have the other routes.
"""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from mem_triton.ops.memory_attention import FOREVER, Policy, memory_attention, reference
from mem_triton.ops.memory_attention.cpu import paged_torch, torch_parts
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
    to_device,
)
from tests.support.interp import sanitize
from tests.support.places import interpreted, ways_of

BF16, FP16 = torch.bfloat16, torch.float16


WHOLE = FusedConfig(block_m=16, tile=16, warps=4, stages=1, programs=1, memory_tile=16)
SPLIT = replace(WHOLE, programs=64, min_tiles=1)  # every tile a split, where the grid is small
WAYS = {"cpu": ("cpu", None), "whole": ("interpreter", WHOLE), "split": ("interpreter", SPLIT), "gpu": ("gpu", None)}


ways = ways_of(WAYS)
every_way, by_kernels = ways(*WAYS), ways("split", "gpu")


def run(
    case: AttentionCase, place: str = "cpu", config: FusedConfig | None = None, order: str = "forward"
) -> AttentionCase:
    """The runner: the case after the op ran. In the interpreter no finding may be made, and counters be zero again."""
    after = case.fresh()
    if place == "cpu":
        memory_attention(after.call())
        return after
    if place == "gpu":
        moved = to_device(after)
        memory_attention(moved.call(), policy=Policy("fused"))
        return to_device(moved, "cpu")
    from mem_triton.ops.memory_attention.fused import launch

    workspace = launch.workspace_for(torch.device("cpu"), config, case.query.shape[2])
    workspace.partial.fill_(float("nan"))
    with sanitize(order) as findings:
        launch.attend(after.call(), config=config, workspace=workspace)
    assert not findings, "\n".join(findings)
    assert not workspace.counter.any(), "a counter is not zero: the next launch would never merge"
    return after


def tuned(config: FusedConfig | None, **changes) -> FusedConfig | None:
    """Where the configuration is the test's own."""
    return config and replace(config, **changes)


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-6) -> bool:
    return float((a.double() - b.double()).abs().max()) <= tolerance


# --- every way --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [32, 40, 80, 96, 112])
@every_way
def test_every_kind_of_head(place, config, size):
    """Powers of two, two powers, and sizes whose rest is padded: what pads them is neither read nor written."""
    case = make_case([(3, 5), (1, 20)], memories=[[(8, 0, FOREVER)], None], size=size, heads=(2, 1), shared=5)
    assert_matches(run(case, place, config))


@pytest.mark.parametrize("group", [1, 5, 20])
@every_way
def test_every_group(place, config, group):
    config = tuned(config, block_m=32) if group > 16 else config
    assert_matches(run(make_case([(4, 5), (1, 20)], heads=(group, 1), size=32, sinks=True), place, config))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("page_dtype", [None, INT8, FP8])
@by_kernels
def test_every_dtype_by_the_kernel(place, config, dtype, page_dtype):
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
    assert_matches(run(case, place, config))


@ways("cpu", "whole", "gpu")
def test_every_value_of_an_8_bit_float(place, config):
    """The kernel decodes e4m3 itself, as not every GPU can: all finite values, subnormals among them."""
    case = make_case([(1, 0)], memories=[[(16, 0, FOREVER)]], page_dtype=FP8, page_size=16, heads=(1, 1), size=16)
    page = int(case.table.page[case.row_slot[0], 0])
    values = torch.arange(256, dtype=torch.uint8)
    values[(values & 0x7F) == 0x7F] = 0  # NaN
    case.pages.values[page, 0] = values.view(16, 16).view(FP8)
    case.pages.value_scale[page] = 1.0
    assert_matches(run(case, place, config))
    case.pages.keys[page, 0] = values.view(16, 16).view(FP8)
    assert_matches(run(case, place, config))


@ways("whole", "split", "gpu")
def test_b6_mixed_batches_by_the_kernel(place, config):
    pages = [[(8, c * 64, FOREVER if c == 2 else c * 64 + 64)] * n for c, n in enumerate((5, 3, 4))]
    case = make_case(
        [(70, 60), (1, 200), (1, 90), (1, 5), (0, 3)],
        memories=[[*pages[0], *pages[1], *pages[2]], [*pages[1], *pages[2]], None, [(8, 0, FOREVER)] * 2, []],
        heads=(2, 1),
        padding_tokens=3,
        size=16,
        dtype=torch.float32,
    )
    assert_matches(run(case, place, tuned(config, tile=32, memory_tile=32), "shuffle"))


@every_way
def test_pages_that_no_query_sees_are_not_read(place, config):
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
    assert_matches(run(case, place, config), expected(want))


@ways("whole", "split", "gpu")
def test_rows_without_memory_are_bit_equal_by_the_kernel(place, config):
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
    with_memory, without = run(case, place, config), run(case.without_memory(), place, config)
    starts = case.context.query_start_loc.tolist()
    for row, same in enumerate([False, True, False, True]):
        tokens = slice(starts[row], starts[row + 1])
        assert torch.equal(with_memory.out[tokens], without.out[tokens]) == same
        assert torch.equal(with_memory.lse[tokens], without.lse[tokens]) == same


# --- the specification ------------------------------------------------------------------------------------------------


def test_the_reference_is_a_softmax_over_the_concatenation():
    """Against PyTorch's own attention: B5, memory that holds a prefix is that prefix in the context."""
    case = make_case([(9, 4)], memories=[[(8, 0, FOREVER), (5, 0, FOREVER)]], dtype=torch.float64)
    out, lse = reference.memory_attention(case.call())
    keys, values = reference.read_context(case.context, 0, 13, torch.float64)
    slot = int(case.row_slot[0])
    memory = reference.read_memory(slot, 0, case.pages, case.table, None, torch.float64)
    keys, values = (torch.cat([*(part[i] for part in memory), x], 1) for i, x in enumerate((keys, values)))
    mask = torch.ones(9, 26, dtype=torch.bool).tril(26 - 9)
    want = F.scaled_dot_product_attention(
        case.query.transpose(0, 1)[None], keys[None], values[None], attn_mask=mask, enable_gqa=True
    )
    torch.testing.assert_close(out, want[0].transpose(0, 1), rtol=1e-12, atol=1e-12)
    logits = torch.einsum("thd,hld->thl", case.query, keys.repeat_interleave(2, 0)) * 32**-0.5
    torch.testing.assert_close(
        lse, logits.masked_fill(~mask[:, None], -torch.inf).logsumexp(-1), rtol=1e-12, atol=1e-12
    )


def test_the_oracle_sees_a_wrong_output():
    """Negative control: one element off by its budget, one unwritten, one written that nobody owns."""
    case = make_case([(3, 2), (1, 7)], memories=[[(8, 0, FOREVER)], None], padding_tokens=1)
    want, after = expected(case), run(case)
    assert_matches(after, want)
    for spoil in (
        lambda t: t.out[1, 2, 3].add_(2 * float(want.out_budget[1, 2, 3])),
        lambda t: t.lse[3, 1].mul_(1.0001),
        lambda t: t.out[3].fill_(float("nan")),
        lambda t: t.out[4].zero_(),
    ):
        spoiled = run(case)
        spoil(spoiled)
        with pytest.raises(AssertionError):
            assert_matches(spoiled, want)


# --- values -----------------------------------------------------------------------------------------------------------


@settings(max_examples=120, deadline=None, derandomize=True)
@given(seed=st.integers(0, 100_000))
def test_any_batch(seed):
    case = random_case(random.Random(seed))
    assert_matches(run(case))


@pytest.mark.parametrize("dtype", [torch.float32, BF16, FP16])
@pytest.mark.parametrize("page_dtype", [None, torch.float32, INT8, FP8])
def test_every_dtype(dtype, page_dtype):
    case = make_case(
        [(5, 10), (1, 33)],
        memories=[[(8, 0, FOREVER), (3, 11, 13)], [(7, 0, FOREVER)]],
        dtype=dtype,
        page_dtype=page_dtype,
        shared=9,
        shared_bias=-0.5,
        bias=True,
    )
    assert_matches(run(case))


def visible_by_chunk(prompt: int, lists: list[int], every: int = 64) -> list[tuple[int, int, int]]:
    """Pages of 8 tokens: ``lists[c]`` of them for the queries of chunk c, the last ones for everything after too."""
    pages = []
    for chunk, count in enumerate(lists):
        end = FOREVER if chunk == len(lists) - 1 else (chunk + 1) * every
        pages += [(8, chunk * every, end)] * count
    assert prompt >= (len(lists) - 1) * every
    return pages


def b6_case(dtype: torch.dtype = torch.float32, **options) -> AttentionCase:
    """Prompts with other references every 64 tokens, in one batch with decoding rows that have 0 to 5."""
    return make_case(
        [(150, 0), (70, 60), (1, 200), (1, 90), (1, 5), (0, 3), (4, 62)],
        memories=[
            visible_by_chunk(150, [5, 3, 4]),
            visible_by_chunk(130, [1, 0, 5]),
            visible_by_chunk(200, [2, 4, 0, 5]),
            None,
            [(8, 0, FOREVER)] * 3,
            [(8, 0, FOREVER)] * 2,
            visible_by_chunk(66, [2, 1]),
        ],
        dtype=dtype,
        padding_tokens=3,
        **options,
    )


@pytest.mark.parametrize("options", [{}, {"soft_cap": 3.0, "sinks": True, "bias": True}, {"shared": 21}])
def test_b6_mixed_batches_with_changes_every_64_tokens_equal_the_oracle(options):
    assert_matches(run(b6_case(**options)))


def test_b7_the_memories_of_one_chunk_do_not_move_the_queries_of_another():
    case = b6_case()
    after, slot = run(case), int(case.row_slot[0])
    for page in case.table.page[slot, 5:8].tolist():  # those of chunk 1
        case.pages.keys[page] *= 2
    changed = run(case)
    same = (changed.out[:150] == after.out[:150]).flatten(1).all(1)
    assert same[:64].all() and same[128:].all() and not same[64:128].any()


def test_sequences_longer_than_a_query_chunk(monkeypatch):
    from mem_triton.ops.memory_attention.cpu import paged_numba

    monkeypatch.setattr(paged_numba, "takes", lambda call: False)
    monkeypatch.setattr(paged_torch, "QUERY_CHUNK", 16)
    case = make_case(
        [(50, 0), (17, 40), (16, 0), (1, 3)], memories=[[(8, 0, 20), (8, 30, FOREVER)], None, [(3, 0, 9)], None]
    )
    assert_matches(run(case))


def test_groups_are_bounded_in_memory(monkeypatch):
    from mem_triton.ops.memory_attention.cpu import paged_numba  # a machine for kernels alone has no numba

    monkeypatch.setattr(paged_numba, "takes", lambda call: False)
    rows = [(1, n) for n in (3, 90, 17, 200, 45)]
    case = make_case(rows, memories=[[(8, 0, FOREVER)] * n for n in (1, 12, 2, 0, 7)])
    after, sizes = run(case), []
    gather = torch_parts.gather
    monkeypatch.setattr(torch_parts, "GATHER_LIMIT", 64 * 100)
    monkeypatch.setattr(paged_torch, "gather", lambda *a: sizes.append(gather(*a).numel()) or gather(*a))
    again = run(case)
    assert max(sizes) <= 64 * 208 and len(sizes) > 8  # the longest row alone goes beyond the limit
    assert close(again.out, after.out)


# --- invariances ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_rows_without_memory_are_bit_equal_to_a_call_without(dtype):
    case = make_case(
        [(40, 3), (1, 50), (1, 9), (33, 0), (1, 70), (2, 8)],
        memories=[[(8, 0, FOREVER)] * 3, None, [(8, 0, FOREVER)], None, None, []],
        dtype=dtype,
        soft_cap=0.0,
        sinks=True,
        shared=12,
        shared_range=[(0, FOREVER), (0, 0), (0, FOREVER), (0, 0), (0, 0), (0, 0)],
    )
    with_memory, without = run(case), run(case.without_memory())
    starts = case.context.query_start_loc.tolist()
    for row, same in enumerate([False, True, False, True, True, True]):  # the last one's slot has no pages
        tokens = slice(starts[row], starts[row + 1])
        assert torch.equal(with_memory.out[tokens], without.out[tokens]) == same
        assert torch.equal(with_memory.lse[tokens], without.lse[tokens]) == same


@settings(max_examples=15, deadline=None, derandomize=True)
@given(order=st.permutations(range(5)))
def test_b4_the_order_of_memories_does_not_matter(order):
    case = make_case([(6, 5), (1, 30)], memories=[[(8, 0, FOREVER), (5, 0, 8), (3, 7, 99), (8, 0, 9), (1, 0, 9)], None])
    slot = int(case.row_slot[0])
    columns = [x.clone() for x in case.table[:4]]
    for mine, old in zip(columns, case.table[:4], strict=True):
        mine[slot, :5] = old[slot, list(order)]
    swapped = replace(case, table=case.table._replace(**dict(zip(case.table._fields[:4], columns, strict=True))))
    assert close(run(swapped).out, run(case).out)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(cuts=st.sets(st.integers(1, 69), max_size=5))
def test_a_prompt_split_anywhere_gives_the_same(cuts):
    whole = make_case([(70, 0)], memories=[visible_by_chunk(70, [3, 2])], shared=9, sinks=True)
    after, parts = run(whole), whole.fresh()
    for begin, end in zip([0, *sorted(cuts)], [*sorted(cuts), 70], strict=True):
        context = whole.context._replace(
            query_start_loc=torch.tensor([0, end - begin], dtype=torch.int32),
            seq_lens=torch.tensor([end], dtype=torch.int32),
            max_query_len=end - begin,
        )
        part = replace(
            parts, query=whole.query[begin:end], out=parts.out[begin:end], lse=parts.lse[begin:end], context=context
        )
        memory_attention(part.call())
    assert close(parts.out, after.out) and close(parts.lse, after.lse, 2e-6)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(order=st.permutations([0, 1, 2, 3, None]), padding=st.integers(0, 3))
def test_a_batch_in_another_order_with_padding_gives_the_same(order, padding):
    case = make_case(
        [(1, 9), (20, 3), (1, 40), (5, 0)], memories=[[(8, 0, FOREVER)] * 2, [(4, 7, 12)], None, []], shared=7
    )
    after = run(case)
    other, places = in_order(case, order, padding)
    other = run(other)
    for mine, theirs in places:
        assert close(other.out[mine], after.out[theirs]) and close(other.lse[mine], after.lse[theirs], 2e-6)
    live = int(other.context.query_start_loc[-1])
    assert other.out[live:].isnan().all() and other.lse[live:].isnan().all()


@settings(max_examples=10, deadline=None, derandomize=True)
@given(seed=st.integers(0, 999))
def test_pages_and_blocks_anywhere_give_the_same_bits(seed):
    case = make_case([(6, 30), (1, 17)], memories=[[(8, 0, FOREVER)] * 3, [(5, 0, FOREVER)]], page_dtype=INT8)
    g = torch.Generator().manual_seed(seed)
    blocks, pages = (torch.randperm(len(x), generator=g) for x in (case.context.keys, case.pages.keys))
    context = case.context._replace(
        keys=case.context.keys[blocks],
        values=case.context.values[blocks],
        block_table=torch.argsort(blocks).int()[case.context.block_table.clamp(max=len(blocks) - 1)],
    )
    moved = replace(
        case,
        context=context,
        pages=case.pages._make(x[pages] for x in case.pages),
        table=case.table._replace(page=torch.argsort(pages).int()[case.table.page.clamp(max=len(pages) - 1)]),
    )
    after, again = run(case), run(moved)
    assert torch.equal(after.out, again.out) and torch.equal(after.lse, again.lse)


def test_empty_batches():
    for rows, padding in (([(0, 3)], 2), ([(0, 0), (0, 5)], 0)):
        case = make_case(rows, memories=[[(8, 0, FOREVER)] for _ in rows], padding_tokens=padding)
        assert run(case).out.isnan().all()
    case = make_case([(1, 3)])
    none = case.context._replace(
        block_table=case.context.block_table[:0],
        query_start_loc=case.context.query_start_loc[:1],
        seq_lens=case.context.seq_lens[:0],
    )
    assert run(replace(case, context=none)).out.isnan().all()


# --- the op -----------------------------------------------------------------------------------------------------------


def test_opcheck():
    """The declared mutation, the fake implementation and the traced op agree with what runs."""
    case = make_case([(3, 4), (1, 9)], memories=[[(8, 0, FOREVER)], None], shared=5, sinks=True, page_dtype=INT8)
    case.out.zero_(), case.lse.zero_()  # opcheck compares runs, and NaN equals nothing
    clean = lambda tensors: [x.nan_to_num() if x is not None and x.is_floating_point() else x for x in tensors]  # noqa: E731
    options = {
        "max_query_len": 3,
        "scale": case.scale,
        "soft_cap": 0.0,
        "sinks": case.sinks,
        "row_slot": case.row_slot,
        "pages": clean(case.pages),
        "table": clean(case.table),
        "shared": list(case.shared[:-1]),
        "shared_bias": 0.0,
        "lse": case.lse,
        "only_readers": False,
    }
    for chosen in (options, {**options, "row_slot": None, "pages": [], "table": [], "shared": [], "lse": None}):
        torch.library.opcheck(
            torch.ops.mem_triton.memory_attention, (case.query, clean(case.context[:5]), case.out), chosen
        )


def test_a_compiled_caller_gets_the_same_as_an_eager_one():
    case = make_case([(3, 4), (1, 9)], memories=[[(8, 0, FOREVER)], None], shared=5)
    eager, traced = run(case), case.fresh()

    @torch.compile(backend="aot_eager", fullgraph=True)
    def step(query, out, lse):
        memory_attention(case.call(query=query, out=out, lse=lse))

    step(traced.query, traced.out, traced.lse)
    assert torch.equal(traced.out, eager.out) and torch.equal(traced.lse, eager.lse)


def test_rows_that_read_nothing_are_left_to_another_backend():
    """``only_readers``: rows with memory as ever, the others not touched."""
    case = make_case([(3, 4), (2, 9), (1, 7)], memories=[[(8, 0, FOREVER)], None, []], shared=5, padding_tokens=2)
    whole, part = run(case), case.fresh()
    memory_attention(part.call(only_readers=True))
    for ours, everybody in ((part.out, whole.out), (part.lse, whole.lse)):
        assert torch.equal(ours[:3], everybody[:3]) and torch.equal(ours[5:6], everybody[5:6])
        assert ours[3:5].isnan().all() and ours[6:].isnan().all()
    nobody = case.without_memory()
    memory_attention(nobody.call(only_readers=True, lse=None))
    assert nobody.out.isnan().all()


def test_the_batch_invariant_way_attends_everybody():
    case = make_case([(1, 4)], memories=[[(8, 0, FOREVER)]])
    with pytest.raises(ValueError, match="only_readers: in the batch-invariant way"):
        memory_attention(case.call(only_readers=True, lse=None), policy=Policy(batch_invariant=True))


def test_without_lse_and_without_slots():
    case = make_case([(3, 4)], memories=[[(8, 0, FOREVER)]])
    after, alone = run(case), case.fresh()
    memory_attention(alone.call(lse=None))
    assert torch.equal(alone.out, after.out)
    plain, no_slots = run(case.without_memory()), run(replace(case, row_slot=None))
    assert torch.equal(plain.out, no_slots.out) and not torch.equal(plain.out, after.out)


@pytest.mark.parametrize(
    "name,spoil",
    [
        ("query", lambda c: {"query": c.query.double()}),
        ("query", lambda c: {"query": c.query[:, :3], "out": c.out[:, :3], "lse": c.lse[:, :3], "sinks": None}),
        ("out", lambda c: {"out": c.out[:1]}),
        ("out", lambda c: {"out": c.out.bfloat16()}),
        ("lse", lambda c: {"lse": c.lse.double()}),
        ("sinks", lambda c: {"sinks": c.sinks[:2]}),
        ("row_slot", lambda c: {"row_slot": c.row_slot.long()}),
        ("table", lambda c: {"table": None}),
        ("context.keys", lambda c: {"context": c.context._replace(keys=c.context.keys.mT)}),
        ("context.keys", lambda c: {"context": c.context._replace(keys=c.context.keys.to(torch.int8))}),
        ("context.values", lambda c: {"context": c.context._replace(values=c.context.values.contiguous())}),
        ("context.block_table", lambda c: {"context": c.context._replace(block_table=c.context.block_table.long())}),
        ("context.seq_lens", lambda c: {"context": c.context._replace(seq_lens=c.context.seq_lens.long())}),
        ("context.query_start_loc", lambda c: {"context": c.context._replace(query_start_loc=c.row_slot)}),
        ("pages.keys", lambda c: {"pages": c.pages._replace(keys=c.pages.keys[:, :1])}),
        ("pages.values", lambda c: {"pages": c.pages._replace(values=c.pages.values.float())}),
        ("pages.key_scale", lambda c: {"pages": c.pages._replace(key_scale=None)}),
        ("pages.value_scale", lambda c: {"pages": c.pages._replace(value_scale=c.pages.value_scale.mT)}),
        ("table.tokens", lambda c: {"table": c.table._replace(tokens=c.table.tokens[:, :-1])}),
        ("table.first", lambda c: {"table": c.table._replace(first=torch.cat([c.table.first] * 2, 1)[:, ::2])}),
        ("table.count", lambda c: {"table": c.table._replace(count=c.table.count[:-1])}),
        ("shared.first", lambda c: {"shared": c.shared._replace(first=c.shared.first[:-1])}),
        ("shared.keys", lambda c: {"shared": c.shared._replace(keys=c.shared.keys[..., :-1])}),
        ("shared.key_scale", lambda c: {"shared": c.shared._replace(key_scale=c.shared.key_scale.double())}),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(name, spoil):
    case = make_case([(3, 1)], memories=[[(8, 0, 9)]], shared=5, sinks=True, page_dtype=INT8, bias=True)
    case = replace(case, **spoil(case))
    with pytest.raises(ValueError, match=f"^{name}: "):
        memory_attention(case.call())


def test_an_unknown_route_is_refused():
    with pytest.raises(ValueError, match="route="):
        Policy("fastest")


def test_b12_five_references_are_no_launch_more_and_few_keys_more(monkeypatch):
    """What can be counted of a decode step's overhead; its time is in ``benchmarks``."""
    from mem_triton.ops.memory_attention.fused import launch

    launches = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda **arguments: launches.append((grid, arguments["num_warps"], arguments["num_stages"]))

    monkeypatch.setattr(launch, "attention_kernel", Kernel())
    monkeypatch.setattr(launch, "architecture", lambda device: "sm90")
    case = make_case([(1, 1023)] * 8, heads=(32, 8), size=128, dtype=BF16, memories=[[(8, 0, FOREVER)] * 5] * 8)
    for batch in (case, case.without_memory()):
        launch.attend(batch.call())
    assert len(launches) == 2 and launches[0] == launches[1]
    seen = case.table.tokens * (torch.arange(case.table.tokens.shape[1]) < case.table.count[:, None])
    keys = seen[case.row_slot.long()].sum(1)
    assert (keys == 40).all() and float((keys / case.context.seq_lens).max()) < 0.04


# --- in the interpreter -----------------------------------------------------------------------------------------------


@settings(max_examples=8, deadline=None, derandomize=True)
@given(seed=st.integers(0, 100_000), config=st.sampled_from([WHOLE, SPLIT, replace(SPLIT, tile=32, quantised_tile=32)]))
@interpreted
def test_any_batch_by_the_kernel(place, seed, config):
    pick = random.Random(seed)
    assert_matches(run(random_case(pick), place, config, pick.choice(["forward", "reverse", "shuffle"])))


@settings(max_examples=3, deadline=None, derandomize=True)
@given(order=st.permutations(range(4)))
@interpreted
def test_b4_the_order_of_memories_does_not_matter_to_the_kernel(place, order):
    case = make_case([(4, 5), (1, 30)], memories=[[(8, 0, FOREVER), (5, 0, 8), (3, 7, 99), (8, 0, 9)], None], size=16)
    slot = int(case.row_slot[0])
    columns = [x.clone() for x in case.table[:4]]
    for mine, old in zip(columns, case.table[:4], strict=True):
        mine[slot, :4] = old[slot, list(order)]
    swapped = replace(case, table=case.table._replace(**dict(zip(case.table._fields[:4], columns, strict=True))))
    assert close(run(swapped, place, SPLIT).out, run(case, place, SPLIT).out)


@settings(max_examples=3, deadline=None, derandomize=True)
@given(order=st.permutations([0, 1, 2, 3, None]), padding=st.integers(0, 3), config=st.sampled_from([WHOLE, SPLIT]))
@interpreted
def test_a_row_is_bit_equal_whatever_stands_beside_it(place, order, padding, config):
    case = make_case(
        [(1, 9), (20, 3), (1, 40), (5, 0)],
        memories=[[(8, 0, FOREVER)] * 2, [(4, 7, 12)], None, []],
        shared=7,
        heads=(2, 1),
        size=16,
    )
    after = run(case, place, config)
    other, places = in_order(case, order, padding)
    other = run(other, place, config, "shuffle")
    for mine, theirs in places:
        if launch_splits(other, config) == launch_splits(case, config):
            assert torch.equal(other.out[mine], after.out[theirs]) and torch.equal(other.lse[mine], after.lse[theirs])
        else:  # another number of rows may split the keys otherwise
            assert close(other.out[mine], after.out[theirs])


def launch_splits(case: AttentionCase, config: FusedConfig) -> int:
    from mem_triton.ops.memory_attention.fused import launch

    rows, heads = len(case.context.seq_lens), case.context.keys.shape[1]
    group = case.query.shape[1] // heads
    return launch.choose_grid(len(case.query), rows, heads, group, case.context, config).splits


@settings(max_examples=3, deadline=None, derandomize=True)
@given(cut=st.integers(1, 39), first=st.sampled_from([WHOLE, SPLIT]))
@interpreted
def test_a_prompt_split_anywhere_gives_the_same_by_the_kernel(place, cut, first):
    whole = make_case([(40, 0)], memories=[[(8, 0, 30), (8, 20, FOREVER)]], heads=(2, 1), size=16)
    after, parts = run(whole, place, WHOLE), whole.fresh()
    for begin, end, config in ((0, cut, first), (cut, 40, SPLIT)):
        context = whole.context._replace(
            query_start_loc=torch.tensor([0, end - begin], dtype=torch.int32),
            seq_lens=torch.tensor([end], dtype=torch.int32),
            max_query_len=end - begin,
        )
        part = replace(
            parts, query=whole.query[begin:end], out=parts.out[begin:end], lse=parts.lse[begin:end], context=context
        )
        part = run(part, place, config)
        parts.out[begin:end], parts.lse[begin:end] = part.out, part.lse
    assert close(parts.out, after.out) and close(parts.lse, after.lse, 2e-6)


@interpreted
def test_a_workspace_serves_one_launch_after_another(place):
    """As a replayed graph does: same buffers, other lengths, whichever program came last before."""
    from mem_triton.ops.memory_attention.fused import launch

    workspace = launch.workspace_for(torch.device("cpu"), SPLIT, 32)
    for seed, computed in enumerate((60, 3, 40)):
        case = make_case([(1, computed), (1, 7)], memories=[[(8, 0, FOREVER)], None], heads=(2, 1), seed=seed)
        case = replace(case, context=case.context._replace(max_query_len=1))
        launch.attend(case.call(), config=SPLIT, workspace=workspace)
        assert_matches(case)


@interpreted
def test_the_grid_depends_on_shapes_alone(place):
    from mem_triton.ops.memory_attention.fused import launch

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


@interpreted
def test_the_checker_sees_a_merge_at_the_wrong_time(place):
    """Negative control: a counter that starts at -1 never makes anybody last, at 1 somebody merges before the last."""
    from mem_triton.ops.memory_attention.fused import launch

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


@interpreted
def test_the_checker_sees_a_table_that_points_outside(place):
    """Negative control: a page and a block behind the end are out of bounds."""
    case = make_case([(1, 20)], memories=[[(8, 0, FOREVER)]])
    for table in (case.table.page, case.context.block_table):
        old = table.clone()
        table[:, 0] = 1 << 20
        with pytest.raises(AssertionError, match=r"\[oob\]"):
            run(case, place, WHOLE)
        table.copy_(old)
    run(case, place, WHOLE)
