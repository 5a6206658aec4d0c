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
    kind: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            help='"parallel": dense references; "memory3": sparse ones; "prefix": whole texts. [by model]',
            show_default=False,
        ),
    ] = None,
    layers: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help='Of memory3: "first_half", "all", or like "0-17" or "4,5,9". [first_half]'),
    ] = None,
    keep: Annotated[Optional[str], typer.Option(help='Of memory3: tokens kept a KV head, or "all". [8]')] = None,  # noqa: UP045
    reference_tokens: Annotated[Optional[int], typer.Option(help="Longest reference. [128; parallel 512]")] = None,  # noqa: UP045
    head: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help='Of parallel: text before references, or "raw". [a chat\'s]'),
    ] = None,
    system: Annotated[Optional[str], typer.Option(help="Of parallel: the system prompt in a chat's head.")] = None,  # noqa: UP045
    prefix_text: Annotated[
        Optional[str], typer.Option(help='Constant text before references; "" for the BOS token alone.')  # noqa: UP045
    ] = None,
    codec: Annotated[str, typer.Option(help="Precision on disk: fp32, bf16, fp16, fp8, int8.")] = "auto",
    embedder: Annotated[
        str, typer.Option(help='"lexical", "sentence-transformers:<model>" or "openai:<url>#<model>".')
    ] = "lexical",
) -> None:
    """Make an empty bank for a model. `mem-triton write` does it too, if there is none."""
    from mem_triton.cli.settings import folder_of, head_of, kind_of, new_bank, write_config

    folder = folder_of(model)
    kind = kind_of(folder, kind, layers, keep, prefix_text)
    if prefix_text is None:
        prefix_text = head_of(folder, kind, head, system)
    config = write_config(
        kind=kind, layers=layers, keep=keep, reference_tokens=reference_tokens, prefix_text=prefix_text
    )
    new_bank(path, model, config, codec=codec, embedder=embedder).close()
    print(f"created {path}")


@app.command()
def info(path: BankPath, json: Json = False) -> None:
    """What a bank holds, and which model it belongs to."""
    from mem_triton.store.bank.reindexing import outdated

    with _open(path) as bank:
        fields = {**bank.spec.model_dump(mode="json"), **bank.stats(), "revision": bank.revision}
        if old := outdated(bank):
            output.note(old)
    if json:
        return output.print_json(fields)
    fingerprint = fields.pop("fingerprint")
    fields = {"model": ", ".join(f"{k} {v}" for k, v in fingerprint.items() if k != "rope"), **fields}
    output.print_fields({k: output.size(v) if k.endswith("bytes") else v for k, v in fields.items()})


def _row(entry: EntryInfo) -> list[Any]:
    text = " ".join(entry.text.split())
    return [entry.ref, entry.tenant or "-", entry.tokens if entry.has_block else "cold", entry.source or "-", text]


def _say_unnameable(path: Path, entries: list[EntryInfo]) -> None:
    from mem_triton.store.bank.documents import unnameable

    ids, tenants = unnameable(entries)
    if ids:
        output.note(f"no request can name {_some(ids)}: mem-triton bank rename {path} {ids[0]} NEW-ID")
    if tenants:
        output.note(f"no request can name tenant {_some(tenants)}: mem-triton bank rename {path} OLD NEW --tenant")


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


@app.command("list")
def list_entries(
    path: BankPath,
    tenant: Annotated[Optional[str], typer.Option(help="Only what this tenant sees; all if absent.")] = None,  # noqa: UP045
    after: Annotated[Optional[str], typer.Option(help="Entries behind this id.")] = None,  # noqa: UP045
    limit: Annotated[int, typer.Option(min=1, max=1_000_000_000, help="Most entries to show.")] = 100,
    cold: Annotated[bool, typer.Option("--cold", help="Only entries without keys and values.")] = False,
    document: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="The references of this document, in its order: requests can name them DOCUMENT#0, #1, ..."),
    ] = None,
    source: Annotated[Optional[str], typer.Option(help="Entries of this file, in its order.")] = None,  # noqa: UP045
    json: Json = False,
) -> None:
    """Entries in order of their ids, or of their document."""
    from mem_triton.store.bank.documents import in_order, of_source, references

    with _open(path) as bank:
        more = False
        if document is not None:
            entries = references(bank, document, tenant)
        elif source is not None:
            entries = in_order(e for e in of_source(bank, source) if tenant is None or e.tenant in ("", tenant))
        else:
            entries = bank.list(tenant=tenant, after=after, limit=limit, only_cold=cold)
            more = len(entries) == limit
    if json:
        return output.print_json([asdict(entry) for entry in entries])
    columns, rows = ["ref", "tenant", "tokens", "source", "text"], [_row(entry) for entry in entries]
    if document is not None:
        columns, rows = ["name", *columns], [[f"{document}#{i}", *row] for i, row in enumerate(rows)]
    output.print_table(columns, rows, wide="text")
    _say_unnameable(path, entries)
    if more:
        output.note(f"more: --after {entries[-1].id}")


