"""An engine's real HTTP server in a process of its own, a client of it, and what clients ask for."""

from __future__ import annotations

import concurrent.futures
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

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


def one_at_a_time(
    make: Callable[..., ServerProcess], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., ServerProcess]]:
    """Give a function that starts servers: it stops each when the next one starts, or when the fixture is over.

    make: takes a model, a log, the mem_triton section and the engine's own options.
    """
    started: list[ServerProcess] = []

    def start(model: str | Path, memory: dict[str, Any] | None = None, *given: Any, **options: Any) -> ServerProcess:
        stop()
        started.append(make(model, tmp_path_factory.mktemp("server") / "log", memory, *given, **options))
        return started[-1].wait()

    def stop() -> None:
        while started:
            started.pop().stop()

    yield start
    stop()


def session(name: str, **more: Any) -> dict[str, Any]:
    """The fields of a request with a session."""
    return {"mem_session": name, **more}


def ids(*names: str, **more: Any) -> dict[str, Any]:
    """The fields of a request that reads entries."""
    return {"mem_ids": list(names), **more}


def whole(*names: str) -> list[dict[str, Any]]:
    """The report of a request that reads entries from its first token on."""
    return [{"first_token": 0, "end_token": None, "entries": [{"id": f"{name}@1"} for name in names]}]


def at_once(count: int, visit: Callable[[int], Any]) -> list[Any]:
    """``visit(0)`` ... at the same time."""
    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        return list(pool.map(visit, range(count)))


def until(condition: Callable[[], bool], message: str, seconds: float = 30) -> None:
    """Wait until it holds; fails with ``message`` if it never does."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, message
        time.sleep(0.05)


def bad_fields_are_400(server: ServerProcess, prompt: list[int], fields: Any, message: str) -> None:
    """Before anything runs: a stream, too, answers with the status."""
    for stream in (False, True):
        response = server.complete(prompt, fields=fields, stream=stream)
        assert response.status_code == 400 and message in response.text
    assert server.tokens(prompt, 1), "the server lives"
