"""Installed but not asked for: vLLM is the stock engine, bit for bit."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.support.cases import request
from tests.vllm_engine.engine import ROOT, environment, run_engine

UNPATCHED = """
import vllm.v1.worker.gpu_model_runner as runner, vllm.v1.core.kv_cache_utils as hashing
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.llm_engine import LLMEngine
from vllm.v1.worker.worker_base import WorkerBase

def snapshot():
    owners = AsyncLLM, LLMEngine, runner.GPUModelRunner, WorkerBase, hashing
    return {(o.__name__, n): v for o in owners for n, v in vars(o).items() if callable(v)}

before = snapshot()
from vllm.plugins import load_general_plugins
load_general_plugins()
after = snapshot()
changed = sorted(k for k in after if before.get(k) is not after[k])
looks = [("AsyncLLM", "__init__"), ("LLMEngine", "__init__"), (hashing.__name__, "generate_block_hash_extra_keys")]
assert changed == looks, changed
from vllm.model_executor.model_loader import _LOAD_FORMAT_TO_MODEL_LOADER
assert "mem_triton" in _LOAD_FORMAT_TO_MODEL_LOADER
load_general_plugins.__globals__["plugins_loaded"] = False
load_general_plugins()
assert snapshot() == after, "registering twice changes nothing"
"""


def test_without_the_flag_only_two_constructors_and_the_block_hash_look():
    subprocess.run([sys.executable, "-c", UNPATCHED], check=True, env=environment(), cwd=ROOT)


FOREIGN = """
import pytest, sys
sys.modules["vllm.v1.engine.async_llm"] = None          # a vLLM that moved it: importing it raises ImportError
import mem_triton_vllm
mem_triton_vllm.register()
from vllm.v1.engine.llm_engine import LLMEngine
assert LLMEngine.__init__.__module__ == "vllm.v1.engine.llm_engine", "the stock engine is untouched"
from vllm.config.load import LoadConfig
from vllm.model_executor.model_loader import get_model_loader
with pytest.raises(RuntimeError, match=r"lacks what mem_triton builds on.* vllm>=0\\.32\\.0,<0\\.33"):
    get_model_loader(LoadConfig(load_format="mem_triton"))
"""


def test_a_foreign_vllm_keeps_working_and_refuses_the_load_format():
    env = environment(VLLM_PLUGINS="")
    result = subprocess.run([sys.executable, "-c", FOREIGN], capture_output=True, text=True, env=env, cwd=ROOT)
    assert result.returncode == 0, result.stderr[-2000:]


@pytest.mark.engine
def test_without_the_flag_logprobs_are_bit_identical(bench, prompts):
    rounds = [[request(p, logprobs=5) for p in prompts]]
    with_plugin = run_engine(bench.model, rounds)
    without = run_engine(bench.model, rounds, env={"VLLM_PLUGINS": ""})
    assert with_plugin["facts"]["engine"] == without["facts"]["engine"] == "LLMEngine"
    assert with_plugin["rounds"] == without["rounds"]
