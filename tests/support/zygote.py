"""Starts cases and servers from a process that has imported the engine already: importing takes most of their time.

An engine imports itself in its main process and in each worker. Here one process imports it and nothing else happens
in it; whatever is started is a fork of it, with an environment and a process group of its own, and forks its workers
where the engine would spawn them. What only a spawned process shows (that it loads the plugin by itself) is for tests
that ask for a ``fresh`` one, and for ``MEM_TRITON_TEST_SPAWN=1``, with which all are.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

SPAWN = bool(os.environ.get("MEM_TRITON_TEST_SPAWN"))
"""Everything starts as users start it."""
POLL_SECONDS = 0.02


class Zygote:
    """The process, from its first fork to the end of this one.

    modules: what it imports. env: what is set meanwhile.
    """

    def __init__(self, modules: Sequence[str], env: dict[str, str], root: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.zygote", *modules],
            env=env,
            cwd=root,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        self._lock = threading.Lock()
        atexit.register(self._process.stdin.close)  # it ends with its input

    def start(self, command: Sequence[str], env: dict[str, str], files: Sequence[str | Path]) -> Fork:
        """Run ``-m MODULE ARGUMENTS`` or ``-c CODE ARGUMENTS``. files: its stdin, stdout and stderr."""
        asked = {"command": list(command), "env": env, "files": [str(file) for file in files]}
        return Fork(self, self.ask("start", asked))

    def run(
        self, command: Sequence[str], env: dict[str, str], timeout: float, stdin: str = ""
    ) -> subprocess.CompletedProcess[str]:
        """Run it to its end. Raises subprocess.TimeoutExpired; nothing of it is left in either case."""
        with tempfile.TemporaryDirectory(prefix="mem-triton-case-") as folder:
            files = [Path(folder, name) for name in ("stdin", "stdout", "stderr")]
            files[0].write_text(stdin)
            process = self.start(command, env, files)
            try:
                code = process.wait(timeout)
            except subprocess.TimeoutExpired:
                process.kill()
                raise subprocess.TimeoutExpired(list(command), timeout, files[2].read_text()[-5000:]) from None
            return subprocess.CompletedProcess(list(command), code, *(file.read_text() for file in files[1:]))

    def ask(self, method: str, argument: Any) -> Any:
        """One call of ``Forks``."""
        with self._lock:
            self._process.stdin.write(json.dumps([method, argument]) + "\n")
            self._process.stdin.flush()
            return json.loads(self._process.stdout.readline())


class Fork:
    """A process that the zygote started, in the manner of ``subprocess.Popen``."""

    def __init__(self, zygote: Zygote, pid: int) -> None:
        self.pid, self.returncode, self._zygote = pid, None, zygote

    def poll(self) -> int | None:
        """Its exit code, negative for a signal; None while it runs. Whatever it started ends with it."""
        if self.returncode is None:
            self.returncode = self._zygote.ask("poll", self.pid)
        return self.returncode

    def wait(self, timeout: float) -> int:
        """Its exit code. Raises subprocess.TimeoutExpired."""
        return _wait(self, timeout)

    def kill(self) -> None:
        """End it with all that it started."""
        _kill_group(self.pid)
        self.wait(30)


class Forks:
    """The zygote's end of the calls."""

    def __init__(self) -> None:
        self.running: set[int] = set()

    def start(self, asked: dict[str, Any]) -> int:
        child = os.fork()
        if child == 0:
            _become(asked["command"], asked["files"], asked["env"])
        self.running.add(child)
        return child

    def poll(self, child: int) -> int | None:
        ended, status = os.waitpid(child, os.WNOHANG)
        if not ended:
            return None
        self.running.remove(child)
        _kill_group(child)
        return os.waitstatus_to_exitcode(status)

    def end(self) -> None:
        """Leave nothing behind when the tests were killed."""
        for child in self.running:
            _kill_group(child)


class Child:
    """A fork of this process that runs a command, in the manner of ``subprocess.Popen``."""

    def __init__(self, command: Sequence[str], env: dict[str, str], files: Sequence[str]) -> None:
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            _become(list(command), list(files), env)

    def poll(self) -> int | None:
        if self.returncode is None:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if ended else None
        return self.returncode

    def wait(self, timeout: float = float("inf")) -> int:
        """Its exit code. Raises subprocess.TimeoutExpired."""
        return _wait(self, timeout)


def main() -> None:
    for module in sys.argv[1:]:
        importlib.import_module(module)
    with suppress(ImportError):
        importlib.import_module("setproctitle").getproctitle()  # finds no title to set in a fork with a new environment
    gc.collect()
    gc.freeze()  # or every fork's collector, which engines call several times, looks at all that was imported
    forks, answers = Forks(), os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        method, argument = json.loads(line)
        print(json.dumps(getattr(forks, method)(argument)), file=answers, flush=True)
    forks.end()


def _wait(process: Fork | Child, timeout: float) -> int:
    deadline = time.monotonic() + timeout
    while process.poll() is None:
        if time.monotonic() > deadline:
            raise subprocess.TimeoutExpired(str(process.pid), timeout)
        time.sleep(POLL_SECONDS)
    return process.returncode


def _kill_group(process: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process, signal.SIGKILL)


def _fork_workers() -> None:
    """Workers are forks, whatever start method the engine asks for: vLLM's platform for CPUs insists on spawning."""
    import multiprocessing

    set_method, get_context = multiprocessing.set_start_method, multiprocessing.get_context
    multiprocessing.set_start_method = lambda method, force=False: set_method("fork", force=force)
    multiprocessing.get_context = lambda method=None: get_context("fork")


def _become(command: list[str], files: list[str], env: dict[str, str]) -> None:
    """The rest of a fork's life."""
    os.setsid()
    for number, file in enumerate(files):
        os.dup2(os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600), number)
    sys.stdin = os.fdopen(0, closefd=False)  # the parent's has read ahead
    os.environ.clear()
    os.environ.update(env)
    path = env.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[1:1] = [folder for folder in path if folder and folder not in sys.path]
    _fork_workers()
    gc.unfreeze = lambda: None  # engines call it as they end, and then collect all that was imported
    if env.get("TORCHDYNAMO_DISABLE") == "1":  # torch has read it, when it was imported
        importlib.import_module("torch").compiler.set_stance("force_eager")
    code = 1
    try:
        kind, what, *sys.argv[1:] = command
        if kind == "-m":
            runpy.run_module(what, run_name="__main__", alter_sys=True)
        else:
            exec(compile(what, "<command>", "exec"), {"__name__": "__main__"})
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
