"""The demo as a person runs it, watched: what it prints, and every process that it starts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

from mem_triton.systems.delta_mem import save_adapter
from tests.support.models import random_adapter, save_tiny_model, tiny_model
from tests.support.zygote import SPAWN, Zygote

ROOT = Path(__file__).parents[2]
SHORT = tempfile.gettempdir()  # for vLLM's sockets, whose paths may have 107 characters: pytest's folders are longer
SMALL = ("--sessions", "3", "--facts", "2", "--repeats", "2", "--tokens", "8")


def make_folders(folder: Path) -> tuple[str, ...]:
    """Options that name a tiny random model and its adapter."""
    model = save_tiny_model(folder / "model")
    adapter = save_adapter(random_adapter(tiny_model()), folder / "adapter")
    return "--model", str(model), "--adapter", str(adapter)


class Demo:
    """A running demo: its output, and every process that it ever had.

    worker: the name of an engine's processes. zygote: gives a process that has imported the engine; the demo and its
    servers are forks of it then (see ``forked_demo``). None starts all as a person does.
    """

    def __init__(
        self, folder: Path, *options: str, worker: str = "EngineCore", zygote: Callable[[], Zygote] | None = None
    ) -> None:
        self.log, self.seen, self.worker = folder / "output.txt", set(), worker
        env = {**os.environ, "COLUMNS": "120", "TMPDIR": str(folder), "VLLM_RPC_BASE_PATH": SHORT}
        if zygote is None or SPAWN:
            with self.log.open("w") as log:
                self.process = subprocess.Popen(
                    [sys.executable, "-m", "benchmarks.demo", *options],
                    cwd=ROOT,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=env,
                )
        else:
            files = ["/dev/null", self.log, self.log]
            self.process = zygote().start(["-m", "tests.support.forked_demo", *options], env, files)

    def until(self, condition: Callable[[], bool], limit: float) -> None:
        """Watch the processes until the condition holds; fails if the demo ends or the limit passes before."""
        deadline = time.monotonic() + limit
        while not condition():
            assert time.monotonic() < deadline, self.output
            assert self.process.poll() is None, self.output
            with suppress(psutil.NoSuchProcess):
                self.seen |= set(psutil.Process(self.process.pid).children(recursive=True))
            time.sleep(0.1)

    def end(self, limit: float = 200) -> int:
        """Watch until the demo has ended; its exit code."""
        with suppress(AssertionError):
            self.until(lambda: self.process.poll() is not None, limit)
        return self.process.wait(1)

    def interrupt(self) -> None:
        """Ctrl-C; nothing if it has ended."""
        if self.process.poll() is None:
            os.kill(self.process.pid, signal.SIGINT)

    @property
    def output(self) -> str:
        return self.log.read_text()

    @property
    def engines(self) -> int:
        return sum(self.worker in _command(process) for process in self.seen)

    def survivors(self) -> list[psutil.Process]:
        """Processes of the demo that outlive it, after a moment of grace for the kernel; killed then, so that a failed
        test leaves none either."""
        alive = psutil.wait_procs(self.seen, timeout=5)[1]
        for process in alive:
            process.kill()
        return alive


def _command(process: psutil.Process) -> str:
    """Empty of one that has ended, or is about to."""
    with suppress(psutil.NoSuchProcess):
        return " ".join(process.cmdline())
    return ""
