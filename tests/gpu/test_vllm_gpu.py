"""Real vLLM with δ-mem on a GPU: CUDA graphs against eager, and both against transformers on the same GPU."""

from __future__ import annotations

import pytest
import torch

from tests.support.bench import make_bench
from tests.support.cases import request, tokens
from tests.vllm_engine.engine import run_engine

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


@pytest.fixture(scope="module")
def gpu_bench(tmp_path_factory):
    return make_bench(tmp_path_factory.mktemp("gpu"))


@pytest.fixture(scope="module")
def rounds(prompts):
    """Twice the same prompts (cold, then from the prefix cache), then a session that is told and asked."""
    session = {"fields": {"mem_session": "alice"}}
    plain = [request(p, 24) for p in prompts]
    return [plain, plain, [request(prompts[1], 24, **session)], [request(prompts[0], 24, **session)]]


@pytest.fixture(scope="module")
def prompts():
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(4, 500, (n,), generator=generator).tolist() for n in (7, 30, 150, 65)]


@pytest.mark.parametrize("attention", ["FLASH_ATTN", "TRITON_ATTN"])
def test_cuda_graphs_equal_eager_in_bf16(gpu_bench, rounds, attention):
    options = {"memory": gpu_bench.memory, "dtype": "bfloat16", "attention_backend": attention, "block_size": 32}
    eager = run_engine(gpu_bench.model, rounds, enforce_eager=True, **options)
    graphs = run_engine(gpu_bench.model, rounds, enforce_eager=False, **options)
    assert eager["facts"]["v2"] and graphs["facts"]["v2"]
    for index in range(len(rounds)):
        assert tokens(graphs, index) == tokens(eager, index)


@pytest.mark.parametrize("enforce_eager", [True, False])
def test_tokens_equal_transformers_in_fp32(gpu_bench, prompts, rounds, enforce_eager):
    options = {"memory": gpu_bench.memory, "dtype": "float32", "attention_backend": "TRITON_ATTN"}
    result = run_engine(gpu_bench.model, rounds, enforce_eager=enforce_eager, **options)
    expected = [gpu_bench.fresh(p, 24) for p in prompts]
    assert tokens(result, 0) == expected and tokens(result, 1) == expected
    gpu_bench.forget()
    assert [tokens(result, 2)[0], tokens(result, 3)[0]] == [gpu_bench.generate(p, 24) for p in (prompts[1], prompts[0])]
