"""The commands put together, and the one place where errors become a line on stderr.

Every command imports what it needs when it runs: ``mem-triton --help`` loads neither torch nor a model.
"""

from __future__ import annotations

import os
import sys
from typing import NoReturn

import typer

from mem_triton import __version__
from mem_triton.cli import bank, convert, doctor, import_trained, memo, model, pool, serve, train, write

app = typer.Typer(
    name="mem-triton",
    help="Memory for large language models: write texts into a bank once, read them in every request.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(bank.app, name="bank")
app.add_typer(memo.app, name="memo")
app.add_typer(convert.app, name="convert")
app.add_typer(pool.app, name="pool")
app.command("write")(write.write)
app.command("import")(import_trained.import_trained)
app.command("doctor")(doctor.doctor)
app.command("model")(model.model)
app.command("serve")(serve.serve)
app.add_typer(train.app, name="train")


@app.callback(invoke_without_command=True)
def _root(version: bool = typer.Option(False, "--version", help="Print the version and exit.")) -> None:
    if version:
        print(__version__)
        raise typer.Exit


def main() -> NoReturn:
    """Run the command of ``sys.argv``; exit code 2 and one line on stderr for what the user can put right.

    MEM_TRITON_TRACEBACK=1 shows where an error came from.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # names of files may be no text
    try:
        code = app(prog_name="mem-triton", standalone_mode=False)
    except Exception as error:
        if os.environ.get("MEM_TRITON_TRACEBACK") == "1":
            raise
        sys.exit(_tell(error))
    sys.exit(code if isinstance(code, int) else 0)


EXPECTED = (ValueError, OSError, ImportError, NotImplementedError, RuntimeError)
LONGEST = 2000
"""Characters of a message: a line, not a file."""


def _tell(error: Exception) -> int:
    """Say on one line what is wrong; the exit code."""
    if isinstance(error, BrokenPipeError):  # whoever read the output has enough, as `head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()  # the help
        return 2
    if type(error).__name__ == "Abort":
        return 130
    if hasattr(error, "format_message"):  # of the parser of arguments, which typer brings along or not
        context = getattr(error, "ctx", None)
        message = (
            f"{error.format_message().rstrip('.')}; see {context.command_path if context else 'mem-triton'} --help"
        )
    elif isinstance(error, UnicodeEncodeError) and (bad := [a for a in sys.argv[1:] if not _is_text(a)]):
        message = f"argument {bad[0]!r} is no UTF-8 text"
    elif isinstance(error, EXPECTED):
        message = str(error) or type(error).__name__
    else:
        message = f"unexpected {type(error).__name__}: {error}; MEM_TRITON_TRACEBACK=1 shows where"
    line = " ".join(message.encode("utf-8", "backslashreplace").decode().split())
    print(f"mem-triton: {line if len(line) <= LONGEST else line[:LONGEST] + '…'}", file=sys.stderr)
    return 2


def _is_text(argument: str) -> bool:
    try:
        argument.encode()
    except UnicodeEncodeError:
        return False
    return True
