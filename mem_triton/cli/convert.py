"""``mem-triton convert``: checkpoints of memory models into what engines serve, and back."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Convert checkpoints of memory models, and back.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """One command so far; the callback keeps its name."""


@app.command()
def memoryllm(
    source: Annotated[
        str,
        typer.Argument(metavar="SRC", help="Folder or Hugging Face id of a MemoryLLM checkpoint.", show_default=False),
    ],
    target: Annotated[Path, typer.Argument(metavar="DST", help="A new folder.", show_default=False)],
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16, of the model and the pool's rows.")] = "auto",
    back: Annotated[
        bool, typer.Option("--back", help="SRC is what this command made: write a checkpoint of the authors' code.")
    ] = False,
    pool: Annotated[str, typer.Option(help='With --back: the pool that becomes its own, "name" or "name@2".')] = "main",
) -> None:
    """Make an ordinary Llama (DST/model) and its pools (DST/memory) of a MemoryLLM checkpoint (arXiv 2402.04624)."""
    from mem_triton.cli.settings import OptionError, folder_of
    from mem_triton.systems.memoryllm import convert

    if dtype not in convert.DTYPES:
        raise OptionError(f"--dtype: {dtype!r} is not one of {', '.join(convert.DTYPES)}")
    if back:
        if dtype != "auto":
            raise OptionError("--dtype: goes without --back; a checkpoint keeps the model's")
        convert.convert_back(Path(source), target, pool)
        return print(f"wrote {target}, a checkpoint of the authors' code with the rows of {pool}")
    reference = convert.convert(folder_of(source), target, dtype)
    rows = reference or "main, which has no rows yet: write a text into it"
    print(f"wrote {target / 'model'} and {target / 'memory'}; its pool is {rows}")
