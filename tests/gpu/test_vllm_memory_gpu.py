"""Real vLLM with a bank on a GPU: CUDA graphs against eager, and both against the text itself in the prompt."""

from __future__ import annotations

import pytest
import torch

from tests.support.cases import tokens
from tests.support.memory_bench import make_memory_bench
from tests.support.memory_scenarios import PROMPTS, ask, three_pages
from tests.vllm_engine.engine import run_engine

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


@pytest.fixture(scope="module")
def memory_bench(tmp_path_factory):
    return make_memory_bench(tmp_path_factory.mktemp("gpu-memory"))


@pytest.fixture(scope="module")
def rounds():
    """Twice the same batch (cold, then from the prefix cache), with and without memory."""
    short, middle, long, edge = PROMPTS
    batch = [ask(short, 24, "alpha"), ask(middle, 24), ask(long, 24, "beta"), ask(edge, 24, "alpha")]
    return [batch, batch]


@pytest.mark.parametrize("pool_dtype", ["auto", "int8", "fp8"])
def test_cuda_graphs_equal_eager_in_bf16(memory_bench, rounds, pool_dtype):
    options = {"memory": memory_bench.section(pool_dtype=pool_dtype), "dtype": "bfloat16", "block_size": 32}
    eager = run_engine(memory_bench.model, rounds, enforce_eager=True, **options)
    graphs = run_engine(memory_bench.model, rounds, enforce_eager=False, **options)
    assert eager["facts"]["v2"] and graphs["facts"]["v2"]
    for index in range(len(rounds)):
        assert tokens(graphs, index) == tokens(eager, index)


@pytest.mark.parametrize("enforce_eager", [True, False])
@pytest.mark.parametrize("pool", ["roomy", "three pages"])
def test_tokens_equal_the_text_in_the_prompt_in_fp32(memory_bench, rounds, enforce_eager, pool):
    b, (short, middle, long, edge) = memory_bench, PROMPTS
    section = b.section() if pool == "roomy" else three_pages(b)
    result = run_engine(b.model, rounds, memory=section, dtype="float32", enforce_eager=enforce_eager)
    expected = [
        b.after(short, "alpha", count=24),
        b.after(middle, count=24),
        b.after(long, "beta", count=24),
        b.after(edge, "alpha", count=24),
    ]
    assert tokens(result, 0) == expected and tokens(result, 1) == expected
