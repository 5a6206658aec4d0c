"""A ``vllm serve`` process that always goes away again, and the errors that a person can do something about."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

import httpx

START_LIMIT = 300.0  # seconds; a cold file cache on a small machine takes about 60
STOP_LIMIT = 10.0


class DemoError(Exception):
    """Something that the user can repair; the message is one paragraph that says how."""


def require_packages() -> None:
    """Raise DemoError if this environment cannot serve."""
    command = Path(sys.executable).with_name("vllm")
    missing = [name for name in ("vllm", "mem_triton", "mem_triton_vllm") if importlib.util.find_spec(name) is None]
    if not missing and not command.exists():
        missing = [f"the vllm command ({command})"]
    if missing:
        raise DemoError(
            f"This Python ({sys.executable}) has no {', '.join(missing)}. "
            "Run `make demo`, which sets up .venv with everything and uses it."
        )


def require_folder(folder: Path, file: str, option: str, what: str) -> None:
    """Raise DemoError unless ``folder`` holds ``file``."""
    if not (folder / file).is_file():
        raise DemoError(
            f"There is no {what} in {folder}: {file} is missing. Run the demo from the top folder of a full checkout, "
            f"where the shipped ones lie under benchmarks/recall, or name another with {option}."
        )


def choose_ports(first: int | None, count: int = 3) -> list[int]:
    """Free ports: ``first`` and those after it, or any. Raises DemoError if one is taken."""
    with ExitStack() as held:
        ports = []
        for i in range(count):
            port, s = first + i if first else 0, held.enter_context(socket.socket())
            s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                s.bind(("127.0.0.1", port))
            except OSError:
                raise DemoError(
                    f"Port {port} is busy or not allowed, and the demo needs {first} to {first + count - 1} for its "
                    "servers. Stop what listens there, choose others with --port, or leave --port away: the demo then "
                    "finds free ports by itself."
                ) from None
            ports.append(s.getsockname()[1])
        return ports


def has_gpu() -> bool:
    """Whether nvidia-smi lists a GPU, which is also how scripts/environment.sh chooses the engine."""
    return (
        shutil.which("nvidia-smi") is not None
        and subprocess.run(["nvidia-smi", "-L"], capture_output=True).returncode == 0
    )


class Server:
    """One vLLM server in a process group of its own.

    Example::

        server = Server("memory", ["vllm", "serve", "model"], ["--load-format", "mem_triton"], 8000, Path("memory.log"))
        try:
            server.start()
            server.wait(print)
        finally:
            server.stop()
    """

    def __init__(self, name: str, serve: list[str], flags: list[str], port: int, log: Path) -> None:
        self.name, self.flags, self.log = name, flags, log
        self.command = [*serve, "--port", str(port), *flags]
        self.url = f"http://127.0.0.1:{port}"
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def shown_command(self) -> str:
        """The command as one would type it."""
        return shlex.join(["vllm", *self.command[1:]])

    def start(self) -> None:
        # A CPU engine shares the cores with its front end and our client. The user's own settings have precedence.
        spare = max(1, len(os.sched_getaffinity(0)) - 1)
        defaults = {
            "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; the default takes a large part of the machine
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": str(spare),
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                self.command, env={**defaults, **os.environ}, stdin=subprocess.DEVNULL, stdout=log,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def wait(self, progress: Callable[[str], None]) -> None:
        """Return when the server answers. progress gets its last log line. Raises DemoError with the log's tail."""
        deadline = time.monotonic() + START_LIMIT
        while time.monotonic() < deadline:
            self.check()
            progress(self.last_line())
            try:
                if httpx.get(f"{self.url}/health", timeout=2).status_code == 200:
                    return
            except httpx.TransportError:
                time.sleep(0.25)
        raise DemoError(f"The {self.name} server did not answer within {START_LIMIT:.0f} s. {self._tail()}")

    def check(self) -> None:
        """Raise DemoError if the process has died."""
        if self.process is None or self.process.poll() is not None:
            code = self.process.returncode if self.process else "none"
            errors = re.findall(r"^.*?\b(\w+(?:Error|Exception): .*)$", self._text(), re.MULTILINE)
            reason = f": {errors[-1]}." if errors else "."
            raise DemoError(f"The {self.name} server stopped by itself with exit code {code}{reason} {self._tail()}")

    def last_line(self) -> str:
        """The last line of the log, without vLLM's prefix."""
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
