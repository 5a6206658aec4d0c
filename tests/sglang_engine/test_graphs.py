"""The contract of captured decode steps: buffers stay where they are and are refilled in place.

SGLang's own graph runner, with its buckets, static buffers and padding; only the CUDA graph is emulated
(``tests/sglang_platform``).
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.sglang_engine.engine import run_engine
from tests.support import memory_scenarios as scenarios
from tests.support.cases import tokens
from tests.support.memory_scenarios import PROMPTS, ask

pytestmark = pytest.mark.engine

GRAPHS = {
    "enable_torch_compile": True,  # SGLang captures on a CPU only with it; Dynamo itself stays off
    "cuda_graph_bs_decode": [1, 2, 4, 8],
    "cuda_graph_backend_prefill": "disabled",
    "env": {"SGLANG_PLATFORM": "torch_cpu_graph", "TORCHDYNAMO_DISABLE": "1"},
}


def test_both_memories_in_replayed_steps(memory_bench, bench):
    """Four rows in a round, and two in the next; three of four for a while, when one is padding."""
    runs = []

    def run(*args: Any, **options: Any) -> Any:
        runs.append(run_engine(*args, **options, **GRAPHS))
        return runs[-1]

    scenarios.both_memories_and_a_session_at_once(memory_bench, bench, run, 16)
    assert replays(runs[0]) >= 8 and "padded" in runs[0]["output"]


@pytest.mark.parametrize("way", ["delta", "memory"])
def test_new_tensors_in_a_replayed_step_would_be_wrong(memory_bench, bench, way):
    """Negative control: a step of its own for every replay, as an eager one has."""
    m, tamper = memory_bench, "tests.sglang_engine.tamper:new_tensors_for_replays"
    memory = bench.memory if way == "delta" else m.section()
    batch = [ask(PROMPTS[2], 12), ask(PROMPTS[1], 12)]
    result = run_engine(m.model, [batch], memory=memory, tamper=tamper, **GRAPHS)
    expected = [bench.fresh(p["prompt"]) if way == "delta" else m.after(p["prompt"]) for p in batch]
    assert replays(result) >= 8
    assert [t[:1] for t in tokens(result)] == [t[:1] for t in expected], "the prefill is eager and right"
    assert all(t != e for t, e in zip(tokens(result), expected, strict=True))


def replays(result: dict) -> int:
    marks = [line.split("replay ")[1].split(",")[0] for line in result["output"].splitlines() if ": replay " in line]
    return max(map(int, marks), default=0)
