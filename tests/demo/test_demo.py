"""The demo as a person runs it: real servers, a tiny random model, and every way in which it can end."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.common.statistics import wilson
from tests.support.demo import ROOT, SMALL, Demo, make_folders
from tests.support.zygote import Zygote


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[str, ...]:
    return make_folders(tmp_path_factory.mktemp("demo"))


def zygote() -> Zygote:
    from tests.vllm_engine import engine

    return engine.zygote("v1")


def run(folder: Path, *options: str) -> tuple[int, str]:
    """A demo that ends before it starts a server."""
    demo = Demo(folder, *options)
    return demo.end(60), demo.output


@pytest.mark.engine
def test_the_demo_from_start_to_end(folders, tmp_path):
    picture = tmp_path / "demo.svg"
    demo = Demo(tmp_path, *folders, *SMALL, "--svg", str(picture), zygote=zygote)
    assert demo.end() == 0, demo.output
    for expected in (
        "vllm serve",
        "--load-format mem_triton",
        "Recall: 4 questions to 3 people",
        "output tokens/s",
        "median TTFT",
        "δ-mem / stock",
        "bank / stock",
        "facts in an entry",
        "Speed on",
    ):
        assert expected in demo.output, f"{expected!r} is not in:\n{demo.output}"
    assert "<svg" in picture.read_text()
    assert len(demo.seen) >= 6 and demo.survivors() == [], "three front ends and three engines, all gone"
    assert list(tmp_path.glob("mem_triton-demo-*")) == [], "logs and sessions are cleaned up"


@pytest.mark.engine
def test_ctrl_c_leaves_no_server(folders, tmp_path):
    demo = Demo(
        tmp_path, *folders, *SMALL, "--repeats", "1000", zygote=zygote
    )  # it cannot be over before the signal comes
    demo.until(lambda: demo.engines == 3, 120)
    demo.interrupt()
    time.sleep(0.3)
    demo.interrupt()  # impatient
    assert demo.end(120) == 130 and "all servers are down" in demo.output, demo.output
    assert demo.survivors() == []


@pytest.mark.slow
@pytest.mark.engine
def test_a_dying_server_shows_its_log(folders, tmp_path):
    """The adapter's config is there and wrong: the δ-mem server refuses, and the others go down with it."""
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "delta_mem_config.json").write_text(json.dumps({"rnak": 8}))
    demo = Demo(tmp_path, *folders[:2], "--adapter", str(tmp_path / "adapter"), *SMALL, zygote=zygote)
    assert demo.end() == 1
    assert "δ-mem server stopped by itself" in demo.output and "unknown key 'rnak'" in demo.output, demo.output
    assert len(demo.seen) >= 2 and demo.survivors() == []
    assert list(tmp_path.glob("mem_triton-demo-*/delta-mem.log")), "the logs of a failure are kept"


def test_a_busy_port_is_one_paragraph(folders, tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        port = s.getsockname()[1]
        code, output = run(tmp_path, *folders, "--port", str(port))
    assert code == 1 and f"Port {port} is busy" in output and "--port" in output and "Traceback" not in output


def test_a_missing_model_is_one_paragraph(folders, tmp_path):
    code, output = run(tmp_path, "--model", str(tmp_path), *folders[2:])
    assert code == 1 and "config.json is missing" in output and "--model" in output and "Traceback" not in output
    code, output = run(tmp_path, *folders[:2], "--adapter", str(tmp_path))
    assert code == 1 and "delta_mem_config.json is missing" in output and "--adapter" in output


def test_a_missing_package_is_one_line():
    """-S hides every installed package from this Python."""
    process = subprocess.run([sys.executable, "-S", "-m", "benchmarks.demo"], cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 1 and "run `make demo`" in process.stderr and "Traceback" not in process.stderr


def test_wilson_interval():
    """Figures of the textbook example: 8 of 10, and both ends."""
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson(0, 20)[0] == 0 and wilson(0, 20)[1] == pytest.approx(0.1611, abs=1e-4)
    assert wilson(20, 20) == (pytest.approx(1 - 0.1611, abs=1e-4), 1) and wilson(0, 0) == (0, 1)
