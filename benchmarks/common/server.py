"""A server process that always goes away again, and the errors that a person can do something about."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx

START_LIMIT = 600.0  # seconds; a cold file cache on a small machine takes about 60, a busy one some 300
STOP_LIMIT = 10.0


class BenchmarkError(Exception):
    """Something that the user can repair; the message is one paragraph that says how."""


def require_folder(folder: Path, file: str, option: str, what: str) -> None:
    """Raise BenchmarkError unless ``folder`` holds ``file``."""
    if not (folder / file).is_file():
        raise BenchmarkError(
            f"There is no {what} in {folder}: {file} is missing. Run this from the top folder of a full checkout, "
            f"where the shipped ones lie under benchmarks/recall, or name another with {option}."
        )


def choose_ports(first: int | None, count: int = 3) -> list[int]:
    """Free ports: ``first`` and those after it, or any. Raises BenchmarkError if one is taken."""
    with ExitStack() as held:
        ports = []
        for i in range(count):
            port, s = first + i if first else 0, held.enter_context(socket.socket())
            s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                s.bind(("127.0.0.1", port))
            except OSError:
                raise BenchmarkError(
                    f"Port {port} is busy or not allowed, and the servers need {first} to {first + count - 1}. "
                    "Stop what listens there, choose others with --port, or leave --port away, and free ones are found."
                ) from None
            ports.append(s.getsockname()[1])
        return ports


def has_gpu() -> bool:
    """Whether nvidia-smi lists a GPU, which is also how scripts/environment.sh chooses the engine."""
    return (
        shutil.which("nvidia-smi") is not None
        and subprocess.run(["nvidia-smi", "-L"], capture_output=True).returncode == 0
    )


def usual_dtype() -> str:
    """Name the dtype of a server that is given none: what a GPU multiplies fast, or what a CPU computes exactly."""
    return "bfloat16" if has_gpu() else "float32"


def spare_cores() -> int:
    """Threads of a CPU engine: it shares the cores with its front end and our client."""
    return max(1, len(os.sched_getaffinity(0)) - 1)


@dataclass(frozen=True)
class Launch:
    """A server's command without its port and its memory, and its environment, over which the user's own goes."""

    command: list[str]
    environment: Mapping[str, str]


@dataclass(frozen=True)
class MemoryFlags:
    """What gives a server memory: options, and variables of its environment. note: for people."""

    options: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    note: str = ""

    @property
    def variables(self) -> list[str]:
        """Variables of the environment as one would type them before a command."""
        return [f"{name}={shlex.quote(value)}" for name, value in self.environment.items() if value]

    @property
    def shown(self) -> str:
        """All of it as one would type it."""
        typed = " ".join([*self.variables, shlex.join(self.options)])
        return f"{typed}, {self.note}" if self.note else typed


class Server:
    """One engine's server in a process group of its own.

    Example::

        server = Server("stock", Launch(["vllm", "serve", "model"], {}), MemoryFlags(), 8000, Path("stock.log"))
        try:
            server.start()
            server.wait(print)
        finally:
            server.stop()
    """

    def __init__(self, name: str, launch: Launch, memory: MemoryFlags, port: int, log: Path) -> None:
        self.name, self.launch, self.memory, self.log = name, launch, memory, log
        self.command = [*launch.command, "--port", str(port), *memory.options]
        self.url = f"http://127.0.0.1:{port}"
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def shown_command(self) -> str:
        """The command as one would type it."""
        typed = shlex.join([Path(self.command[0]).name, *self.command[1:]])
        return " ".join([*self.memory.variables, typed])

    def environment(self) -> dict[str, str]:
        """The process's variables; the user's own settings have precedence over the defaults."""
        defaults = {"OMP_NUM_THREADS": str(spare_cores()), "HF_HUB_OFFLINE": "1", **self.launch.environment}
        return {**defaults, **os.environ, **self.memory.environment}

    def start(self) -> None:
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                self.command,
                env=self.environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait(self, progress: Callable[[str], None]) -> None:
        """Return when the server answers; progress gets its last log line. Raises BenchmarkError with the log."""
        deadline = time.monotonic() + START_LIMIT
        while time.monotonic() < deadline:
            self.check()
            progress(self.last_line())
            try:
                if httpx.get(f"{self.url}/health", timeout=2).status_code == 200:
                    return
            except httpx.TransportError:
                time.sleep(0.25)
        raise BenchmarkError(f"The {self.name} server did not answer within {START_LIMIT:.0f} s. {self._tail()}")

    def check(self) -> None:
        """Raise BenchmarkError if the process has died."""
        if self.process is None or self.process.poll() is not None:
            code = self.process.returncode if self.process else "none"
            errors = re.findall(r"^.*?\b(\w+(?:Error|Exception): .*)$", self._text(), re.MULTILINE)
            reason = f": {errors[-1]}." if errors else "."
            died = f"The {self.name} server stopped by itself with exit code {code}{reason}"
            raise BenchmarkError(f"{died} {self._tail()}")

    def last_line(self) -> str:
        """The last line of the log, without the engine's prefix."""
        lines = [line for line in self._text().splitlines() if line.strip()]
        return lines[-1].split("] ", 1)[-1].strip() if lines else ""

    def _text(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def _tail(self, lines: int = 25) -> str:
        tail = "\n".join(f"    {line}" for line in self._text().splitlines()[-lines:])
        return f"The end of its log ({self.log}):\n{tail}"

    def ask_to_stop(self) -> None:
        """Ask the whole process group to end, and do not wait for it."""
        self._signal(signal.SIGTERM)

    def stop(self) -> None:
        """End the whole process group: politely, then not. Harmless if it has already ended."""
        if self.process is None:
            return
        self.ask_to_stop()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(STOP_LIMIT)
        self._signal(signal.SIGKILL)  # also whatever a dead leader left behind
        self.process.wait()

    def _signal(self, number: int) -> None:
        if self.process is None:
            return
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)
