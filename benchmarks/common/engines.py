"""The engines that serve: how each is started, given a memory, and told a request's memory fields."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from enum import Enum
from pathlib import Path
from typing import Any, Protocol

from benchmarks.common.server import BenchmarkError, Launch, MemoryFlags, has_gpu


class Engine(Protocol):
    """One engine. title: its name for people. fields_in: the part of a request's body that takes the memory fields.

    target: what of the Makefile makes an environment in which it runs. packages: what such an environment has; the
    first one's command starts servers.
    """

    title: str
    fields_in: str
    target: str
    packages: tuple[str, ...]

    def launch(self, model: Path, name: str, dtype: str, at_once: int) -> Launch:
        """A server of ``model`` under ``name`` on this machine, for ``at_once`` requests of 2,048 tokens."""
        ...

    def memory(self, section: dict[str, Any] | None, file: Path) -> MemoryFlags:
        """How a server gets the mem_triton section, None for a stock one. file: a path that it may use."""
        ...


class Vllm:
    """``vllm serve``."""

    title, fields_in, target = "vLLM", "vllm_xargs", "make demo"
    packages = ("vllm", "mem_triton", "mem_triton_vllm")

    def launch(self, model: Path, name: str, dtype: str, at_once: int) -> Launch:
        command = [_beside_python("vllm"), "serve", str(model), "--served-model-name", name, "--host", "127.0.0.1"]
        command += ["--max-model-len", "2048", "--max-num-seqs", str(at_once), "--dtype", dtype]
        # On a CPU a block has 128 tokens unless it is told, and prompts as short as these would never be found again.
        command += ["--gpu-memory-utilization", "0.25"] if has_gpu() else ["--enforce-eager", "--block-size", "32"]
        environment = {
            "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; the default takes a large part of the machine
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_NO_USAGE_STATS": "1",
        }
        return Launch(command, environment)

    def memory(self, section: dict[str, Any] | None, file: Path) -> MemoryFlags:
        if section is None:
            return MemoryFlags()
        config = json.dumps({"mem_triton": section})
        return MemoryFlags(["--load-format", "mem_triton", "--additional-config", config])


class Sglang:
    """``sglang serve``."""

    title, fields_in, target = "SGLang", "custom_params", "make demo ENGINE=sglang"
    packages = ("sglang", "mem_triton", "mem_triton_sglang")

    def launch(self, model: Path, name: str, dtype: str, at_once: int) -> Launch:
        command = [_beside_python("sglang"), "serve", "--model-path", str(model), "--served-model-name", name]
        command += ["--host", "127.0.0.1", "--context-length", "2048", "--max-running-requests", str(at_once)]
        command += ["--dtype", dtype, "--sleep-on-idle"]  # a scheduler that waits would take a core from the others
        if has_gpu():
            return Launch([*command, "--mem-fraction-static", "0.25"], {})
        # The tests' platform: SGLang's own one for CPUs needs a package of kernels that no index carries.
        command += ["--device", "cpu", "--sampling-backend", "pytorch", "--max-total-tokens", str(2048 * at_once)]
        return Launch(command, {"SGLANG_PLATFORM": "torch_cpu"})

    def memory(self, section: dict[str, Any] | None, file: Path) -> MemoryFlags:
        if section is None:
            return MemoryFlags(environment={"MEM_TRITON_CONFIG": ""})  # one of the user's own is not for this server
        config = json.dumps(section, ensure_ascii=False)
        file.write_text(config + "\n")  # JSON is YAML
        environment = {"MEM_TRITON_CONFIG": str(file)}
        return MemoryFlags(["--attention-backend", "mem_triton"], environment, f"this file holding {config}")


ENGINES: dict[str, Engine] = {"vllm": Vllm(), "sglang": Sglang()}

EngineName = Enum("EngineName", {name: name for name in ENGINES}, type=str)
"""The choices of a command line's ``--engine``."""


def require_packages(engine: Engine) -> None:
    """Raise BenchmarkError if this environment cannot serve."""
    missing = [name for name in engine.packages if importlib.util.find_spec(name) is None]
    command = _beside_python(engine.packages[0])
    if not missing and not os.access(command, os.X_OK):
        missing = [f"the {Path(command).name} command ({command})"]
    if missing:
        raise BenchmarkError(
            f"This Python ({sys.executable}) has no {', '.join(missing)}. "
            f"Run `{engine.target}`, which sets up an environment with everything and uses it."
        )


def _beside_python(command: str) -> str:
    return str(Path(sys.executable).with_name(command))
