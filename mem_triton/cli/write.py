"""``mem-triton write``: texts into a bank."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from mem_triton.cli import output

if TYPE_CHECKING:
    from mem_triton.memory3 import Document, WriteConfig, WriteReport

SUFFIXES = (".txt", ".md", ".markdown", ".jsonl", ".ndjson")
Text = Optional[str]  # noqa: UP045  typer reads annotations on Python 3.10


def write(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder or Hugging Face id.", show_default=False)],
    bank: Annotated[Path, typer.Argument(metavar="BANK", help="Made if there is none.", show_default=False)],
    files: Annotated[
        Optional[list[Path]],  # noqa: UP045
        typer.Argument(metavar="[FILES]...", help="Text, Markdown, JSONL; folders of them.", show_default=False),
    ] = None,
    kind: Annotated[Text, typer.Option(help='"memory3": sparse references; "prefix": whole texts. [memory3]')] = None,
    id: Annotated[Text, typer.Option(help="The entry's id, or what references' ids begin with. [file name]")] = None,
    tenant: Annotated[str, typer.Option(help="Whose entries these are; everybody's if absent.")] = "",
    format: Annotated[Text, typer.Option(help='"text", "markdown" or "jsonl". [by suffix]')] = None,
    jsonl_field: Annotated[str, typer.Option(help="JSONL field of the text.")] = "text",
    jsonl_id_field: Annotated[Text, typer.Option(help="JSONL field of the id.")] = None,
    layers: Annotated[Text, typer.Option(help='"first_half", "all", or like "0-17". [first_half]')] = None,
    keep: Annotated[Text, typer.Option(help='Tokens kept a KV head, or "all". [8]')] = None,
    reference_tokens: Annotated[Optional[int], typer.Option(help="Longest reference. [128]")] = None,  # noqa: UP045
    prefix_text: Annotated[Text, typer.Option(help='Before references; "" for BOS alone. [<s>Reference:]')] = None,
    selection: Annotated[Text, typer.Option(help='"softmax" or "exp_sum". [softmax]')] = None,
    context: Annotated[Text, typer.Option(help='Encode each "reference" alone, or the whole "document".')] = None,
    codec: Annotated[
        str, typer.Option(help="A new bank's precision: fp32, bf16, fp16, fp8, int8, or pq, trained on FILES.")
    ] = "auto",
    embedder: Annotated[str, typer.Option(help="A new bank's embedder.")] = "lexical",
    batch_size: Annotated[int, typer.Option(min=1, help="Texts that share a forward.")] = 1,
    commit: Annotated[int, typer.Option(min=1, help="Entries of one transaction.")] = 64,
    dtype: Annotated[str, typer.Option(help="Precision of the model while it encodes.")] = "auto",
    device: Annotated[Text, typer.Option(help='"cuda", "cpu". [the GPU if there is one]')] = None,
    cold: Annotated[
        bool, typer.Option("--cold", help="Store texts alone; without FILES a write encodes them.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Write texts into a bank. What is there already is left alone, so an interrupted write is simply started again.

    Without FILES, entries that have only their text (--cold) are encoded.
    """
    from mem_triton.cli.settings import OptionError, create_bank, model_folder, write_config
    from mem_triton.memory3 import Writer, config_of, train_product_codec
    from mem_triton.store.bank import Bank
    from mem_triton.store.fingerprint import model_fingerprint
    from mem_triton.store.spec import check_id

    if id is not None:
        check_id(id)
    sources = _sources(files or [])
    if not sources and (files or cold):
        raise OptionError(f"FILES: no {', '.join(SUFFIXES)} among {', '.join(map(str, files or []))}" if files else
                          "FILES: --cold needs texts")  # fmt: skip
    folder = model_folder(model)
    fingerprint = model_fingerprint(folder)
    given: dict[str, Any] = {
        "kind": kind, "layers": layers, "keep": keep, "reference_tokens": reference_tokens,
        "prefix_text": prefix_text, "selection": selection, "context": context,
    }  # fmt: skip
    encoder = None

    def documents(config: WriteConfig) -> Iterator[Document]:
        return _documents(sources, format, jsonl_field, jsonl_id_field, id, single=config.kind == "prefix")

    if (bank / "bank.json").exists():
        target = Bank.open(bank, writable=True, wait=10.0)
    else:
        config, state = write_config(**given), None
        if codec == "pq":
            encoder = _encoder(str(folder), dtype, device)
            state = train_product_codec(
                config, fingerprint, encoder, encoder.tokenizer, documents(config), batch_size=batch_size
            )
        target = create_bank(bank, fingerprint, config, codec=codec, embedder=embedder, codec_state=state)
    with target:
        target.check_model(fingerprint)
        config = write_config(config_of(target.spec), **given)
        encoder = encoder or _encoder(str(folder), dtype, device)
        writer = Writer(target, encoder, encoder.tokenizer, config, batch_size=batch_size, commit=commit)
        try:
            with _Progress(sum(path.stat().st_size for path in sources), quiet or json) as progress:
                if sources:
                    report = writer.write(documents(config), tenant=tenant, cold=cold, progress=progress)
                else:
                    report = writer.fill_cold(progress=progress)
        except KeyboardInterrupt:
            entries = target.stats()["entries"]
            print(
                f"mem-triton: stopped; {entries} entries are safe, the same command goes on from there", file=sys.stderr
            )
            raise typer.Exit(130) from None
    _print(report, bank, json)


