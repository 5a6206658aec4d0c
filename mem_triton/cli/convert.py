"""``mem-triton convert``: checkpoints of memory models into what engines serve, and back."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from mem_triton.systems.memoryllm.checkpoint import Checkpoint

app = typer.Typer(help="Convert checkpoints of memory models, and back.", no_args_is_help=True)


Source = Annotated[
    str, typer.Argument(metavar="SRC", help="Folder or Hugging Face id of a checkpoint.", show_default=False)
]
Target = Annotated[Path, typer.Argument(metavar="DST", help="A new folder.", show_default=False)]
Dtype = Annotated[str, typer.Option(help="auto, float32 or bfloat16, of the model and the pool's rows.")]
Back = Annotated[
    bool, typer.Option("--back", help="SRC is what this command made: write a checkpoint of the authors' code.")
]
Unmerged = Annotated[
    bool, typer.Option("--unmerged", help="Keep the adapter that reads apart (DST/read), to be served as LoRA.")
]
Pool = Annotated[str, typer.Option(help='With --back: the pool that becomes its own, "name" or "name@2".')]


@app.command()
def memoryllm(
    source: Source,
    target: Target,
    dtype: Dtype = "auto",
    unmerged: Unmerged = False,
    back: Back = False,
    pool: Pool = "main",
) -> None:
    """Make an ordinary Llama (DST/model) and its pools (DST/memory) of a MemoryLLM checkpoint (arXiv 2402.04624)."""
    from mem_triton.systems.memoryllm.checkpoint import Checkpoint

    _convert(source, target, dtype, unmerged, back, pool, Checkpoint, "exact")


@app.command()
def mplus(
    source: Source,
    target: Target,
    rope: Annotated[
        str, typer.Option(help="bf16: RoPE's frequencies as the authors round them; exact: as they are.")
    ] = "bf16",
    dtype: Dtype = "auto",
    unmerged: Unmerged = False,
    back: Back = False,
    pool: Pool = "main",
) -> None:
    """The same of a checkpoint of M+ (arXiv 2502.00592), whose pools have a long-term memory."""
    from mem_triton.cli.settings import OptionError
    from mem_triton.systems.memoryllm.convert import ROPES
    from mem_triton.systems.memoryllm.mplus import MPlusCheckpoint

    if rope not in ROPES:
        raise OptionError(f"--rope: {rope!r} is not one of {', '.join(ROPES)}")
    _convert(source, target, dtype, unmerged, back, pool, MPlusCheckpoint, rope)


def _convert(
    source: str,
    target: Path,
    dtype: str,
    unmerged: bool,
    back: bool,
    pool: str,
    kind: type[Checkpoint],
    rope: str,
) -> None:
    from mem_triton.cli.settings import OptionError, folder_of
    from mem_triton.systems.memoryllm import convert
    from mem_triton.systems.memoryllm.read_adapter import READ

    if dtype not in convert.DTYPES:
        raise OptionError(f"--dtype: {dtype!r} is not one of {', '.join(convert.DTYPES)}")
    if back:
        if dtype != "auto":
            raise OptionError("--dtype: goes without --back; a checkpoint keeps the model's")
        if unmerged:
            raise OptionError("--unmerged: goes without --back; a checkpoint has its adapters apart anyway")
        convert.convert_back(Path(source), target, pool)
        return print(f"wrote {target}, a checkpoint of the authors' code with the rows of {pool}")
    reference = convert.convert(folder_of(source), target, dtype, kind, rope, not unmerged)
    rows = reference or "main, which has no rows yet: write a text into it"
    read = f"{target / READ} (LoRA) " if unmerged else ""
    print(f"wrote {target / 'model'}, {read}and {target / 'memory'}; its pool is {rows}")
