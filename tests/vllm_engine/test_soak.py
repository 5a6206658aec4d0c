"""Random clients of a real vLLM, many of whom leave (see ``tests.support.soak``)."""

from __future__ import annotations

import pytest

from tests.support.soak import SECONDS, Soak, right_answers

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(SECONDS + 600)]


def test_random_clients_leave_nothing_behind(memory_bench, bench, tmp_path, start_server):
    section = memory_bench.section(capture="own", retrieval={"top_k": 2, "every": 16})
    section = {**bench.memory, **section, "session_dir": str(tmp_path / "sessions")}
    Soak(start_server(memory_bench.model, section), right_answers(memory_bench, bench)).run()
