"""What SGLang's tests compare with: the same models, adapters and banks as vLLM's."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.sglang_engine.engine import run_engine
from tests.sglang_engine.server import Server
from tests.support.bench import bench, lora_bench, prompts
from tests.support.memory_bench import memory_bench
from tests.support.memory_scenarios import Run
from tests.support.server import ServerProcess, one_at_a_time

__all__ = ["bench", "lora_bench", "memory_bench", "prompts"]


@pytest.fixture(scope="module")
def start_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., ServerProcess]]:
    yield from one_at_a_time(Server, tmp_path_factory)


@pytest.fixture
def run() -> Run:
    """The engine, for as long as the requests of a test take."""
    return run_engine
