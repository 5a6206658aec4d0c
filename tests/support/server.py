"""An engine's real HTTP server in a process of its own, and a client of it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import httpx


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class ServerProcess:
    """The process, with whatever it spawns, from its start to its end. log: the file that gets what it prints."""

    def __init__(self, command: list[str], port: int, env: dict[str, str], cwd: Path, log: str | Path) -> None:
        self.log = open(log, "w")  # noqa: SIM115  closed in stop
        self.process = subprocess.Popen(
            command, env=env, cwd=cwd, stdout=self.log, stderr=subprocess.STDOUT, start_new_session=True
        )
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120)

    def wait(self):
        """Until it answers. Raises AssertionError with the end of the log if it never does."""
        deadline = time.monotonic() + 180
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.printed()[-5000:]
            try:
                if self.http.get("/health").status_code == 200:
                    return self
            except httpx.TransportError:
                pass
            time.sleep(0.3)
        raise AssertionError(self.printed()[-5000:])

    def printed(self) -> str:
        return Path(self.log.name).read_text()

    def metric(self, name: str) -> float:
        """The sum over the labels of a metric."""
        lines = self.http.get("/metrics").text.splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))

    def stop(self) -> None:
        self.http.close()
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGTERM)
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
        self.log.close()
