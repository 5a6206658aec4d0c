"""Tests that interpret kernels run in processes of their own, where the interpreter is chosen before Triton's import.

``tests/ops/test_in_interpreter.py`` starts them; by hand::

    TRITON_INTERPRET=1 pytest tests/ops/test_reposition.py
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.places import INTERPRETED, belongs_here

FOLDER = Path(__file__).parent

if INTERPRETED:
    from tests.support import interp

    interp.install()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    elsewhere = [item for item in items if item.path.is_relative_to(FOLDER) and not belongs_here(item)]
    config.hook.pytest_deselected(items=elsewhere)
    items[:] = [item for item in items if item not in elsewhere]
