"""What SGLang's tests compare with: the same models, adapters and banks as vLLM's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.sglang_engine.server import Server
from tests.support.bench import bench, lora_bench, prompts
from tests.support.memory_bench import MemoryBench, make_memory_bench

__all__ = ["bench", "lora_bench", "prompts"]


@pytest.fixture(scope="session")
def memory_bench(tmp_path_factory: pytest.TempPathFactory) -> MemoryBench:
    return make_memory_bench(tmp_path_factory.mktemp("memory"))


@pytest.fixture(scope="module")
def start_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Server]]:
    """Starts servers, with the arguments of ``Server`` but its log; stops each when the next one starts, or when the
    module is over."""
    started: list[Server] = []

    def start(model: str | Path, memory: dict | None = None, **options: Any) -> Server:
        stop()
        started.append(Server(model, tmp_path_factory.mktemp("server") / "log", memory, **options))
        return started[-1].wait()

    def stop() -> None:
        while started:
            started.pop().stop()

    yield start
    stop()
