"""Where a test of an op runs it: one test, and one runner of each op, for every place.

"cpu": the op's own code on a CPU. "interpreter": its kernels in Triton's interpreter, with memory watched; such tests
run in processes of their own (``tests/ops/test_in_interpreter.py``). "gpu": its kernels on a GPU. Example::

    @everywhere
    def test_matches_fp64(place):
        assert_weights(weights_of(case, place), case)
"""

from __future__ import annotations

import os

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


def device_of(place: str) -> str:
    return "cuda" if place == "gpu" else "cpu"


def belongs_here(item: pytest.Item) -> bool:
    """Whether this process runs a test: those of the interpreter in one that interprets, all others elsewhere."""
    inside = item.path.parent.name == "interpreter" or item.get_closest_marker("interpreter") is not None
    return inside == INTERPRETED
