"""Runs servers that begin one after the other and end together.

Each has a session of its own, so that a terminal's Ctrl-C reaches this process alone, which hands it on. If this
process is killed, the kernel tells the servers (``PR_SET_PDEATHSIG``).
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import FrameType

PDEATHSIG = 1
"""``PR_SET_PDEATHSIG`` of Linux's prctl."""
HANDED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
LONGEST_END = 60.0
"""Seconds that a server has to end before it is killed."""
LOOK_SECONDS = 0.2


@dataclass(frozen=True)
class Program:
    """A server to run. name: for messages. health: the URL that answers when it is up, before the next one begins;
    "" for the last one."""

    name: str
    file: str
    arguments: Sequence[str]
    environment: Mapping[str, str]
    health: str = ""


class Together:
    """Servers that run until one of them ends, or a signal ends them all."""

    def __init__(self) -> None:
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self.asked: int | None = None

    def run(self, programs: Sequence[Program]) -> int:
        """Run them; returns the exit code: the last one's if a signal ended them, else that of the first to end."""
        for number in HANDED_ON:
            signal.signal(number, self._hand_on)
        try:
            for program in programs:
                self._start(program)
            while (ended := self._ended()) is None:
                if not self.running:  # told to end before the first one began
                    return 128 + int(self.asked or 0)
                time.sleep(LOOK_SECONDS)
        finally:
            codes = self._end()
        name, code = ended
        if self.asked is not None:
            code = codes[list(codes)[-1]]
        else:
            print(f"mem-triton: {name} ended with exit code {_code(code)}, and so does all", file=sys.stderr)
        return _code(code)

    def _start(self, program: Program) -> None:
        """Start a program and wait until it is up, or ends, or all are told to end."""
        if self.asked is not None or self._ended() is not None:
            return
        parent = os.getpid()
        self.running[program.name] = subprocess.Popen(
            program.arguments,
            executable=program.file,
            env=dict(program.environment),
            start_new_session=True,
            preexec_fn=lambda: _end_with(parent),  # this process has one thread
        )
        while program.health and self.asked is None and self._ended() is None and not _is_up(program.health):
            time.sleep(LOOK_SECONDS)

    def _ended(self) -> tuple[str, int] | None:
        """A program that has ended, and its return code."""
        return next(((name, code) for name, p in self.running.items() if (code := p.poll()) is not None), None)

    def _end(self) -> dict[str, int]:
        """End all that still run; their return codes."""
        for process in self.running.values():
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        until = time.monotonic() + LONGEST_END
        for process in self.running.values():
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, until - time.monotonic()))
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # what it has left, too
        return {name: process.wait() for name, process in self.running.items()}

    def _hand_on(self, number: int, frame: FrameType | None) -> None:
        """Hand a signal on; the first one to all, later ones too."""
        self.asked = number
        for process in self.running.values():
            if process.poll() is None:
                process.send_signal(number)


def _end_with(parent: int) -> None:
    """In a child, before its program begins: let the kernel end it when its parent ends."""
    ctypes.CDLL(None).prctl(PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it has ended meanwhile
        os._exit(1)


def _is_up(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return answer.status == 200
    except (OSError, ValueError):
        return False


def _code(code: int) -> int:
    """A shell's exit code of a return code; a signal's is 128 and its number."""
    return code if code >= 0 else 128 - code
