"""The files that a run of all tests begins with are there."""

from __future__ import annotations

from pathlib import Path

from tests.conftest import LONGEST

TESTS = Path(__file__).parents[1]


def test_files_that_come_first_exist_and_stand_once():
    assert [name for name in LONGEST if not (TESTS / f"{name}.py").is_file()] == []
    assert len(LONGEST) == len(set(LONGEST))
