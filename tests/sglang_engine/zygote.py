"""Starts cases from a process that has imported SGLang already: importing takes most of a case's time.

SGLang imports itself in its main process, in each scheduler and in the detokenizer. Here one process imports it and
nothing else happens in it; each case is a fork of it, with an environment and a process group of its own, and forks its
workers where SGLang would spawn them. What only a spawned process shows (that it loads the plugin by itself) is for the
servers' tests, which start as users start them, and for ``MEM_TRITON_TEST_SPAWN=1``, with which every case does.
"""

from __future__ import annotations

import atexit
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from contextlib import suppress
from pathlib import Path

MODULES = ("sglang", "sglang.srt.entrypoints.engine", "sglang.srt.managers.scheduler")


class Zygote:
    """The process, from its first case to the end of this one. env: what is set while it imports."""

    def __init__(self, env: dict[str, str], root: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.sglang_engine.zygote"], env=env, cwd=root, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        atexit.register(self._process.stdin.close)  # it ends with its input

    def run(self, case: str, env: dict[str, str], timeout: float) -> subprocess.CompletedProcess[str]:
        """Run ``tests.sglang_engine.case`` on a case. Raises subprocess.TimeoutExpired; nothing of it is left then."""
        with tempfile.TemporaryDirectory(prefix="mem-triton-case-") as folder:
            files = [str(Path(folder, name)) for name in ("stdin", "stdout", "stderr")]
            Path(files[0]).write_text(case)
            self._process.stdin.write(json.dumps({"files": files, "env": env, "timeout": timeout}) + "\n")
            self._process.stdin.flush()
            code = json.loads(self._process.stdout.readline())
            if code is None:
                raise subprocess.TimeoutExpired("tests.sglang_engine.case", timeout, Path(files[2]).read_text()[-5000:])
            return subprocess.CompletedProcess([], code, *(Path(file).read_text() for file in files[1:]))


def main() -> None:
    for module in MODULES:
        importlib.import_module(module)
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        asked = json.loads(line)
        child = os.fork()
        if child == 0:
            _become_case(asked["files"], asked["env"])
        print(json.dumps(_wait(child, asked["timeout"])), file=answers, flush=True)


def _become_case(files: list[str], env: dict[str, str]) -> None:
    """The rest of a fork's life."""
    os.setsid()
    for number, file in enumerate(files):
        os.dup2(os.open(file, os.O_RDWR | os.O_CREAT, 0o600), number)
    sys.stdin = os.fdopen(0, closefd=False)  # the parent's has read ahead
    os.environ.clear()
    os.environ.update(env)
    import multiprocessing

    stock = multiprocessing.set_start_method
    multiprocessing.set_start_method = lambda method, force=False: stock("fork", force=force)
    code = 1
    try:
        runpy.run_module("tests.sglang_engine.case", run_name="__main__", alter_sys=True)
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


def _wait(child: int, timeout: float) -> int | None:
    """A case's exit code, negative for a signal, None if it took too long. Whatever it started ends with it."""
    deadline, ended = time.monotonic() + timeout, 0
    while not ended and time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if not ended:
            time.sleep(0.02)
    with suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    if not ended:
        os.waitpid(child, 0)
        return None
    return os.waitstatus_to_exitcode(status)


if __name__ == "__main__":
    main()
