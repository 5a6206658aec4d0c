"""An engine's real HTTP server in a process of its own, and a client of it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import httpx

from tests.support.checkout import check_sources

TIMEOUT = 120.0
"""Seconds until a request counts as lost."""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def spawn(command: list[str], env: dict[str, str], cwd: Path, log: str | Path) -> subprocess.Popen:
    """A process in a group of its own, which prints into ``log``."""
    with open(log, "w") as file:
        return subprocess.Popen(
            command, env=env, cwd=cwd, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )


class ServerProcess:
    """The process, with whatever it spawns, from its start to its end, and OpenAI's API of it. A subclass adds the
    engine's own ways: ``tokens``, what a request generates, and ``stream``, its parts as they come.

    process: a ``Popen``, or what has its methods. log: the file that gets what it prints.
    """

    fields_in: str
    """Where a request takes memory's fields."""
    report_field: str
    """Where an answer says what was read, under "mem_triton"."""
    requests_done: str
    """The engine's metric of requests that have ended."""

    def __init__(self, process: subprocess.Popen | Any, port: int, log: str | Path) -> None:
        self.process, self.log = process, Path(log)
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=TIMEOUT)

    def wait(self):
        """Until it answers. Raises AssertionError with the end of the log if it never does."""
        deadline = time.monotonic() + 420
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.printed()[-5000:]
            try:
                if self.http.get("/health").status_code == 200:
                    check_sources(self.printed(), needed=False)
                    return self
            except httpx.TransportError:
                pass
            time.sleep(0.3)
        raise AssertionError(self.printed()[-5000:])

    def complete(
        self, prompt: Any, max_tokens: int = 12, fields: Any = None, patience: float | None = None, **others: Any
    ) -> httpx.Response:
        """A greedy completion of ``max_tokens`` tokens. patience: seconds until this client hangs up."""
        body = {"prompt": prompt, "max_tokens": max_tokens, "ignore_eos": True, "return_token_ids": True}
        return self._ask("/v1/completions", {**body, **others}, fields, patience)

    def chat(self, text: str, max_tokens: int = 12, fields: Any = None, **others: Any) -> httpx.Response:
        messages = [{"role": "user", "content": text}]
        return self._ask("/v1/chat/completions", {"messages": messages, "max_tokens": max_tokens, **others}, fields)

    def report(self, response: httpx.Response) -> Any:
        """What an answer says of its memory; None if nothing."""
        assert response.status_code == 200, response.text
        return (response.json().get(self.report_field) or {}).get("mem_triton")

    def _ask(self, path: str, body: dict[str, Any], fields: Any, patience: float | None = None) -> httpx.Response:
        body = {"model": "m", "temperature": 0, **({} if fields is None else {self.fields_in: fields}), **body}
        return self.http.post(path, json=body, timeout=patience or TIMEOUT)

    def printed(self) -> str:
        return self.log.read_text()

    def metric(self, name: str) -> float:
        """The sum over the labels of a metric."""
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
