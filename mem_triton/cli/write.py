"""``mem-triton write``: texts into a bank."""

from __future__ import annotations

import sys
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from mem_triton.cli import output
from mem_triton.cli.progress import Progress

if TYPE_CHECKING:
    from mem_triton.cli.sources import SourceDocuments
    from mem_triton.store.bank import Bank
    from mem_triton.write import WriteConfig, Writer, WriteReport

Text = Optional[str]  # noqa: UP045  typer reads annotations on Python 3.10
MOST = 20
"""Lines about texts that were not written, or lie under another id."""


def write(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder or Hugging Face id.", show_default=False)],
    bank: Annotated[Path, typer.Argument(metavar="BANK", help="Made if there is none.", show_default=False)],
    files: Annotated[
        Optional[list[Path]],  # noqa: UP045
        typer.Argument(metavar="[FILES]...", help="Text, Markdown, JSONL; folders of them.", show_default=False),
    ] = None,
    kind: Annotated[
        Text, typer.Option(help='"parallel", "memory3" or "prefix". [by MODEL: parallel, or what it says]')
    ] = None,
    id: Annotated[Text, typer.Option(help="The entry's id, or what references' ids begin with. [file name]")] = None,
    tenant: Annotated[str, typer.Option(help="Whose entries these are; everybody's if absent.")] = "",
    format: Annotated[Text, typer.Option(help='"text", "markdown" or "jsonl". [by suffix]')] = None,
    jsonl_field: Annotated[str, typer.Option(help="JSONL field of the text.")] = "text",
    jsonl_id_field: Annotated[Text, typer.Option(help="JSONL field of the id.")] = None,
    layers: Annotated[Text, typer.Option(help='Of memory3: "first_half", "all", or like "0-17". [first_half]')] = None,
    keep: Annotated[Text, typer.Option(help='Of memory3: tokens kept a KV head, or "all". [8]')] = None,
    reference_tokens: Annotated[Optional[int], typer.Option(help="Longest reference. [128; parallel 512]")] = None,  # noqa: UP045
    head: Annotated[Text, typer.Option(help='Of parallel: text before references, or "raw". [a chat\'s]')] = None,
    system: Annotated[Text, typer.Option(help="Of parallel: the system prompt in a chat's head.")] = None,
    overlap_tokens: Annotated[Optional[int], typer.Option(help="Of parallel: repeated tokens. [64]")] = None,  # noqa: UP045
    temperature: Annotated[Optional[float], typer.Option(help="Of the attention to entries. [1.0]")] = None,  # noqa: UP045
    prefix_text: Annotated[
        Text, typer.Option(help='Of memory3: before references; "" for BOS alone. [<s>Reference:]')
    ] = None,
    selection: Annotated[Text, typer.Option(help='"softmax" or "exp_sum". [softmax]')] = None,
    context: Annotated[Text, typer.Option(help='Encode each "reference" alone, or the whole "document".')] = None,
    codec: Annotated[
        str, typer.Option(help="A new bank's precision: fp32, bf16, fp16, fp8, int8, or pq, trained on FILES.")
    ] = "auto",
    embedder: Annotated[str, typer.Option(help="A new bank's embedder.")] = "lexical",
    batch_size: Annotated[int, typer.Option(min=1, max=65536, help="Texts that share a forward.")] = 1,
    commit: Annotated[int, typer.Option(min=1, help="Most entries of one transaction.")] = 64,
    commit_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of one transaction.")] = 16384,
    commit_seconds: Annotated[float, typer.Option(min=0, help="Longest time between two transactions.")] = 10.0,
    dtype: Annotated[str, typer.Option(help="Precision of the model while it encodes.")] = "auto",
    device: Annotated[Text, typer.Option(help='"cuda", "cpu". [the GPU if there is one]')] = None,
    cold: Annotated[
        bool, typer.Option("--cold", help="Store texts alone; without FILES a write encodes them.")
    ] = False,
    replace: Annotated[
        bool, typer.Option("--replace", help="Take out what FILES held before and hold no more.")
    ] = False,
    prune: Annotated[
        bool, typer.Option("--prune", help="Take out entries of files that are gone from the folders in FILES.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Say nothing of progress.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Write texts into a bank. What is there already is left alone, so an interrupted write is simply started again.

    Without FILES, entries that have only their text (--cold) are encoded. What cannot be read or written is left out
    and listed at the end; exit code 1 says so, and 2 that nothing could be written.
    """
    from mem_triton.cli.settings import (
        OptionError,
        check_encoding,
        create_bank,
        folder_of,
        head_of,
        kind_of,
        write_config,
    )
    from mem_triton.cli.sources import SUFFIXES, SourceDocuments, sources_of
    from mem_triton.ids import ID_RULE, NAME_RULE, is_id, is_name
    from mem_triton.store.bank import Bank
    from mem_triton.store.bank.fingerprint import model_fingerprint
    from mem_triton.systems.explicit.training import train_product_codec
    from mem_triton.write import Writer, config_of

    if id is not None and not is_id(id):
        raise OptionError(f"--id: id {id!r} must be {ID_RULE}")
    if tenant and not is_name(tenant):
        raise OptionError(f"--tenant: {tenant!r} must be {NAME_RULE}")
    check_encoding(dtype, device)
    sources = sources_of(files or [])
    folders = [path for path in files or [] if path.is_dir()]
    if not sources and (files or cold) and not (prune and folders):
        raise OptionError(
            f"FILES: no {', '.join(SUFFIXES)} among {', '.join(map(str, files or []))}"
            if files
            else "FILES: --cold needs texts"
        )
    if prune and not folders:
        raise OptionError("--prune: FILES names no folder that files could be gone from")
    folder = folder_of(model)
    fingerprint = model_fingerprint(folder)
    given: dict[str, Any] = {
        "kind": kind,
        "layers": layers,
        "keep": keep,
        "reference_tokens": reference_tokens,
        "prefix_text": prefix_text,
        "selection": selection,
        "context": context,
        "overlap_tokens": overlap_tokens,
        "temperature": temperature,
    }
    encoder = None

    def documents_of(config: WriteConfig) -> SourceDocuments:
        single = config.kind == "prefix"
        return SourceDocuments(sources, format=format, field=jsonl_field, id_field=jsonl_id_field, id=id, single=single)

    if (bank / "bank.json").exists():
        target = Bank.open(bank, writable=True, wait=10.0)
        if head is not None or system is not None:
            given["prefix_text"] = head_of(folder, target.spec.kind, head, system)
        documents = documents_of(config_of(target.spec))
    else:
        given["kind"] = kind_of(folder, kind, layers, keep, prefix_text, selection, context)
        if prefix_text is None:
            given["prefix_text"] = head_of(folder, given["kind"], head, system)
        config, state = write_config(**given), None
        config.layer_indices(fingerprint.num_layers)
        documents = documents_of(config)
        if sources and next(iter(documents_of(config)), None) is None:
            list(documents)
            _refuse(documents.problems or [f"FILES: {sources[0].path} holds no text"])
        if codec == "pq":
            encoder = _encoder(str(folder), dtype, device)
            state = train_product_codec(
                config, fingerprint, encoder, encoder.tokenizer, documents_of(config), batch_size=batch_size
            )
        target = create_bank(bank, fingerprint, config, codec=codec, embedder=embedder, codec_state=state)
    with target:
        target.check_model(fingerprint)
        config = write_config(config_of(target.spec), **given)
        if dtype == "auto" and target.spec.dtype != fingerprint.dtype:  # a bank that `import` has made keeps float32
            dtype = target.spec.dtype
        encoder = encoder or _encoder(str(folder), dtype, device)
        writer = Writer(
            target,
            encoder,
            encoder.tokenizer,
            config,
            batch_size=batch_size,
            commit=commit,
            commit_tokens=commit_tokens,
            commit_seconds=commit_seconds,
        )
        try:
            with Progress(documents, sum(source.size for source in sources), quiet or json) as progress:
                if files:
                    report = writer.write(documents, tenant=tenant, cold=cold, replace=replace, progress=progress)
                else:
                    report = writer.fill_cold(progress=progress)
        except KeyboardInterrupt:
            entries = target.stats()["entries"]
            print(
                f"mem-triton: stopped; {entries} entries are safe, the same command goes on from there", file=sys.stderr
            )
            raise typer.Exit(130) from None
        report.problems = [*documents.problems, *report.problems]
        if report.problems and not (report.added or report.filled or report.skipped or report.empty):
            _refuse(report.problems)
        if files:
            _tidy(target, writer, documents, report, tenant, replace, folders if prune else [])
    _print(report, bank, json)
    if report.problems:
        raise typer.Exit(1)


def _refuse(problems: list[str]) -> None:
    """Nothing could be written. Raises DocumentError with the first reason."""
    from mem_triton.write import DocumentError

    more = f"; {len(problems) - 1} more are wrong" if len(problems) > 1 else ""
    raise DocumentError(problems[0] + more)


def _tidy(
    bank: Bank,
    writer: Writer,
    documents: SourceDocuments,
    report: WriteReport,
    tenant: str,
    replace: bool,
    folders: list[Path],
) -> None:
    """Take out, or tell of, what files held before. One of which something was not written keeps all that it had."""
    from mem_triton.write.chunking import printable
    from mem_triton.write.known import gone_files, stale

    failed = documents.failed | writer.failed
    whole = [path for path in (printable(source.path) for source in documents.sources) if path not in failed]
    old = [info.ref for info in stale(bank, whole, writer.written, tenant)]
    gone = [info.ref for info in stale(bank, gone_files(bank, folders, tenant), set(), tenant)] if folders else []
    report.removed = list(dict.fromkeys(chain(old if replace else [], gone)))
    report.stale = [] if replace else [ref for ref in old if ref not in gone]
    for ref in report.removed:
        bank.delete(ref.rpartition("@")[0], tenant=tenant)


def _encoder(folder: str, dtype: str, device: str | None) -> Any:
    import importlib

    try:  # by name: the engine-neutral package does not depend on the integrations
        integration = importlib.import_module("mem_triton_transformers")
    except ModuleNotFoundError as error:
        raise ImportError(f'writing needs transformers ({error}): pip install "mem-triton[hf]"') from None
    importlib.import_module("transformers.utils.logging").disable_progress_bar()  # ours is the one
    try:
        return integration.TransformersEncoder.load(folder, dtype=dtype, device=device)
    except Exception as error:  # whatever transformers makes of a damaged config, tokenizer or tensor
        raise ValueError(f"MODEL: {folder} cannot be loaded: {type(error).__name__}: {error}") from None


def _print(report: WriteReport, bank: Path, json: bool) -> None:
    if json:
        return output.print_json(vars(report))
    parts = [f"{len(report.added)} added"]
    parts += [f"{len(report.filled)} encoded"] if report.filled else []
    parts += [f"{report.skipped} there already"] if report.skipped else []
    parts += [f"{report.empty} blank or without a token to keep"] if report.empty else []
    parts += [f"{len(report.removed)} taken out"] if report.removed else []
    parts += [f"{len(report.problems)} not written"] if report.problems else []
    print(output.plain(f"{bank}: {', '.join(parts)} ({report.tokens} tokens, {report.seconds:.1f} s)"))
    if report.stale:
        output.note(
            f"{len(report.stale)} entries of earlier contents of these files are still served: --replace takes them out"
        )
    _list("there already under another id", report.elsewhere)
    _list("not written", report.problems)


def _list(what: str, lines: list[str]) -> None:
    for line in lines[:MOST]:
        output.note(f"{what}: {line}")
    if len(lines) > MOST:
        output.note(f"{what}: {len(lines) - MOST} more, see --json")
