"""What is compiled before SGLang serves is all that it launches: recorded on a real engine with kernels interpreted."""

from __future__ import annotations

import pytest

from tests.sglang_engine.engine import run_engine
from tests.support.cases import request
from tests.support.memory_scenarios import PROMPTS, ask
from tests.support.specialisations import CHUNKS
from tests.support.warmup_on_cpu import COLD, FORGETFUL, MISSED, SERVED, WARMED

pytestmark = pytest.mark.engine

SHORT, LONG = PROMPTS[0], PROMPTS[1] * 3


def test_serving_launches_nothing_that_is_cold(memory_bench, bench):
    """Block tables are as wide here as the longest row of the step, which may not matter."""
    m = memory_bench
    rounds = [[request(SHORT, 3)], [ask(SHORT, 2, "alpha"), ask(LONG, 2), request(SHORT[:5], 2)]]
    output = run_engine(
        m.model,
        rounds,
        memory={**bench.memory, **m.section()},
        page_size=16,
        chunked_prefill_size=128,
        tamper="tests.support.warmup_on_cpu:sglang",
        env={"TRITON_INTERPRET": "1"},
    )["output"]
    assert WARMED in output and COLD not in output, [line for line in output.splitlines() if COLD in line][:5]
    for kernel in ("attention_kernel", "recurrent_kernel", *CHUNKS, "inputs_kernel"):
        assert f"{SERVED} {kernel}" in output, output[-2000:]
    assert all(f"{MISSED} {control}" in output for control in FORGETFUL), "a control that nothing would notice"
