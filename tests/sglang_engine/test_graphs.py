"""The contract of captured decode steps: buffers stay where they are and are refilled in place.

SGLang's own graph runner, with its buckets, static buffers and padding; only the CUDA graph is emulated
(``tests/sglang_platform``).
"""

from __future__ import annotations

import pytest

from tests.sglang_engine.engine import request, run_engine, tokens
from tests.support import memory_scenarios as scenarios
from tests.support.memory_scenarios import PROMPTS, ask

pytestmark = pytest.mark.engine

GRAPHS = {
    "enable_torch_compile": True,  # SGLang captures on a CPU only with it; Dynamo itself stays off
    "cuda_graph_bs_decode": [1, 2, 4, 8],
    "cuda_graph_backend_prefill": "disabled",
    "env": {"SGLANG_PLATFORM": "torch_cpu_graph", "TORCHDYNAMO_DISABLE": "1"},
}


def test_both_memories_in_replayed_steps(memory_bench, bench):
    """Three rows in a graph of four: one is padding."""
    result = run_engine(
        bench.model, [[request(PROMPTS[0], 12), request(PROMPTS[2], 12), request(PROMPTS[1], 12)]],
        memory=bench.memory, **GRAPHS,
    )  # fmt: skip
    assert tokens(result) == [bench.fresh(PROMPTS[i]) for i in (0, 2, 1)]
    assert replays(result) >= 8 and "padded" in result["output"]
    scenarios.both_memories_and_a_session_at_once(memory_bench, bench, run_engine, 16, **GRAPHS)


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
