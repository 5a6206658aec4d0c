"""How many kernels a step launches, read off the code that the compiler makes of the real model, stock and with δ-mem.

On a CPU vLLM compiles a whole step as one graph. What it calls one after the other is what a GPU would launch: fused
pointwise code, matmuls and the engine's own ops. (There, where vLLM splits the graph at the ops, the copy of the reads
that this graph makes in each layer falls away too.)
"""

from __future__ import annotations

import re
from collections import Counter

import pytest

from tests.support.cases import request, tokens
from tests.vllm_engine.engine import run_engine

pytestmark = pytest.mark.engine

LAYERS = 2
CALL = re.compile(r"\[__output_code\] {8,}(?:buf\d+ = )?(cpp_fused|extern_kernels\.\w+|torch\.ops\.[\w.]+)\w*\(")


def launches(bench, asked: list[list[int]], tmp_path, **options) -> tuple[Counter[str], list[list[int]]]:
    """Calls of a compiled step by kind: "fused", "matmul", "ours", "engine"; and the tokens of the answers."""
    caches = {"VLLM_CACHE_ROOT": str(tmp_path / "vllm"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor")}
    result = run_engine(
        bench.model, [[request(prompt) for prompt in asked]], enforce_eager=False,
        env={"TORCH_LOGS": "output_code", "VLLM_DISABLE_COMPILE_CACHE": "1", **caches}, **options,
    )  # fmt: skip
    kinds = {"cpp": "fused", "mem_triton": "ours", "mm": "matmul", "extern": "matmul"}
    calls = CALL.findall(result["output"])
    counted = Counter(next((kind for word, kind in kinds.items() if word in call), "engine") for call in calls)
    return counted, tokens(result)


def test_launches_per_layer(bench, prompts, tmp_path):
    """δ-mem as it is wired on a GPU takes the model's matmuls and at most one launch a layer more than stock; and its
    answers are those of transformers."""
    stock, _ = launches(bench, prompts, tmp_path / "stock")
    assert stock["fused"] >= 4 * LAYERS and stock["matmul"] >= 4 * LAYERS and stock["engine"] == 2 * LAYERS, stock
    tamper = "tests.support.kernels_on_cpu:as_on_a_gpu"
    ours, answers = launches(bench, prompts, tmp_path / "ours", memory=bench.memory, tamper=tamper)
    assert answers == [bench.fresh(p) for p in prompts]
    assert ours["ours"] == LAYERS and ours["engine"] == stock["engine"]
    assert ours["matmul"] == stock["matmul"], "the projections are rows of the model's own matmul"
    assert sum(ours.values()) <= sum(stock.values()) + LAYERS, (stock, ours)


@pytest.mark.slow  # a minute, like each compilation
def test_without_the_one_launch_there_are_more(bench, prompts, tmp_path):
    """Negative control: wired as on a CPU, the projections have a matmul of their own, and norm and RoPE a launch."""
    stock, plain = (
        launches(bench, prompts[:1], tmp_path / ("plain" if memory else "stock"), memory=memory)[0]
        for memory in (None, bench.memory)
    )
    assert plain["matmul"] == stock["matmul"] + LAYERS
    assert sum(plain.values()) > sum(stock.values()) + 2 * LAYERS, (stock, plain)
