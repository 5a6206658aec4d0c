"""What benchmarks share: a failure names the server that died, and clients are closed however their use ends."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest

from benchmarks.common.client import Client, connected, user
from benchmarks.common.server import BenchmarkError, Launch, MemoryFlags, Server, choose_ports


def server_of(code: str, folder: Path) -> Server:
    """A process that says nothing over HTTP, on a port where nobody listens."""
    launch = Launch([sys.executable, "-c", code], {})
    return Server("stock", launch, MemoryFlags(), choose_ports(None, 1)[0], folder / "stock.log")


def ask(server: Server) -> tuple[str, Client]:
    """What a request to it ends with, and its client."""
    kept = []

    async def course() -> None:
        async with connected([server], 1, "vllm_xargs") as clients:
            kept.append(clients["stock"])
            await clients["stock"].chat(user("Hello."))

    with pytest.raises(BenchmarkError) as failure:
        asyncio.run(course())
    return str(failure.value), kept[0]


def test_a_dead_server_explains_its_client_s_failure(tmp_path):
    server = server_of("raise ValueError('no such adapter')", tmp_path)
    server.start()
    server.process.wait(60)
    said, client = ask(server)
    assert "The stock server stopped by itself with exit code 1: ValueError: no such adapter." in said
    assert client.http.is_closed


def test_the_failure_of_a_client_whose_server_lives_is_its_own(tmp_path):
    server = server_of("import time; time.sleep(600)", tmp_path)
    server.start()
    try:
        said, client = ask(server)
    finally:
        server.stop()
    assert said.startswith("The connection to the server broke") and client.http.is_closed
