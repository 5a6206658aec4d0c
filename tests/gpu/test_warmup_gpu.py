"""Real vLLM on a GPU: after its warm-up nothing compiles, which its own monitor turns into an error."""

from __future__ import annotations

import pytest
import torch

from tests.support.bench import make_bench
from tests.support.cases import request, tokens
from tests.support.memory_bench import make_memory_bench
from tests.support.memory_scenarios import PROMPTS, ask
from tests.vllm_engine.engine import run_engine

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

READ = (["alpha"], [], ["beta", "alpha"], ["beta"])


@pytest.mark.parametrize("deterministic", [False, True])
def test_no_kernel_compiles_while_serving(tmp_path, deterministic):
    """Prompts of many lengths, alone and in batches, with memory of either kind, of both and of none."""
    delta, explicit = make_bench(tmp_path / "delta"), make_memory_bench(tmp_path / "memory")
    memory = {**delta.memory, **explicit.section(), "deterministic": deterministic}
    session = {"fields": {"mem_session": "a"}}
    rounds = [
        [request(PROMPTS[1], 4, **session)],
        [ask(prompt, 8, *ids) for prompt, ids in zip(PROMPTS, READ, strict=True)],
        [request((PROMPTS[2] * 3)[:n], 2) for n in (1, 2, 5, 9, 17, 33, 65, 130, 300)],
        [request(PROMPTS[1], 4, **session)],
    ]
    result = run_engine(
        explicit.model,
        rounds,
        memory=memory,
        dtype="bfloat16",
        enforce_eager=False,
        jit_monitor_mode="error",
        max_num_batched_tokens=512,
        max_num_seqs=16,
    )
    assert all(len(answer) > 0 for index in range(len(rounds)) for answer in tokens(result, index))
    assert "JIT monitor activated" in result["output"]
