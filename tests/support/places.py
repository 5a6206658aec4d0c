"""Where a test of an op runs it: one test, and one runner of each op, for every place.

"cpu": the op's own code on a CPU. "interpreter": its kernels in Triton's interpreter, with memory watched; such tests
run in processes of their own (``tests/ops/test_in_interpreter.py``). "gpu": its kernels on a GPU. Example::

    @everywhere
    def test_matches_fp64(place):
        assert_weights(weights_of(case, place), case)
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether this process interprets kernels."""
MARKS = {
    "cpu": [],
    "interpreter": [pytest.mark.interpreter],
    "gpu": [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")],
}


def at(*places: str) -> pytest.MarkDecorator:
    """Parametrises ``place``."""
    return pytest.mark.parametrize("place", [pytest.param(place, marks=MARKS[place]) for place in places])


def cases(*given: tuple) -> list:
    """Parameters of which the first is a place."""
    return [pytest.param(*values, marks=MARKS[values[0]]) for values in given]


everywhere, by_kernels = at("cpu", "interpreter", "gpu"), at("interpreter", "gpu")
interpreted, on_gpu = at("interpreter"), at("gpu")


def ways_of(ways: dict[str, tuple[str, Any]]) -> Callable[..., pytest.MarkDecorator]:
    """Make a decorator that parametrises ``place`` and ``config`` over the names that it is given.

    ways: by name, a place and the configuration of a kernel's launch that is interpreted there, None for the usual one.
    """

    def over(*names: str) -> pytest.MarkDecorator:
        params = [pytest.param(*ways[name], id=name, marks=MARKS[ways[name][0]]) for name in names]
        return pytest.mark.parametrize("place,config", params)

    return over


def device_of(place: str) -> str:
    return "cuda" if place == "gpu" else "cpu"


def belongs_here(item: pytest.Item) -> bool:
    """Whether this process runs a test: those of the interpreter in one that interprets, all others elsewhere."""
    inside = item.path.parent.name == "interpreter" or item.get_closest_marker("interpreter") is not None
    return inside == INTERPRETED