@app.command()
def search(
    path: BankPath,
    query: Annotated[str, typer.Argument(help="What to look for.", show_default=False)],
    top_k: Annotated[int, typer.Option(min=1, max=1_000_000, help="Most entries to show.")] = 5,
    tenant: Tenant = "",
    source: Annotated[Optional[str], typer.Option(help="Only entries from this source.")] = None,  # noqa: UP045
    json: Json = False,
) -> None:
    """The entries nearest in meaning, best first: what retrieval would find."""
    from mem_triton.store.bank.reindexing import outdated

    with _open(path) as bank:
        if old := outdated(bank):
            output.note(old)
        hits = bank.search(query, top_k, tenant=tenant, source=source)
        found = [(hit.score, bank.resolve(hit.ref, tenant=tenant)) for hit in hits]
    if json:
        return output.print_json([{"score": score, **asdict(entry)} for score, entry in found])
    rows = [[f"{score:.3f}", *_row(entry)] for score, entry in found]
    output.print_table(["score", "ref", "tenant", "tokens", "source", "text"], rows, wide="text")
    _say_unnameable(path, [entry for _, entry in found])


@app.command()
def show(
    path: BankPath,
    id: Annotated[str, typer.Argument(metavar="ID", help='"id", "id@version" or "document#0".', show_default=False)],
    tenant: Annotated[Optional[str], typer.Option(help="As this tenant; any if absent.")] = None,  # noqa: UP045
    json: Json = False,
) -> None:
    """One entry: its text, where it is from, and the tokens it keeps."""
    from mem_triton.store.bank.documents import resolve_all

    with _open(path) as bank:
        found = resolve_all(bank, id, tenant=tenant or "", any_tenant=tenant is None)
        if len(found) != 1:
            raise ValueError(f"ID: {id} names {len(found)} references; show one of them, like {found[0].ref}")
        (entry,) = found
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
    ids: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Argument(
            metavar="[ID]...", help='"id" for all versions, "id@version", "document#*".', show_default=False
        ),
    ] = None,
    source: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(help="All entries of this file; may be given again."),
    ] = None,
    tenant: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Only what belongs to this tenant.", show_default="anybody's"),
    ] = None,
) -> None:
    """Take entries out. `compact` frees their room.

    A version alone leaves the earlier ones: the id then names the newest that is left.
    """
    from mem_triton.store.bank.documents import of_source, resolve_all

    if not ids and not source:
        raise ValueError("ID: name entries, or give --source FILE")
    with _open(path, writable=True) as bank:
        chosen: dict[str, None] = {}  # all are there before the first one goes
        for id in ids or []:
            found = resolve_all(bank, id, tenant=tenant or "", any_tenant=tenant is None)
            chosen |= dict.fromkeys([id] if "#" not in id else [entry.id for entry in found])
        for file in source or []:
            found = of_source(bank, file, tenant)
            if not found:
                raise ValueError(f"--source: no entry is from {file}; `mem-triton bank list` shows sources")
            chosen |= dict.fromkeys(entry.id for entry in found)
        chosen = {id: None for id in chosen if id.partition("@")[0] == id or id.partition("@")[0] not in chosen}
        for id in chosen:
            bank.delete(id, tenant=tenant)
        names = dict.fromkeys(id.partition("@")[0] for id in chosen)
        left = [bank.resolve(id, any_tenant=True) for id in names if bank.catalogue.find(id)]
    print(f"deleted {len(chosen)}" + "".join(f"; {entry.ref} is the newest again" for entry in left))


