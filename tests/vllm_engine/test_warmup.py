"""vLLM's JIT warm-up compiles whatever serving launches: recorded on a real engine with our kernels interpreted."""

from __future__ import annotations

import pytest

from mem_triton.runtime.worker.warmup import batches
from tests.support.cases import request
from tests.support.memory_scenarios import PROMPTS, ask
from tests.support.specialisations import CHUNKS, OURS
from tests.support.warmup_on_cpu import COLD, FORGETFUL, MISSED, SERVED, WARMED
from tests.vllm_engine.engine import run_engine

SHORT, LONG = PROMPTS[0], PROMPTS[1] * 3
TRAFFIC = [  # alone and together; short and long; with memory of either kind, of both, of none
    [request(SHORT, 2)],
    [ask(SHORT, 2, "alpha"), ask(LONG[:100], 2), request(SHORT[:5], 2, fields={"mem_session": "a"})],
]


@pytest.mark.engine
def test_serving_launches_nothing_that_is_cold(bench, memory_bench):
    """And would, were the warm-up to leave out any of three things."""
    memory = {**bench.memory, **memory_bench.section()}
    output = run_engine(
        memory_bench.model,
        TRAFFIC,
        memory=memory,
        runner="v2",
        max_num_batched_tokens=128,
        tamper="tests.support.warmup_on_cpu:vllm",
    )["output"]
    assert WARMED in output and COLD not in output, [line for line in output.splitlines() if COLD in line][:5]
    for kernel in ("attention_kernel", "recurrent_kernel", *CHUNKS, "inputs_kernel"):
        assert f"{SERVED} {kernel}" in output and kernel in OURS
    assert all(f"{MISSED} {control}" in output for control in FORGETFUL), "a control that nothing would notice"


def test_batches_stand_on_both_sides_of_every_border():
    """And within the engine's limits: a batch beyond them would be another launch than any that serving makes."""
    for group in (1, 4, 7):
        found = batches(group, max_rows=100, max_tokens=2048)
        assert all(1 <= b.longest <= b.tokens <= 2048 and 1 <= b.rows <= 100 for b in found)
        lengths = {b.longest for b in found}
        assert {1, 2, 65, 2048, 16 // group, 16 // group + 1, 64 // group + 1} <= lengths
        assert {b.rows for b in found if b.longest == 1} >= {1, 2, 64, 100}
    assert len(batches(4, 1024, 16384)) < 2000, "each is a launch"
