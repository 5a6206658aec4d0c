"""The sources that the tests import, and the order of the tests."""

from __future__ import annotations

import pytest

from tests.support import checkout

checkout.prefer()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that run an engine or the interpreter come first: two workers then end at about the same time."""
    long = {item.path for item in items if item.get_closest_marker("engine") or "interpreter" in item.path.name}
    items.sort(key=lambda item: item.path not in long)
