"""The sources that the tests import, and the order of the tests."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.support import checkout

checkout.prefer()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that run an engine or kernels come first, those of many tests before others: two workers then end at about
    the same time."""
    long = {item.path for item in items if any(map(item.get_closest_marker, ("engine", "kernels")))}
    tests = Counter(item.path for item in items)
    items.sort(key=lambda item: (item.path not in long, -tests[item.path], item.path))