def _encoder(folder: str, dtype: str, device: str | None) -> Any:
    import importlib

    try:  # by name: the engine-neutral package does not depend on the integrations
        integration = importlib.import_module("mem_triton_transformers")
    except ModuleNotFoundError as error:
        raise ImportError(f'writing needs transformers ({error}): pip install "mem-triton[hf]"') from None
    importlib.import_module("transformers.utils.logging").disable_progress_bar()  # ours is the one
    return integration.TransformersEncoder.load(folder, dtype=dtype, device=device)


def _sources(files: Sequence[Path]) -> list[Path]:
    """The files, with folders replaced by the texts in them, in order."""
    found: list[Path] = []
    for path in files:
        if path.is_dir():
            found += sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
        elif not path.exists():
            raise FileNotFoundError(f"FILES: there is no {path}")
        else:
            found.append(path)
    return found


def _documents(
    sources: Sequence[Path], format: str | None, field: str, id_field: str | None, id: str | None, single: bool
) -> Iterator[Document]:
    from mem_triton.memory3 import DocumentError, read_documents

    count = 0
    for path in sources:
        # a prefix is a whole file: Markdown is not cut into its sections
        way = "text" if single and format is None and path.suffix.lower() in (".md", ".markdown") else format
        for document in read_documents(path, field=field, id_field=id_field, format=way):
            count += 1
            if id is not None and single and count > 1:
                raise DocumentError(f"--id: {id} would name several texts; write them one by one, or leave it out")
            yield document if id is None else replace(document, name=id)


class _Progress:
    """A bar over the files' bytes; silent away from a terminal."""

    def __init__(self, total: int, quiet: bool) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self.bar = Progress(
            TextColumn("writing"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.fields[entries]} entries, {task.fields[speed]} tokens/s"), TimeRemainingColumn(),
            console=output.console(stderr=True), disable=quiet, transient=True,
        )  # fmt: skip
        self.task = self.bar.add_task("write", total=total or None, entries=0, speed="-")

    def __enter__(self) -> _Progress:
        self.bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.bar.stop()

    def __call__(self, report: WriteReport) -> None:
        speed = f"{report.tokens / report.seconds:.0f}" if report.seconds else "-"
        entries = len(report.added) + len(report.filled) + report.skipped
        self.bar.update(self.task, completed=report.characters, entries=entries, speed=speed)


def _print(report: WriteReport, bank: Path, json: bool) -> None:
    if json:
        return output.print_json(vars(report))
    parts = [f"{len(report.added)} added"]
    parts += [f"{len(report.filled)} encoded"] if report.filled else []
    parts += [f"{report.skipped} there already"] if report.skipped else []
    parts += [f"{report.empty} without a token to keep"] if report.empty else []
    print(f"{bank}: {', '.join(parts)} ({report.tokens} tokens, {report.seconds:.1f} s)")
