"""Memory merged into FlashAttention's own result: a stand-in for its one function, and the real wiring around it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from vllm.v1.attention.backend import AttentionImpl

from mem_triton.ops.memory_attention import AttentionCall, memory_attention
from mem_triton_vllm import backend, flash_lse
from tests.ops.attention_case import FOREVER, assert_matches, expected, make_case

ROWS = [(1, 40), (5, 7), (1, 19)]
MEMORIES = [[(8, 0, FOREVER), (3, 0, FOREVER)], None, [(5, 0, FOREVER)]]


class Flash(AttentionImpl):
    """What vLLM's FlashAttention does with a step: one call of the function, whose log-sum-exp it does not want."""

    def __init__(self, case):
        self.case, self.scale = case, case.scale
        self.num_heads, self.head_size = case.query.shape[1:]

    def forward(self, layer, query, key, value, kv_cache, attn_metadata, output):
        output.copy_(flash_lse.flash_attn.flash_attn_varlen_func(query))
        return output


@pytest.fixture
def step(monkeypatch):
    """A layer of our class in front of ``Flash``, and a step of three rows of which two read memory."""
    case = make_case(ROWS, memories=MEMORIES)

    def flash_attn_varlen_func(query, return_softmax_lse=False):
        out, lse = torch.empty_like(query), torch.empty(query.shape[:2])
        memory_attention(AttentionCall(query, case.context, out, case.scale, lse=lse))
        return (out, lse.t()) if return_softmax_lse else out

    monkeypatch.setattr(flash_lse.flash_attn, "FlashAttentionImpl", Flash)
    monkeypatch.setattr(flash_lse.flash_attn, "flash_attn_varlen_func", flash_attn_varlen_func, raising=False)
    flash_lse.install()
    layer = backend.implementation_with_memory(Flash)(case)
    layer.mem_batch = SimpleNamespace(reading=(True, False, True), lose_step=None)
    read = {name: getattr(case, name) for name in ("row_slot", "pages", "table", "shared")}
    layer.mem_segments = SimpleNamespace(read=lambda rows: read)
    c = case.context
    metadata = SimpleNamespace(
        mem_triton=backend.Step(len(case.query), c.max_query_len, c.query_start_loc, c.seq_lens, c.block_table)
    )
    return SimpleNamespace(
        case=case, layer=layer, run=lambda: layer.forward(None, case.query, None, None, None, metadata, case.out)
    )


def test_a_step_with_memory_is_one_softmax_over_memory_and_context(step):
    step.run()
    want = expected(step.case)
    step.case.lse.copy_(want.lse)  # not handed on
    assert_matches(step.case, want)


def test_a_row_without_memory_keeps_the_bits_of_flash_attention(step):
    step.run()
    merged = step.case.out.clone()
    step.layer.mem_batch.reading = ()
    step.run()
    row = slice(*step.case.context.query_start_loc[1:3].tolist())
    assert torch.equal(merged[row], step.case.out[row]) and not torch.equal(merged[0], step.case.out[0])


def test_control_a_log_sum_exp_in_base_two_would_be_seen(step, monkeypatch):
    natural = step.layer.mem_add

    def in_base_two(layer, query, its_step, output, log_sums):
        natural(layer, query, its_step, output, [log_sum / torch.tensor(2.0).log() for log_sum in log_sums])

    monkeypatch.setattr(step.layer, "mem_add", in_base_two)
    step.run()
    want = expected(step.case)
    step.case.lse.copy_(want.lse)
    with pytest.raises(AssertionError, match="out: "):
        assert_matches(step.case, want)


def test_nothing_is_asked_of_the_function_while_nobody_reads(step):
    asked = []
    kept = flash_lse.flash_attn.flash_attn_varlen_func.__wrapped__
    flash_lse.flash_attn.flash_attn_varlen_func = flash_lse._keeping(
        lambda query, **options: asked.append(options) or kept(query, **options)
    )
    step.layer.mem_batch.reading = ()
    step.run()
    step.layer.mem_batch.reading = (True, False, True)
    step.run()
    assert asked == [{}, {"return_softmax_lse": True}]
