"""The commands put together, and the one place where errors become a line on stderr.

Every command imports what it needs when it runs: ``mem-triton --help`` loads neither torch nor a model.
"""

from __future__ import annotations

import os
import sys
from typing import NoReturn

import typer

from mem_triton import __version__
from mem_triton.cli import bank, doctor, plot, write

app = typer.Typer(
    name="mem-triton",
    help="Memory for large language models: write texts into a bank once, read them in every request.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(bank.app, name="bank")
app.command("write")(write.write)
app.command("doctor")(doctor.doctor)
app.command("plot")(plot.plot)


@app.callback(invoke_without_command=True)
def _root(version: bool = typer.Option(False, "--version", help="Print the version and exit.")) -> None:
    if version:
        print(__version__)
        raise typer.Exit


def main() -> NoReturn:
    """Run the command of ``sys.argv``; exit code 2 and one line on stderr for what the user can put right.

    MEM_TRITON_TRACEBACK=1 shows where an error came from.
    """
    try:
        app()
    except (ValueError, OSError, ImportError, NotImplementedError, RuntimeError) as error:
        if os.environ.get("MEM_TRITON_TRACEBACK") == "1":
            raise
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"mem-triton: {message}", file=sys.stderr)
        sys.exit(2)
    sys.exit(0)
