"""Start a case in its own process, and the transformers oracle that every engine is compared with."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.support.cases import result_of
from tests.support.checkout import ROOT, check_sources, python_path
from tests.support.zygote import SPAWN, Zygote
from tests.vllm_engine.case import MARK

HERE = Path(__file__).parent
TIMEOUT = 600.0  # seconds of a case
MODULES = (
    "vllm",
    "vllm.entrypoints.cli.main",
    "vllm.entrypoints.openai.api_server",
    "vllm.v1.engine.core",
    "vllm.v1.engine.llm_engine",
    "vllm.v1.worker.cpu_worker",
    "vllm.model_executor.models.llama",
    "transformers.models.llama",
    *("compressed_tensors.compressors", "compressed_tensors.quantization", "compressed_tensors.transform"),
    *("loguru", "usearch", "vllm.entrypoints.launchers.run_batch", "vllm.entrypoints.llm", "vllm.renderers.hf"),
    *("vllm.v1.core.sched.scheduler", "vllm.v1.engine.async_llm", "vllm.v1.attention.backends.cpu_attn"),
    "vllm.model_executor.layers.quantization.compressed_tensors.utils",
    "vllm.model_executor.layers.quantization.online.base",
    *("vllm.v1.executor.multiproc_executor", "vllm.v1.engine.utils", "vllm.v1.worker.cpu_model_runner"),
    "tests.vllm_engine.ready",
)
"""What engines import sooner or later."""
DEFAULTS = {
    "enforce_eager": True,
    "max_model_len": 512,
    "dtype": "float32",
    "max_num_seqs": 4,
    "max_num_batched_tokens": 64,  # long prompts are prefilled in chunks
    "block_size": 32,
    "enable_prefix_caching": True,
    "disable_log_stats": False,
    "gpu_memory_utilization": 0.3,
    "num_gpu_blocks_override": 512,  # a GiB of zeros takes longer to write than a case's requests to run
}


def ways(every: Iterable[str], soak: str) -> list[Any]:
    """Parameters of a test, one a way to run the engine; only ``make test-all`` runs those named in ``soak``."""
    return [pytest.param(way, marks=[pytest.mark.slow] * (way in soak.split())) for way in every]


def environment(runner: str = "v1", **extra: str) -> dict[str, str]:
    """Environment of a CPU engine. runner: "v1", vLLM's default on plain CPU, or "v2", through the interpreter."""
    env = {
        **os.environ,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "TRITON_DEFAULT_FP_FUSION": "1",
        "PYTHONPATH": python_path(),
    }
    env.pop("TRITON_INTERPRET", None)
    if runner == "v2":
        env |= {"MEM_TRITON_TEST_V2": "1", "PYTHONPATH": python_path(HERE / "shim")}
    return env | extra


def run_engine(
    model: str | Path,
    rounds: list[list[dict[str, Any]]],
    *,
    memory: dict[str, Any] | None = None,
    runner: str = "v1",
    env: dict[str, str] | None = None,
    tamper: str = "",
    force_async: bool = False,
    fresh: bool = False,
    errors_are_results: bool = False,
    fails: bool = False,
    **llm: Any,
) -> Any:
    """Run rounds of requests on a real engine; returns rounds, facts and everything that was printed (output).

    memory: the mem_triton section, None for the stock engine. tamper: "module:function" that breaks something on
    purpose. fails: the engine must not start; returns its output instead. fresh: start it as users do, and not from the
    zygote.
    """
    options = {"model": str(model), **DEFAULTS, **llm}
    if memory is not None:
        options |= {"load_format": "mem_triton", "additional_config": {"mem_triton": memory}}
    case = {
        "llm": options,
        "rounds": rounds,
        "tamper": tamper,
        "force_async": force_async,
        "errors_are_results": errors_are_results,
    }
    process = run_python(["-m", "tests.vllm_engine.case"], runner, env or {}, json.dumps(case), fresh)
    result = result_of(process, MARK, fails)
    if memory is not None and not fails:
        check_sources(result["output"], needed=True)
    return result


def run_python(
    command: Sequence[str], runner: str, env: dict[str, str], stdin: str = "", fresh: bool = False
) -> subprocess.CompletedProcess[str]:
    """Run ``-m MODULE`` or ``-c CODE`` to its end. fresh: in an interpreter that has imported nothing yet."""
    env = environment(runner, **env)
    if fresh or SPAWN:
        return subprocess.run(
            [sys.executable, *command], input=stdin, capture_output=True, text=True, env=env, cwd=ROOT, timeout=TIMEOUT
        )
    return zygote(runner).run(command, forked(env, runner), TIMEOUT, stdin)


def forked(env: dict[str, str], runner: str = "v1") -> dict[str, str]:
    """The environment of a fork: workers are forks, too, and what ``shim`` set when Python started is still set."""
    interpreted = {"TRITON_INTERPRET": "1"} if runner == "v2" else {}
    return {"VLLM_WORKER_MULTIPROC_METHOD": "fork", **interpreted, **env}


@functools.cache
def zygote(runner: str) -> Zygote:
    """The process that starts others without importing vLLM again. The second runner's interprets Triton."""
    return Zygote(MODULES, environment(runner), ROOT)
