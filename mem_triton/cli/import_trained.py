"""``mem-triton import``: keys and values that others have trained into a bank."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from mem_triton.cli import output

if TYPE_CHECKING:
    from mem_triton.store.bank import Bank
    from mem_triton.store.bank.fingerprint import Fingerprint
    from mem_triton.store.bank.formats.trained import TrainedEntry

Text = Optional[str]  # noqa: UP045  typer reads annotations on Python 3.10


def import_trained(
    sources: Annotated[
        list[str],
        typer.Argument(metavar="SOURCE...", help="Folder, file or Hugging Face id; several.", show_default=False),
    ],
    path: Annotated[Path, typer.Argument(metavar="BANK", help="Made if there is none.", show_default=False)],
    model: Annotated[str, typer.Option(help="Folder or Hugging Face id of the model.", show_default=False)],
    id: Annotated[Text, typer.Option(help="The entry's id. [name of the source]")] = None,
    form: Annotated[str, typer.Option("--as", help='"peft", "cartridge", or "auto" by the files.')] = "auto",
    file: Annotated[Text, typer.Option(help="Which file of SOURCE.")] = None,
    revision: Annotated[Text, typer.Option(help="Of SOURCE on Hugging Face.")] = None,
    compose: Annotated[bool, typer.Option("--compose", help="Make one entry of all SOURCEs, row after row.")] = False,
    chat_template: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(metavar="OUT.jinja", help="Write the model's template without BOS and default system message."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Also what was trained with a model of another name.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Add trained keys and values to a bank: cartridges, and adapters of peft that learn a prompt.

    Those are PREFIX_TUNING, CARTRIDGE, PROMPT_TUNING and P_TUNING. What is imported is checked against the model, kept
    in fp32, and read by requests that name the entry in mem_ids.
    """
    from mem_triton.cli.settings import OptionError, folder_of
    from mem_triton.ids import ID_RULE, id_from, is_id
    from mem_triton.store.bank.fingerprint import model_fingerprint
    from mem_triton.store.bank.formats.locate import FORMS
    from mem_triton.systems.explicit import artifacts

    if form not in FORMS:
        raise OptionError(f"--as: {form!r} is not one of {', '.join(FORMS)}")
    if id is not None and not is_id(id):
        raise OptionError(f"--id: id {id!r} must be {ID_RULE}")
    if compose and len(sources) < 2:
        raise OptionError("--compose: name at least two SOURCEs")
    if len(sources) > 1 and not compose and (id or file or revision):
        raise OptionError("--id, --file and --revision are of one SOURCE; import them one by one, or --compose them")
    if compose and id is None:
        raise OptionError("--id: a composed entry needs one")
    folder = folder_of(model)
    fingerprint = model_fingerprint(folder)
    config = artifacts.model_config(folder)
    names = [model, str(config.get("_name_or_path") or "")]
    read, notes = [], []
    for source in sources:
        trained = artifacts.read_trained(source, fingerprint, form, file, revision)
        notes.append(artifacts.check_base(trained, names, force))
        read.append(trained if trained.embeddings is None else _encoded(trained, folder))
    template = _template(folder) if chat_template is not None else None
    entries = (
        [(id or "", sources[0], read)]
        if compose
        else [(id or id_from(_stem(source)), source, [trained]) for source, trained in zip(sources, read, strict=True)]
    )
    spec = _spec(path, fingerprint)
    notes.append(artifacts.check_bank(spec))
    new = [artifacts.entry_of(parts, name, spec, config, source, revision) for name, source, parts in entries]
    with _bank(path, fingerprint) as bank:
        stored = [artifacts.store(bank, entry) for entry in new]
    if chat_template is not None:
        from mem_triton.store.files import write_durably

        write_durably(chat_template, lambda temporary: temporary.write_text(template, encoding="utf-8"))
    notes = [note for note in notes if note]
    for note in notes:
        output.note(note)
    if json:
        added, there = ([ref for ref, written in stored if written == which] for which in (True, False))
        return output.print_json({"added": added, "there": there, "notes": notes})
    for entry, (ref, written) in zip(new, stored, strict=True):
        print(output.plain(f"{path}: {ref} {'imported' if written else 'there already'}: {entry.text}"))


def _stem(source: str) -> str:
    path = Path(source.rstrip("/"))
    return path.stem if path.suffix in (".pt", ".safetensors", ".bin") else path.name


def _spec(path: Path, fingerprint: Fingerprint) -> Any:
    from mem_triton.store.bank.creation import read_spec
    from mem_triton.systems.explicit.artifacts import import_bank_spec

    return read_spec(path) if (path / "bank.json").exists() else import_bank_spec(fingerprint)


def _bank(path: Path, fingerprint: Fingerprint) -> Bank:
    """The bank, open for writing and checked against the model; made if there is none."""
    from mem_triton.store.bank import Bank
    from mem_triton.systems.explicit.artifacts import import_bank_spec

    if not (path / "bank.json").exists():
        return Bank.create(path, import_bank_spec(fingerprint))
    bank = Bank.open(path, writable=True, wait=10.0)
    try:
        bank.check_model(fingerprint)
    except BaseException:
        bank.close()
        raise
    return bank


def _transformers() -> Any:
    try:  # by name: the engine-neutral package does not depend on it
        return importlib.import_module("transformers")
    except ModuleNotFoundError as error:
        raise ImportError(f'this import needs transformers ({error}): pip install "mem-triton[hf]"') from None


def _encoded(trained: TrainedEntry, folder: Path) -> TrainedEntry:
    """Input embeddings run through the model once, in fp32: the KV cache that they leave at 0...p-1."""
    import torch

    transformers = _transformers()
    importlib.import_module("transformers.utils.logging").disable_progress_bar()
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        cache = transformers.DynamicCache()
        with torch.inference_mode():
            model(inputs_embeds=trained.embeddings[None], past_key_values=cache, use_cache=True)
        keys, values = (torch.stack([getattr(layer, name)[0] for layer in cache.layers]) for name in ("keys", "values"))
    except Exception as error:  # whatever transformers makes of a damaged config or tensor
        raise ValueError(f"MODEL: {folder} cannot encode embeddings: {type(error).__name__}: {error}") from None
    return replace(trained, keys=keys.clone(), values=values.clone(), embeddings=None)


def _template(folder: Path) -> str:
    from mem_triton.systems.explicit.cartridge_template import cartridge_template

    try:
        tokenizer = _transformers().AutoTokenizer.from_pretrained(folder)
    except ImportError:
        raise
    except Exception as error:  # whatever transformers makes of a damaged tokenizer
        raise ValueError(f"MODEL: {folder}: its tokenizer cannot be loaded: {error}") from None
    return cartridge_template(tokenizer)
