"""Layers of an engine's steps on a CPU: the planned way has the bits of the op, and a prompt's cut moves no bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mem_triton.ops.memory_attention import FOREVER, memory_attention, planned
from tests.ops.attention_case import AttentionCase, assert_matches, make_case
from tests.ops.test_packed_attention import packed

ROWS = [(1, 150), (1, 20), (70, 30), (1, 130)]
MEMORIES = [[(8, 0, FOREVER)] * 5, None, [(8, 0, 64), (8, 64, FOREVER)], [(3, 0, FOREVER)]]


def case_of(dtype: torch.dtype, **options) -> AttentionCase:
    return packed(make_case(ROWS, heads=(6, 2), block_size=32, memories=MEMORIES, dtype=dtype, **options), "columns")


def attend(layer: planned.PlannedLayer, case: AttentionCase, plans: planned.Plans) -> AttentionCase:
    """One layer of a step. The step's numbers lie where they are in ``case``, its result in a fresh tensor."""
    after = replace(case, out=torch.zeros_like(case.out), lse=None)
    make = lambda: after.call()._replace(only_readers=True)  # noqa: E731
    layer.attend(after.query, after.out, case.context.keys, plans, make)
    return after


def by_the_op(case: AttentionCase) -> torch.Tensor:
    out = torch.zeros_like(case.out)
    memory_attention(replace(case, out=out, lse=None).call()._replace(only_readers=True))
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_of_two_layers_have_the_bits_of_the_op(dtype):
    """Lengths, tables and who reads change between steps; the first step of a layer is the op's own."""
    first, second = case_of(dtype), case_of(dtype, shared=21)
    longer, nobody = torch.tensor([151, 21, 100, 131], dtype=torch.int32), torch.full((4,), -1, dtype=torch.int32)
    layers = [planned.PlannedLayer(), planned.PlannedLayer()]
    for changed, slots in [({}, {}), ({"seq_lens": longer}, {}), ({}, {"row_slot": nobody}), ({}, {})]:
        plans: planned.Plans = {}
        for layer, case in zip(layers, (first, second), strict=True):
            now = replace(case, context=case.context._replace(**changed), **slots)
            assert torch.equal(attend(layer, now, plans).out, by_the_op(now))
    assert len(plans) == 2, "one for layers with a shared segment, one for those without"


def test_a_step_is_planned_and_checked_once(monkeypatch):
    case, checked = case_of(torch.float32), []
    monkeypatch.setattr(planned, "check", lambda call: checked.append(call))
    layers = [planned.PlannedLayer() for _ in range(5)]
    for _ in range(3):
        plans: planned.Plans = {}
        for layer in layers:
            attend(layer, case, plans)
    assert len(checked) == 2, "in the first step each layer's call is the op's"


def test_what_a_layer_reads_elsewhere_is_seen():
    """Another KV cache, as after an engine's sleep, and queries that lie otherwise."""
    layer, case = planned.PlannedLayer(), case_of(torch.float32)
    for _ in range(2):
        attend(layer, case, {})
    halves = torch.stack([case.context.keys, case.context.values], 2) * 2
    moved = replace(case, context=case.context._replace(keys=halves[:, :, 0], values=halves[:, :, 1]))
    wide = torch.randn(*case.query.shape[:2], 2 * case.query.shape[2])
    for now in (moved, moved, replace(moved, query=wide[..., : case.query.shape[2]])):
        assert torch.equal(attend(layer, now, {}).out, by_the_op(now))


def test_a_call_that_does_not_fit_is_refused_in_a_later_step():
    layer, case = planned.PlannedLayer(), case_of(torch.float32)
    attend(layer, case, {})
    wrong = replace(case, context=case.context._replace(seq_lens=case.context.seq_lens.long()))
    with pytest.raises(ValueError, match="seq_lens"):
        attend(layer, wrong, {})


@pytest.mark.parametrize("kind", ["rows", "columns"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_prompt_in_parts_has_the_bits_of_the_whole(dtype, kind):
    """Where all of its queries see its memories."""
    whole = make_case(
        [(150, 3)],
        heads=(6, 2),
        size=64,
        block_size=32,
        memories=[[(8, 0, FOREVER), (5, 0, FOREVER)]],
        dtype=dtype,
        shared=21,
    )
    whole = whole if kind == "rows" else packed(whole, kind)
    memory_attention(whole.call())
    assert_matches(whole) if kind == "rows" else None
    for cut in ([1] * 5 + [145], [16, 17, 50, 67], [149, 1]):
        begin = 0
        for count in cut:
            part = slice(begin, begin + count)
            begin += count
            step = whole.context._replace(
                query_start_loc=torch.tensor([0, count], dtype=torch.int32),
                seq_lens=torch.tensor([3 + begin], dtype=torch.int32),
                max_query_len=count,
            )
            out = torch.empty_like(whole.out[part])
            memory_attention(whole.call()._replace(query=whole.query[part], context=step, out=out, lse=None))
            assert torch.equal(out, whole.out[part]), (cut, count)
