"""What vLLM's tests compare with."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.support.bench import bench, lora_bench, prompts
from tests.support.memory_bench import memory_bench
from tests.support.memory_scenarios import Run
from tests.support.server import ServerProcess, one_at_a_time
from tests.vllm_engine.engine import run_engine
from tests.vllm_engine.server import with_memory

__all__ = ["bench", "lora_bench", "memory_bench", "prompts"]


@pytest.fixture(scope="module")
def start_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., ServerProcess]]:
    yield from one_at_a_time(with_memory, tmp_path_factory)


@pytest.fixture
def run() -> Run:
    """The engine, for as long as the requests of a test take."""
    return run_engine
