"""Start a case on SGLang in its own process; the transformers oracles are those that vLLM is compared with."""

from __future__ import annotations

import atexit
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.sglang_engine.case import MARK, TAMPER
from tests.support.cases import result_of
from tests.support.checkout import ROOT, check_sources, python_path
from tests.support.zygote import SPAWN, Zygote

TIMEOUT = 600.0  # seconds of a case
MODULES = (
    *("sglang", "sglang.srt.entrypoints.http_server", "sglang.srt.managers.scheduler", "sglang.srt.models.registry"),
    "tests.support.ready_numba",
)
READ_BEFORE = ("SGLANG_", "TORCH", "TRITON_")
"""How the variables begin that are read when SGLang is imported."""
DEFAULTS = {
    "device": "cpu",
    "dtype": "float32",
    "sampling_backend": "pytorch",
    "grammar_backend": "none",
    "context_length": 512,
    "max_total_tokens": 2048,
    "max_running_requests": 8,
    "chunked_prefill_size": 64,  # long prompts are prefilled in chunks
    "random_seed": 0,
    "log_level": "info",
}


def with_lora(folder: str) -> dict[str, Any]:
    """Options of an engine that serves the LoRA adapter in a folder, which is its name, too, on a CPU."""
    return {
        "enable_lora": True,
        "max_lora_rank": 8,
        "lora_paths": {folder: folder},
        "lora_target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        "lora_backend": "torch_native",
        "tamper": "tests.sglang_engine.tamper:no_pinned_memory",
    }


def environment(**extra: str) -> dict[str, str]:
    """Environment of an engine on the test platform."""
    env = {
        **os.environ,
        "SGLANG_PLATFORM": "torch_cpu",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": python_path(),
    }
    env.pop("TRITON_INTERPRET", None)
    return env | extra


def write_config(memory: dict[str, Any], folder: Path | None = None) -> Path:
    """The section as the file that ``MEM_TRITON_CONFIG`` names. folder: None is one that goes when the tests end."""
    if folder is None:
        folder = Path(tempfile.mkdtemp(prefix="mem-triton-test-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    path = folder / "mem.yaml"
    path.write_text(json.dumps(memory))  # JSON is YAML
    return path


def run_engine(
    model: str | Path,
    rounds: list[list[dict[str, Any]]],
    *,
    memory: dict[str, Any] | None = None,
    env: dict[str, str] | None = None,
    tamper: str = "",
    errors_are_results: bool = False,
    fails: bool = False,
    **engine: Any,
) -> Any:
    """Run rounds of requests on a real engine; returns rounds, facts and everything that was printed (output).

    memory: the mem_triton section, None for the stock engine. tamper: "module:function" that breaks something on
    purpose. fails: the engine must not start, or die; returns its output instead.
    """
    options = {"model_path": str(model), **DEFAULTS, "sleep_on_idle": True, **engine}  # else an idle one takes a core
    set_before = tuple(sorted(item for item in (env or {}).items() if item[0].startswith(READ_BEFORE)))
    env = environment(**(env or {}))
    if memory is not None:
        options["attention_backend"] = "mem_triton"
        env["MEM_TRITON_CONFIG"] = str(write_config(memory))
    if tamper:
        env[TAMPER] = tamper
    if (ranks := options.get("tp_size", 1) * options.get("pp_size", 1)) > 1:
        env["SGLANG_CPU_OMP_THREADS_BIND"] = "|".join(str(rank % os.cpu_count()) for rank in range(ranks))
    case = {"engine": options, "rounds": rounds, "errors_are_results": errors_are_results}
    process = run_python(["-m", "tests.sglang_engine.case"], env, set_before, stdin=json.dumps(case))
    result = result_of(process, MARK, fails)
    if memory is not None and not fails:
        check_sources(result["output"], needed=True)
    return result


def run_python(
    command: Sequence[str],
    env: dict[str, str],
    set_before: tuple[tuple[str, str], ...] = (),
    stdin: str = "",
    fresh: bool = False,
) -> subprocess.CompletedProcess[str]:
    """Run ``-m MODULE`` or ``-c CODE`` to its end. set_before: what SGLang finds in its environment already when it is
    imported. fresh: in an interpreter that has imported nothing yet."""
    if fresh or SPAWN:
        return subprocess.run(
            [sys.executable, *command], input=stdin, capture_output=True, text=True, env=env, cwd=ROOT, timeout=TIMEOUT
        )
    return zygote(set_before).run(command, env, TIMEOUT, stdin)


@functools.cache
def zygote(set_before: tuple[tuple[str, str], ...] = ()) -> Zygote:
    """The process that starts others without importing SGLang again."""
    return Zygote(MODULES, environment(**dict(set_before)), ROOT)
