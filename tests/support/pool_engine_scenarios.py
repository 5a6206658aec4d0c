"""What every engine must do with MemoryLLM's pools: tests that each engine's file imports."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.memory_scenarios import Run
from tests.support.pool_bench import PoolBench, make_pool_bench
from tests.support.pool_scenarios import texts_are_written_and_read, versions_are_read_in_turn


@pytest.fixture(scope="module")
def pool_bench(tmp_path_factory: pytest.TempPathFactory) -> PoolBench:
    return make_pool_bench(tmp_path_factory.mktemp("pools"))


def test_c3_c4_c5_c8_texts_are_written_and_read(pool_bench: PoolBench, tmp_path: Path, run: Run) -> None:
    texts_are_written_and_read(pool_bench, tmp_path, run)


def test_c3_a_first_write_into_a_pool_without_rows(tmp_path: Path, run: Run) -> None:
    texts_are_written_and_read(make_pool_bench(tmp_path / "bench", initialized=False), tmp_path, run)


def test_c2_versions_are_read_in_turn(pool_bench: PoolBench, tmp_path: Path, run: Run) -> None:
    versions_are_read_in_turn(pool_bench, tmp_path, run)
