"""What vLLM's tests compare with."""

from __future__ import annotations

import pytest

from tests.support.bench import bench, lora_bench, prompts
from tests.support.memory_bench import MemoryBench, make_memory_bench

__all__ = ["bench", "lora_bench", "prompts"]


@pytest.fixture(scope="session")
def memory_bench(tmp_path_factory: pytest.TempPathFactory) -> MemoryBench:
    return make_memory_bench(tmp_path_factory.mktemp("memory"))
