"""Installed but not asked for: vLLM is the stock engine, bit for bit."""

from __future__ import annotations

import subprocess

import pytest

from tests.support.cases import request
from tests.vllm_engine.engine import run_engine, run_python

pytestmark = pytest.mark.engine


def python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    return run_python(["-c", code], "v1", env)


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
    result = python(UNPATCHED)
    assert result.returncode == 0, result.stderr[-2000:]


FOREIGN = """
import pytest, sys
sys.modules["vllm.v1.engine.async_llm"] = None          # a vLLM that moved it: importing it raises ImportError
import mem_triton_vllm
mem_triton_vllm.register()
from vllm.v1.engine.llm_engine import LLMEngine
assert LLMEngine.__init__.__module__ == "vllm.v1.engine.llm_engine", "the stock engine is untouched"
from vllm.config.load import LoadConfig
from vllm.model_executor.model_loader import get_model_loader
with pytest.raises(RuntimeError, match=r"lacks what mem_triton builds on.* vllm>=0\\.32\\.0,<0\\.34"):
    get_model_loader(LoadConfig(load_format="mem_triton"))
"""


def test_a_foreign_vllm_keeps_working_and_refuses_the_load_format():
    result = python(FOREIGN, VLLM_PLUGINS="")
    assert result.returncode == 0, result.stderr[-2000:]


BREAKABLE = """
import torch
from mem_triton_vllm import LOAD_FORMAT, loader, register, state_cache
register()
from vllm.compilation.breakable_cudagraph import is_breakable_cudagraph_enabled
from vllm.model_executor.model_loader import _LOAD_FORMAT_TO_MODEL_LOADER
assert is_breakable_cudagraph_enabled()
assert _LOAD_FORMAT_TO_MODEL_LOADER[LOAD_FORMAT] is loader.MemTritonLoader
for (name, schema), mutated in zip(state_cache.SCHEMAS.items(), (["reads"], ["projected", "reads"]), strict=True):
    function = getattr(state_cache, f"_{name}")
    function.__annotations__ = {k: eval(v, vars(state_cache)) for k, v in function.__annotations__.items()}
    assert torch.library.infer_schema(function, mutates_args=mutated) == schema, name
from mem_triton_vllm.refusals import TOUCH_POINTS, check_touch_points
check_touch_points()
state_cache.OP_NAMES = "mem_triton::gone",
assert not TOUCH_POINTS["op registration"](), "an op that is not registered is seen"
"""


def test_fault_versions_vllm_may_wrap_what_our_ops_call():
    """With the variable, which vLLM sets itself for some models, it wraps functions before they become ops."""
    result = python(BREAKABLE, VLLM_PLUGINS="", VLLM_USE_BREAKABLE_CUDAGRAPH="1")
    assert result.returncode == 0, result.stderr[-2000:]


BROKEN = """
import pytest, sys
from vllm.config.load import LoadConfig
from vllm.model_executor import model_loader
from vllm.model_executor.model_loader import _LOAD_FORMAT_TO_MODEL_LOADER as FORMATS, get_model_loader
import mem_triton_vllm
from mem_triton_vllm import block_keys

class Raises:
    error = None
    def find_spec(self, name, path=None, target=None):
        if name == "mem_triton_vllm.loader":
            raise self.error

UNPATCHED = snapshot()
def refuses(*said):
    mem_triton_vllm.register()
    assert snapshot() == UNPATCHED, "the stock engine is untouched"
    with pytest.raises(RuntimeError) as refusal:
        get_model_loader(LoadConfig(load_format="mem_triton"))
    assert all(word in str(refusal.value) for word in (*said, "vllm>=0.32")), refusal.value
    del FORMATS["mem_triton"]

sys.meta_path.insert(0, Raises())
for error in (RuntimeError("a"), SyntaxError("b"), AttributeError("c"), OSError("d"), SystemExit(3), MemoryError()):
    Raises.error = error
    refuses(type(error).__name__, str(error))
del sys.meta_path[0]

def fails(undo):
    raise ValueError("the second patch")
install, block_keys.install = block_keys.install, fails  # after the constructors are patched
refuses("ValueError: the second patch")

model_loader.register_model_loader, kept = fails, model_loader.register_model_loader
mem_triton_vllm.register()  # nothing to hang a refusal on: it is logged
assert snapshot() == UNPATCHED and "mem_triton" not in FORMATS

del sys.modules["mem_triton_vllm.loader"], mem_triton_vllm.loader
Raises.error, block_keys.install, model_loader.register_model_loader = KeyboardInterrupt(), install, kept
sys.meta_path.insert(0, Raises())
with pytest.raises(KeyboardInterrupt):
    mem_triton_vllm.register()  # control: the wish to end is no failure of ours
"""


def test_fault_versions_no_failure_of_ours_reaches_vllm():
    code = UNPATCHED.partition("before =")[0] + BROKEN
    result = python(code, VLLM_PLUGINS="")
    assert result.returncode == 0, result.stderr[-2000:]
    assert "mem_triton is off, --load-format mem_triton cannot be used" in result.stderr + result.stdout


def test_without_the_flag_logprobs_are_bit_identical(bench, prompts):
    rounds = [[request(p, logprobs=5) for p in prompts]]
    with_plugin = run_engine(bench.model, rounds)
    without = run_engine(bench.model, rounds, env={"VLLM_PLUGINS": ""})
    assert with_plugin["facts"]["engine"] == without["facts"]["engine"] == "LLMEngine"
    assert with_plugin["rounds"] == without["rounds"]
