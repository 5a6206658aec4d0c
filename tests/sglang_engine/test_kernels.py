"""Our Triton kernels in SGLang's worker, interpreted: what a GPU would run, where a CPU runs torch."""

from __future__ import annotations

import pytest

from tests.sglang_engine.engine import run_engine
from tests.support import memory_scenarios as scenarios
from tests.support.cases import tokens
from tests.support.kernels_on_cpu import RAN
from tests.support.memory_scenarios import PROMPTS, ask

pytestmark = pytest.mark.engine


@pytest.mark.parametrize(
    "page,tamper,ran",
    [
        (16, "sglang_as_on_a_gpu", ("one matmul", "scan and inputs", "inputs", "attention")),
        pytest.param(1, "both", ("scan", "step", "attention"), marks=pytest.mark.slow),
    ],
)
def test_the_triton_kernels_in_the_worker(memory_bench, bench, page, tamper, ran):
    """Prompts through the scan, attention through the fused kernel; δ-mem's step with its corrections, or alone."""
    m, (short, *_, edge) = memory_bench, PROMPTS
    batch = [ask(short, 3, "beta"), ask(edge, 3)]
    result = run_engine(
        m.model,
        [batch],
        memory={**bench.memory, **m.section()},
        page_size=page,
        chunked_prefill_size=128,
        tamper=f"tests.support.kernels_on_cpu:{tamper}",
        env={"TRITON_INTERPRET": "1"},
    )
    expected = [scenarios.answer(bench, m, short, "beta", count=3), scenarios.answer(bench, m, edge, count=3)]
    assert tokens(result) == expected
    assert all(f"{RAN} {kind}" in result["output"] for kind in ran), result["output"][-2000:]
