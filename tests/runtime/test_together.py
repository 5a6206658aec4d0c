"""Servers that end together: by a signal, when one of them ends, and when the process that runs them is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.checkout import python_path
from tests.support.server import free_port, until

SERVER = """
import http.server, os, signal, sys, threading
name, port = sys.argv[1], int(sys.argv[2])
signal.signal(signal.SIGTERM, lambda *_: os._exit(int(sys.argv[3])))
signal.signal(signal.SIGINT, signal.SIG_DFL)
open(name, "w").write(str(os.getpid()))
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
    def log_message(self, *_): pass
server = http.server.HTTPServer(("127.0.0.1", port), Handler)
threading.Thread(target=server.serve_forever).start()
"""
RUN = """
import os, sys
from mem_triton.runtime import together
from mem_triton.runtime.together import Program, Together
server, one, two, tamper = sys.argv[1:]
if tamper:
    together._end_with = lambda parent: None
env = dict(os.environ)
def program(name, port, code, health=""):
    return Program(name, sys.executable, [sys.executable, server, name, port, code], env, health)
health = f"http://127.0.0.1:{one}/health"
sys.exit(Together().run([program("first", one, "3", health), program("second", two, "7")]))
"""


class Pair:
    """Two servers in a folder, in which each writes its process id."""

    def __init__(self, folder: Path, tamper: str = "") -> None:
        (folder / "server.py").write_text(SERVER)
        self.folder = folder
        command = [sys.executable, "-c", RUN, "server.py", str(free_port()), str(free_port()), tamper]
        env = {**os.environ, "PYTHONPATH": python_path()}
        self.process = subprocess.Popen(command, cwd=folder, env=env, stderr=subprocess.PIPE, text=True)
        until(lambda: all(self.pid(name) for name in ("first", "second")), "both begin", 60)
        self.pids = {name: self.pid(name) for name in ("first", "second")}

    def pid(self, name: str) -> int:
        path = self.folder / name
        return int(path.read_text() or 0) if path.exists() else 0

    def lives(self, name: str) -> bool:
        try:
            os.kill(self.pids[name], 0)
        except ProcessLookupError:
            return False
        return Path(f"/proc/{self.pids[name]}/stat").read_text().rpartition(")")[2].split()[0] != "Z"

    def none_lives(self) -> None:
        until(lambda: not self.lives("first") and not self.lives("second"), "both end", 30)


@pytest.fixture
def pairs(tmp_path):
    """Start a pair; whatever is left of it ends with the test."""
    started: list[Pair] = []

    def start(tamper: str = "") -> Pair:
        started.append(Pair(tmp_path, tamper))
        return started[-1]

    yield start
    for pair in started:
        for pid in (pair.process.pid, *pair.pids.values()):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        pair.process.wait()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_both_and_the_exit_code_is_the_last_one_s(pairs, number):
    pair = pairs()
    pair.process.send_signal(number)
    code = pair.process.wait(30)
    assert code == (7 if number == signal.SIGTERM else 128 + number)  # the servers above answer SIGTERM alone
    pair.none_lives()
    assert pair.process.stderr.read() == ""


@pytest.mark.parametrize("name", ["first", "second"])
def test_when_one_is_killed_the_other_ends_and_it_is_named(pairs, name):
    pair = pairs()
    os.kill(pair.pids[name], signal.SIGKILL)
    assert pair.process.wait(30) == 128 + signal.SIGKILL
    pair.none_lives()
    assert pair.process.stderr.read() == f"mem-triton: {name} ended with exit code 137, and so does all\n"


def test_both_end_when_the_process_that_runs_them_is_killed(pairs):
    pair = pairs()
    pair.process.kill()
    pair.none_lives()


def test_control_without_the_kernel_s_word_they_would_live_on(pairs):
    """Negative control."""
    pair = pairs("tamper")
    pair.process.kill()
    pair.process.wait()
    time.sleep(0.5)
    assert pair.lives("first") and pair.lives("second")


def test_a_server_that_never_comes_up_is_the_end_before_the_next_one_begins(tmp_path):
    code = (
        "import sys; from mem_triton.runtime.together import *\n"
        "fails = Program('first', sys.executable, [sys.executable, '-c', 'raise SystemExit(5)'], {}, 'http://127.0.0.1:9/')\n"
        "second = Program('second', sys.executable, [sys.executable, '-c', 'open(\"begun\", \"w\")'], {})\n"
        "sys.exit(Together().run([fails, second]))"
    )
    env = {**os.environ, "PYTHONPATH": python_path()}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 5 and done.stderr == "mem-triton: first ended with exit code 5, and so does all\n"
    assert not (tmp_path / "begun").exists()
