"""``mem-triton bank``: look into a bank, search it, and keep it in order."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from mem_triton.cli import output

if TYPE_CHECKING:
    from mem_triton.store.bank import Bank, EntryInfo

app = typer.Typer(help="Create, inspect, search and maintain banks.", no_args_is_help=True)

BankPath = Annotated[Path, typer.Argument(metavar="BANK", help="The bank's directory.", show_default=False)]
Tenant = Annotated[str, typer.Option(help="See this tenant's entries besides the public ones.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def _open(path: Path, writable: bool = False) -> Bank:
    from mem_triton.store.bank import Bank

    return Bank.open(path, writable=writable, wait=10.0 if writable else 0.0)


@app.command()
def create(
    path: BankPath,
    model: Annotated[str, typer.Option(help="Folder or Hugging Face id of the model that encodes.")],
    kind: Annotated[str, typer.Option(help='"memory3": sparse references; "prefix": whole texts.')] = "memory3",
    layers: Annotated[str, typer.Option(help='"first_half", "all", or like "0-17" or "4,5,9".')] = "first_half",
    keep: Annotated[str, typer.Option(help='Tokens kept a KV head, or "all".')] = "8",
    reference_tokens: Annotated[int, typer.Option(help="Longest reference.")] = 128,
    prefix_text: Annotated[
        Optional[str], typer.Option(help='Constant text before references; "" for the BOS token alone.')  # noqa: UP045
    ] = None,
    codec: Annotated[str, typer.Option(help="Precision on disk: fp32, bf16, fp16, fp8, int8.")] = "auto",
    embedder: Annotated[
        str, typer.Option(help='"lexical", "sentence-transformers:<model>" or "openai:<url>#<model>".')
    ] = "lexical",
) -> None:
    """Make an empty bank for a model. `mem-triton write` does it too, if there is none."""
    from mem_triton.cli.settings import new_bank, write_config

    config = write_config(
        kind=kind, layers=layers, keep=keep, reference_tokens=reference_tokens, prefix_text=prefix_text
    )
    new_bank(path, model, config, codec=codec, embedder=embedder).close()
    print(f"created {path}")


@app.command()
def info(path: BankPath, json: Json = False) -> None:
    """What a bank holds, and which model it belongs to."""
    with _open(path) as bank:
        fields = {**bank.spec.model_dump(mode="json"), **bank.stats(), "revision": bank.revision}
    if json:
        return output.print_json(fields)
    fingerprint = fields.pop("fingerprint")
    fields = {"model": ", ".join(f"{k} {v}" for k, v in fingerprint.items() if k != "rope"), **fields}
    output.print_fields({k: output.size(v) if k.endswith("bytes") else v for k, v in fields.items()})


def _row(entry: EntryInfo) -> list[Any]:
    text = " ".join(entry.text.split())
    return [entry.ref, entry.tenant or "-", entry.tokens if entry.has_block else "cold", entry.source or "-", text]


@app.command("list")
def list_entries(
    path: BankPath,
    tenant: Annotated[Optional[str], typer.Option(help="Only what this tenant sees; all if absent.")] = None,  # noqa: UP045
    after: Annotated[Optional[str], typer.Option(help="Entries behind this id.")] = None,  # noqa: UP045
    limit: Annotated[int, typer.Option(min=1, help="Most entries to show.")] = 100,
    cold: Annotated[bool, typer.Option("--cold", help="Only entries without keys and values.")] = False,
    json: Json = False,
) -> None:
    """Entries in order of their ids."""
    with _open(path) as bank:
        entries = bank.list(tenant=tenant, after=after, limit=limit, only_cold=cold)
    if json:
        return output.print_json([asdict(entry) for entry in entries])
    output.print_table(["ref", "tenant", "tokens", "source", "text"], [_row(entry) for entry in entries], wide="text")
    if len(entries) == limit:
        output.console(stderr=True).print(f"more: --after {entries[-1].id}", style="dim")


@app.command()
def search(
    path: BankPath,
    query: Annotated[str, typer.Argument(help="What to look for.", show_default=False)],
    top_k: Annotated[int, typer.Option(min=1, help="Most entries to show.")] = 5,
    tenant: Tenant = "",
    source: Annotated[Optional[str], typer.Option(help="Only entries from this source.")] = None,  # noqa: UP045
    json: Json = False,
) -> None:
    """The entries nearest in meaning, best first: what retrieval would find."""
    with _open(path) as bank:
        hits = bank.search(query, top_k, tenant=tenant, source=source)
        found = [(hit.score, bank.resolve(hit.ref, tenant=tenant)) for hit in hits]
    if json:
        return output.print_json([{"score": score, **asdict(entry)} for score, entry in found])
    rows = [[f"{score:.3f}", *_row(entry)] for score, entry in found]
    output.print_table(["score", "ref", "tenant", "tokens", "source", "text"], rows, wide="text")


@app.command()
def show(
    path: BankPath,
    id: Annotated[str, typer.Argument(metavar="ID", help='"id" or "id@version".', show_default=False)],
    tenant: Annotated[Optional[str], typer.Option(help="As this tenant; any if absent.")] = None,  # noqa: UP045
    json: Json = False,
) -> None:
    """One entry: its text, where it is from, and the tokens it keeps."""
    with _open(path) as bank:
        entry = bank.resolve(id, tenant=tenant or "", any_tenant=tenant is None)
        fields: dict[str, Any] = asdict(entry)
        if entry.has_block:
            block = bank.load(entry.ref)
            fields["shape"] = list(block.keys.shape)  # layers, KV heads, tokens, head size
            fields["bytes"] = sum(x.numel() * x.element_size() for x in (block.keys, block.values))
    if json:
        return output.print_json(fields)
    text = fields.pop("text")
    fields["created"] = output.when(fields["created"])
    output.print_fields({k: output.size(v) if k == "bytes" else v for k, v in fields.items()})
    print(f"\n{text}")


@app.command()
def delete(
    path: BankPath,
    ids: Annotated[list[str], typer.Argument(metavar="ID...", help='"id" for all versions, or "id@version".')],
) -> None:
    """Take entries out. `compact` frees their room."""
    with _open(path, writable=True) as bank:
        for id in ids:  # all are there before the first one goes
            bank.resolve(id, any_tenant=True)
        for id in ids:
            bank.delete(id)
    print(f"deleted {len(ids)}")


@app.command()
def verify(path: BankPath, json: Json = False) -> None:
    """Check every shard, the catalogue and the index; exit code 1 if something is wrong."""
    with _open(path) as bank:
        problems = bank.verify()
        entries = bank.stats().get("entries")
    if json:
        output.print_json({"problems": problems})
    else:
        print("\n".join(problems) or f"all well: {entries} entries")
    if problems:
        raise typer.Exit(1)


@app.command()
def compact(path: BankPath, json: Json = False) -> None:
    """Drop deleted and superseded versions, and files that nothing refers to."""
    with _open(path, writable=True) as bank:
        report = bank.compact()
    if json:
        return output.print_json(report)
    output.print_fields(report)


@app.command()
def export(
    path: BankPath,
    destination: Annotated[Path, typer.Argument(help="A new directory, or a .tar file.", show_default=False)],
    ids: Annotated[Optional[list[str]], typer.Option("--id", help="Only these ids; all if absent.")] = None,  # noqa: UP045
    tenant: Annotated[Optional[str], typer.Option(help="Only what this tenant sees.")] = None,  # noqa: UP045
) -> None:
    """Write entries, with their keys and values, to a place that `import` reads."""
    with _open(path) as bank:
        refs = bank.export(destination, ids or None, tenant)
    print(f"exported {len(refs)} to {destination}")


@app.command("import")
def import_entries(
    path: BankPath,
    source: Annotated[Path, typer.Argument(help="What `export` wrote.", show_default=False)],
) -> None:
    """Add exported entries to a bank of the same model."""
    with _open(path, writable=True) as bank:
        refs = bank.import_from(source)
    print(f"imported {len(refs)}")
