"""Several servers up at the same time and all of them down at the end; demos that clean up after themselves."""

from __future__ import annotations

import functools
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import typer
from rich.console import Console
from rich.markup import escape
from rich.status import Status

from benchmarks.common.server import BenchmarkError, Server, has_gpu

REST = 1.5  # seconds; vLLM's processes spin for a second after their last step, and would slow the others down
ENDINGS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def demonstration(console: Console, keep_log: bool, *failures: type[Exception]) -> Iterator[Path]:
    """Give a demo a temporary folder for its servers' logs and end it with exit code 1 or 130 and one line if it fails.

    failures: what else than BenchmarkError is told in a line. The folder is kept if ``keep_log``, or if the demo fails
    after a server has written a log, which the error may name.
    """
    end_by_interrupt()
    folder = Path(tempfile.mkdtemp(prefix="mem_triton-demo-"))
    try:
        yield folder
    except (BenchmarkError, *failures) as error:
        keep_log = keep_log or any(folder.glob("*.log"))
        complain = Console(stderr=True, highlight=False)
        complain.print(f"\n[bold red]The demo cannot go on.[/] {escape(str(error))}", soft_wrap=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        Console(stderr=True).print("\nStopped; all servers are down.")
        raise typer.Exit(130) from None
    finally:
        if keep_log:
            console.print(f"\n[dim]the servers' logs: {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)


def end_by_interrupt() -> None:
    """Make a kill and a closed terminal clean up like Ctrl-C, which a shell's background jobs would not hear."""
    for number in ENDINGS:
        signal.signal(number, signal.default_int_handler)


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
    before = {number: signal.signal(number, signal.SIG_IGN) for number in ENDINGS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
