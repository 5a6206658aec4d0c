"""The demo on SGLang: three real servers, and none of their processes left. How else it may end is in tests/demo."""

from __future__ import annotations

import pytest

from tests.sglang_engine.engine import zygote
from tests.support.demo import SMALL, Demo, make_folders

pytestmark = pytest.mark.engine


def test_the_demo_from_start_to_end(tmp_path):
    options = ("--engine", "sglang", *make_folders(tmp_path), *SMALL)
    demo = Demo(tmp_path, *options, worker="sglang::scheduler", zygote=zygote)
    demo.until(lambda: demo.engines == 3, 200)
    assert demo.end() == 0, demo.output
    for expected in (
        "sglang serve",
        "--attention-backend mem_triton",
        "custom_params",
        "Recall: 4 questions",
        "δ-mem / stock",
        "bank / stock",
        "facts in an entry",
        "Speed on",
    ):
        assert expected in demo.output, f"{expected!r} is not in:\n{demo.output}"
    assert demo.survivors() == []
    assert list(tmp_path.glob("mem_triton-demo-*")) == [], "logs and sessions are cleaned up"
