"""``mem-triton pool``: look into a store of MemoryLLM's pools, and keep it in order."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mem_triton.cli import output

if TYPE_CHECKING:
    from mem_triton.systems.memoryllm.pools import Pools

app = typer.Typer(help="Inspect, fork, export and compact pools of MemoryLLM.", no_args_is_help=True)

Memory = Annotated[Path, typer.Argument(metavar="MEMORY", help="The store, DST/memory.", show_default=False)]
Name = Annotated[str, typer.Argument(metavar="POOL", help="Its name.", show_default=False)]
Reference = Annotated[str, typer.Argument(metavar="POOL", help='"name" or "name@version".', show_default=False)]
Tenant = Annotated[str, typer.Option(help="Whose pool; everybody's if absent.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def _open(path: Path, writable: bool = False) -> Pools:
    from mem_triton.systems.memoryllm.pools import Pools

    return Pools.open(path, writable, wait=10.0 if writable else 0.0)


@app.command("list")
def list_pools(path: Memory, json: Json = False) -> None:
    """Pools by name, with their newest versions."""
    with _open(path) as pools:
        infos, problems = pools.look()
    for problem in problems:
        output.note(problem)
    if json:
        return output.print_json([asdict(info) for info in infos])
    rows = [[info.name, info.tenant or "-", info.version or "no rows", output.size(info.bytes)] for info in infos]
    output.print_table(["pool", "tenant", "version", "bytes"], rows)


@app.command()
def info(path: Memory, json: Json = False) -> None:
    """What all pools of a store have in common, and the room that a version takes."""
    from mem_triton.systems.memoryllm.convert import describe

    with _open(path) as pools:
        fields = {**describe(pools), "pools": len(pools.list())}
    if json:
        return output.print_json(fields)
    output.print_fields({k: output.size(v) if k.endswith("bytes") else v for k, v in fields.items()})


@app.command()
def export(
    path: Memory,
    pool: Reference,
    destination: Annotated[Path, typer.Argument(metavar="OUT.safetensors", show_default=False)],
    tenant: Tenant = "",
) -> None:
    """Write a version's rows as the authors' code has them: `memory` [L, N, d]."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    from mem_triton.store.errors import not_written
    from mem_triton.store.files import write_durably

    with _open(path) as pools:
        name, version = pools.resolve(pool, tenant)
        rows = pools.rows(f"{name}@{version}", tenant).contiguous()
    try:
        write_durably(destination, lambda temporary: save_file({"memory": rows}, temporary))
    except (OSError, SafetensorError) as error:
        raise not_written(destination, error) from None
    print(f"exported {name}@{version} to {destination}")


@app.command()
def fork(
    path: Memory,
    pool: Reference,
    new: Annotated[str, typer.Argument(metavar="NEW", help="The new pool's name.", show_default=False)],
    tenant: Tenant = "",
) -> None:
    """Begin a new pool as a version of another one; files are shared."""
    with _open(path, writable=True) as pools:
        print(f"forked {pools.fork(new, pool, tenant)}")


@app.command()
def snapshot(path: Memory, pool: Name, tenant: Tenant = "") -> None:
    """Store all rows of the newest version, so that it is opened without going through earlier ones."""
    with _open(path, writable=True) as pools:
        print(f"stored {pools.snapshot(pool, tenant)}")


@app.command()
def verify(path: Memory, json: Json = False) -> None:
    """Read every version of every pool; exit code 1 if something is wrong."""
    with _open(path) as pools:
        problems, count = pools.verify(), len(pools.list())
    output.print_problems(problems, f"all well: {count} pools", json)


@app.command()
def compact(path: Memory, pool: Name, tenant: Tenant = "") -> None:
    """Keep the newest version alone."""
    with _open(path, writable=True) as pools:
        print(f"removed {pools.compact(pool, tenant)} files of {pool}")


@app.command()
def delete(path: Memory, pool: Name, tenant: Tenant = "") -> None:
    """Take a pool out, with all its versions."""
    with _open(path, writable=True) as pools:
        pools.delete(pool, tenant)
    print(f"deleted {pool}")
