"""A real ``vllm serve`` process, and a client of it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx

from tests.vllm_engine.engine import ROOT, environment


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Server:
    """A ``vllm serve`` process and a client of it."""

    def __init__(self, model: str, log: str, flags: list[str]) -> None:
        port = free_port()
        command = [
            sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", model, "--served-model-name", "m",
            "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--max-model-len", "4096",
            "--max-num-seqs", "4", "--max-num-batched-tokens", "64", "--enforce-eager", "--block-size", "32",
            "--gpu-memory-utilization", "0.3", *flags,
        ]  # fmt: skip
        self.log = open(log, "w")  # noqa: SIM115  closed in stop
        self.process = subprocess.Popen(
            command, env=environment(VLLM_ENABLE_V1_MULTIPROCESSING="1"), cwd=ROOT, stdout=self.log,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120)

    def wait(self) -> Server:
        deadline = time.monotonic() + 180
        while time.monotonic() < deadline:
            assert self.process.poll() is None, Path(self.log.name).read_text()[-5000:]
            try:
                if self.http.get("/health").status_code == 200:
                    return self
            except httpx.TransportError:
                time.sleep(0.3)
        raise AssertionError(Path(self.log.name).read_text()[-5000:])

    def complete(self, prompt: list[int], max_tokens: int = 12, **fields) -> httpx.Response:
        body = {"model": "m", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "return_token_ids": True}
        return self.http.post("/v1/completions", json={**body, "ignore_eos": True, **fields})

    def tokens(self, prompt: list[int], max_tokens: int = 12, **fields) -> list[int]:
        response = self.complete(prompt, max_tokens, **fields)
        assert response.status_code == 200, response.text
        return response.json()["choices"][0]["token_ids"]

    def metric(self, name: str) -> float:
        lines = self.http.get("/metrics").text.splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))

    def stop(self) -> None:
        self.http.close()
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGTERM)
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
        self.log.close()

    def stream(self, prompt: list[int], max_tokens: int, **fields) -> Iterator[list[int]]:
        """Token ids as they come."""
        body = {"model": "m", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
        body |= {"stream": True, "return_token_ids": True, **fields}
        with self.http.stream("POST", "/v1/completions", json=body) as lines:
            for line in lines.iter_lines():
                if line.startswith("data: {"):
                    yield json.loads(line[6:])["choices"][0]["token_ids"] or []


def memory_flags(section: dict) -> list[str]:
    """The flags that switch memory on."""
    return ["--load-format", "mem_triton", "--additional-config", json.dumps({"mem_triton": section})]