@app.command()
def rename(
    path: BankPath,
    old: Annotated[str, typer.Argument(help="The id, or with --tenant the tenant, as it is.", show_default=False)],
    new: Annotated[str, typer.Argument(help="As it shall be.", show_default=False)],
    tenant: Annotated[bool, typer.Option("--tenant", help="Rename a tenant instead of an entry.")] = False,
) -> None:
    """Give an entry with all its versions another id, or a tenant another name."""
    from mem_triton.store.bank import writing

    with _open(path, writable=True) as bank:
        if tenant:
            count = writing.rename_tenant(bank, old, new)
            print(f"{count} entries belong to {new} now")
        else:
            print(f"{old} is {writing.rename(bank, old, new)} now")


@app.command()
def verify(path: BankPath, json: Json = False) -> None:
    """Check every shard, the catalogue and the index; exit code 1 if something is wrong."""
    with _open(path) as bank:
        problems = bank.verify()
        entries = bank.stats().get("entries")
    output.print_problems(problems, f"all well: {entries} entries", json)


@app.command()
def compact(path: BankPath, json: Json = False) -> None:
    """Drop deleted and superseded versions, and files that nothing refers to."""
    with _open(path, writable=True) as bank:
        report = bank.compact()
    if json:
        return output.print_json(report)
    output.print_fields(report)


@app.command()
def reindex(path: BankPath) -> None:
    """Embed all texts anew with today's version of the bank's embedder."""
    from mem_triton.store.bank.reindexing import reindex as again

    with _open(path, writable=True) as bank:
        count = again(bank)
    print(f"reindexed {count}")


@app.command()
def export(
    path: BankPath,
    destination: Annotated[
        Path,
        typer.Argument(
            metavar="DESTINATION",
            help="A new directory, or a .tar file; with --as peft the entry's ID.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Argument(metavar="[OUT]", help="With --as peft: a new directory.", show_default=False),
    ] = None,
    ids: Annotated[Optional[list[str]], typer.Option("--id", help="Only these ids; all if absent.")] = None,  # noqa: UP045
    tenant: Annotated[Optional[str], typer.Option(help="Only what this tenant sees.")] = None,  # noqa: UP045
    form: Annotated[
        str,
        typer.Option("--as", help='"bank", or "peft": the one entry ID as a CARTRIDGE adapter.'),
    ] = "bank",
    model: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="With --as peft: the bank's model, to be named in the adapter.", show_default="unnamed"),
    ] = None,
) -> None:
    """Write entries, with their keys and values, to a place that `import` reads; or one of them as peft's adapter."""
    from mem_triton.cli.settings import OptionError

    if form not in ("bank", "peft"):
        raise OptionError(f"--as: {form!r} is neither bank nor peft")
    if form == "bank" and (out or model):
        raise OptionError(f"{'OUT' if out else '--model'}: goes with --as peft; leave it out")
    if form == "peft" and (out is None or ids):
        raise OptionError("--as peft takes one entry: bank export BANK ID --as peft OUT")
    with _open(path) as bank:
        if form == "peft":
            ref = _export_peft(bank, str(destination), out, model, tenant)
            return print(f"exported {ref} to {out}")
        refs = bank.export(destination, ids or None, tenant)
    print(f"exported {len(refs)} to {destination}")


def _export_peft(bank: Bank, id: str, out: Path, model: str | None, tenant: str | None) -> str:
    from mem_triton.cli.settings import folder_of
    from mem_triton.store.bank.fingerprint import model_fingerprint
    from mem_triton.systems.explicit.artifacts import export_peft, model_config

    config = None
    if tenant is not None:
        bank.resolve(id, tenant=tenant)
    if model is not None:
        folder = folder_of(model)
        bank.check_model(model_fingerprint(folder))
        config = model_config(folder)
    return export_peft(bank, id, out, config, model)


@app.command("import")
def import_entries(
    path: BankPath,
    source: Annotated[Path, typer.Argument(help="What `export` wrote.", show_default=False)],
) -> None:
    """Add exported entries to a bank of the same model."""
    with _open(path, writable=True) as bank:
        refs = bank.import_from(source)
    print(f"imported {len(refs)}")
