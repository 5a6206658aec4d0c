"""Real vLLM compiled: its answers, and how many kernels a step launches, read off the code that the compiler makes.

On a CPU vLLM compiles a whole step as one graph. What it calls one after the other is what a GPU would launch: fused
pointwise code, matmuls and the engine's own ops. (There, where vLLM splits the graph at the ops, the copy of the reads
that this graph makes in each layer falls away too.)
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from typing import Any

import pytest

from tests.support.cases import request, tokens
from tests.vllm_engine.engine import run_engine

pytestmark = pytest.mark.engine

LAYERS = 2
CALL = re.compile(r"\[__output_code\] {8,}(?:buf\d+ = )?(cpp_fused|extern_kernels\.\w+|torch\.ops\.[\w.]+)\w*\(")
KINDS = {"cpp": "fused", "mem_triton": "ours", "mm": "matmul", "extern": "matmul"}
SHOWN = "tests.vllm_engine.tamper:show_code"


@pytest.fixture(scope="module")
def compiled(bench, prompts, tmp_path_factory):
    """name -> result of a compiled engine: "stock", "cpu" (with δ-mem) or "gpu" (with it, wired as there).

    All prompts are asked twice. A compilation takes half a minute, so each engine runs once; what one C++ compiler has
    made, the next one has.
    """
    cpu = {"memory": bench.memory, "tamper": SHOWN}
    sides = {"stock": {"tamper": SHOWN}, "cpu": cpu, "gpu": {**cpu, "tamper": f"{SHOWN}_as_on_a_gpu"}}
    cache = tmp_path_factory.mktemp("compiled")

    @functools.cache
    def run(name: str) -> dict[str, Any]:
        caches = {"VLLM_CACHE_ROOT": str(cache / name), "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor")}
        return run_engine(
            bench.model,
            [[request(prompt) for prompt in prompts]] * 2,
            enforce_eager=False,
            **sides[name],
            env={"VLLM_DISABLE_COMPILE_CACHE": "1", **caches},
        )

    return run


def launches(result: dict[str, Any]) -> Counter[str]:
    """Calls of a compiled step by kind: "fused", "matmul", "ours", "engine"."""
    calls = CALL.findall(result["output"])
    return Counter(next((kind for word, kind in KINDS.items() if word in call), "engine") for call in calls)


@pytest.mark.parametrize("wiring", ["cpu", "gpu"])
def test_a9_tokens_equal_transformers_cold_and_from_the_prefix_cache(compiled, bench, prompts, wiring):
    result = compiled(wiring)
    assert tokens(result, 0) == tokens(result, 1) == [bench.fresh(p) for p in prompts]
    assert [answer["cached"] for answer in result["rounds"][1]] == [0, 0, 128, 64], "states came with their blocks"


def test_launches_per_layer(compiled):
    """δ-mem as it is wired on a GPU takes the model's matmuls and at most one launch a layer more than stock."""
    stock, ours = launches(compiled("stock")), launches(compiled("gpu"))
    assert stock["fused"] >= 4 * LAYERS and stock["matmul"] >= 4 * LAYERS and stock["engine"] == 2 * LAYERS, stock
    assert ours["ours"] == LAYERS and ours["engine"] == stock["engine"]
    assert ours["matmul"] == stock["matmul"], "the projections are rows of the model's own matmul"
    assert sum(ours.values()) <= sum(stock.values()) + LAYERS, (stock, ours)


def test_without_the_one_launch_there_are_more(compiled):
    """Negative control: wired as on a CPU, the projections have a matmul of their own, and norm and RoPE a launch."""
    stock, plain = launches(compiled("stock")), launches(compiled("cpu"))
    assert plain["matmul"] == stock["matmul"] + LAYERS
    assert sum(plain.values()) > sum(stock.values()) + 2 * LAYERS, (stock, plain)
