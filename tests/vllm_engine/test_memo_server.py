"""MeMo on a real ``vllm serve``: one name for both models beside the server's own, which answer as they did."""

from __future__ import annotations

import os
import signal
import sys

import pytest

from mem_triton.runtime.serving import Serving
from tests.support.memo_server_scenarios import *  # noqa: F403
from tests.support.memo_server_scenarios import Start, names_are
from tests.support.server import ServerProcess, free_port, spawn
from tests.vllm_engine.engine import ROOT, environment
from tests.vllm_engine.server import Server

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def start(lora_bench) -> Start:
    def start(memory: dict, log: str) -> Server:
        """With the options that ``mem-triton serve`` gives."""
        serving = Serving("vllm", str(lora_bench.model), memory, {"memo": lora_bench.lora})
        serving.check()
        env = {**serving.environment, "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
        return Server(str(lora_bench.model), log, serving.options(), **env)

    return start


@pytest.mark.slow
def test_the_command_becomes_the_server_and_ends_as_it_does(lora_bench, tmp_path):
    port = free_port()
    command = [sys.executable, "-m", "mem_triton.cli", "serve", str(lora_bench.model), "--memo", str(lora_bench.lora)]
    options = ["--", "--served-model-name", "m", "--port", str(port), "--dtype", "float32", "--enforce-eager"]
    options += ["--max-model-len", "4096", "--gpu-memory-utilization", "0.3", "--block-size", "32"]
    log = tmp_path / "log"
    server = ServerProcess(spawn([*command, "--engine", "vllm", *options], environment(), ROOT, log), port, log)
    try:
        names_are(server.wait(), "m", "memo", "m+memo")
        os.kill(server.process.pid, signal.SIGTERM)
        assert server.process.wait(60) == 0, server.printed()[-2000:]
    finally:
        server.stop()
