"""Several servers up at the same time, and all of them down at the end."""

from __future__ import annotations

import functools
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.status import Status

from benchmarks.common.server import Server, has_gpu

REST = 1.5  # seconds; vLLM's processes spin for a second after their last step, and would slow the others down


@contextmanager
def running(servers: list[Server], console: Console) -> Iterator[None]:
    """All servers up, and down at the end. On a GPU one starts after the other, because each measures free memory."""
    begin, started = time.monotonic(), []

    def show(status: Status, server: Server, line: str) -> None:
        for one in started:
            one.check()
        status.update(f"starting the {server.name} server, {time.monotonic() - begin:.0f} s  [dim]{escape(line[:70])}")

    try:
        for server in servers:
            for one in [server] if has_gpu() else servers:
                if one not in started:
                    one.start()
                    started.append(one)
            with console.status(f"starting the {server.name} server") as status:
                server.wait(functools.partial(show, status, server))
            console.print(f"[green]✓[/] the {server.name} server is up after {time.monotonic() - begin:.0f} s")
        yield
    finally:
        with deaf():
            for server in servers:
                server.ask_to_stop()
            for server in servers:
                server.stop()


@contextmanager
def deaf() -> Iterator[None]:
    """No signal ends the clean-up: an impatient second Ctrl-C must not leave a server behind."""
    before = {
        number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
