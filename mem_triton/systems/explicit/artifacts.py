"""Makes trained keys and values entries of a bank of whole texts, and back.

An entry is read like a text that was written: ``mem_ids`` names it, and it lies directly before the text. What was
imported is kept in fp32 and says in its metadata, under "trained", where it is from.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mem_triton.ops.reposition import RotaryEmbedding
from mem_triton.store.bank import Bank, BankSpec, NewEntry
from mem_triton.store.bank.fingerprint import Fingerprint
from mem_triton.store.bank.formats.cartridge import read_cartridge
from mem_triton.store.bank.formats.locate import Form, locate
from mem_triton.store.bank.formats.peft import read_peft, write_peft
from mem_triton.store.bank.formats.trained import (
    TrainedEntry,
    block_of,
    cache_of,
    check_attention,
    check_rows,
    composed,
    model_ropes,
    same_model,
)
from mem_triton.store.block import MemoryBlock
from mem_triton.store.errors import ArtifactError
from mem_triton.systems.explicit.trained import TRAINED, is_trained

INTERLEAVED = {
    "CohereForCausalLM": "cohere",
    "Cohere2ForCausalLM": "cohere2",
    "GlmForCausalLM": "glm",
    "Glm4ForCausalLM": "glm4",
    "HeliumForCausalLM": "helium",
    "GPTJForCausalLM": "gptj",
}


def read_trained(
    source: str, model: Fingerprint, form: Form = "auto", file: str | None = None, revision: str | None = None
) -> TrainedEntry:
    """What a folder, a file or a repository holds. Raises ArtifactError naming the file and the field."""
    kind, path = locate(source, form, file, revision)
    return read_peft(path, model) if kind == "peft" else read_cartridge(path, model)


def model_config(folder: Path) -> Mapping[str, Any]:
    """A model's ``config.json``, whose fingerprint was taken. Raises ArtifactError for one that cannot read rows."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    check_attention(config)
    return config


def check_base(trained: TrainedEntry, models: Sequence[str], force: bool) -> str | None:
    """What to say of an artifact that names another model than ``models``, the names of this one; None if it fits.

    Raises ArtifactError for an adapter of peft unless ``force``. What stands beside a cartridge is known to be stale
    at times, so its tensors' shapes decide.
    """
    name = trained.base_model
    if name is None or same_model(name, models):
        return None
    field = f"{trained.file}/adapter_config.json: base_model_name_or_path"
    said = f"{field}: it was trained with {name}, MODEL is {models[0]}"
    if trained.form == "cartridge":
        return f"{trained.file}: config.yaml names {name}, MODEL is {models[0]}; its shapes fit, so it is imported"
    if force:
        return f"{said}; imported because of --force"
    raise ArtifactError(f"{said}; give that model, or say --force if both have the same weights")


def import_bank_spec(model: Fingerprint, embedder: str = "lexical") -> BankSpec:
    """The specification of a bank that is made for imports: every layer, in fp32 on the disk and when loaded."""
    return BankSpec(
        kind="prefix",
        fingerprint=model,
        layers=tuple(range(model.num_layers)),
        kv_heads=model.kv_heads,
        head_dim=model.head_dim,
        codec="fp32",
        dtype="float32",
        embedder=embedder,
    )


def check_bank(spec: BankSpec) -> str | None:
    """What to say of a bank that rounds imports; None if it keeps them. Raises ArtifactError for one that cannot."""
    if spec.kind != "prefix":
        raise ArtifactError(f"BANK: kind is {spec.kind}, and imports are of kind prefix; name another bank")
    if len(spec.layers) != spec.fingerprint.num_layers:
        raise ArtifactError(
            f"BANK: layers: it keeps {len(spec.layers)} of {spec.fingerprint.num_layers}; name another bank"
        )
    if (spec.codec, spec.dtype) == ("fp32", "float32"):
        return None
    return (
        f"BANK: it keeps {spec.dtype} as {spec.codec}, so imports are rounded; a bank that import makes keeps float32"
    )


def entry_of(
    parts: Sequence[TrainedEntry], id: str, spec: BankSpec, config: Mapping[str, Any], source: str, revision: str | None
) -> NewEntry:
    """One or several artifacts, composed, as an entry to be written.

    Raises ArtifactError for RoPE that cannot be moved, and for more rows than the model's context.
    """
    trained = composed(parts) if len(parts) > 1 else parts[0]
    check_rows(source, trained.rows, config)
    block = block_of(trained, model_ropes(config, spec.fingerprint.num_layers))
    block = MemoryBlock(block.keys.to(spec.torch_dtype), block.values.to(spec.torch_dtype), block.positions)
    about = {
        "form": trained.form,
        "rows": trained.rows,
        "frozen": trained.frozen,
        "base_model": trained.base_model,
        "revision": revision,
        "sha256": trained.digest,
    }
    text = f"{trained.form} of {trained.rows} rows"
    if trained.base_model:
        text += f", trained with {trained.base_model}"
    return NewEntry(id, text, block, source=source, metadata={TRAINED: about}, content_key=f"trained {trained.digest}")


def store(bank: Bank, entry: NewEntry) -> tuple[str, bool]:
    """(reference, whether it was written). The same numbers are not written twice; others become the next version.

    Raises BankError if the id is that of a text.
    """
    if not bank.knows(entry.id):
        return bank.add([entry])[0], True
    here = bank.resolve(entry.id)
    if here.content_hash == entry.content_hash:
        return here.ref, False
    if not is_trained(here):
        raise ArtifactError(f'--id: "{entry.id}" is the text of {here.source or here.ref}; choose another id')
    return bank.update(entry.id, entry), True


def export_peft(bank: Bank, id: str, destination: Path, config: Mapping[str, Any] | None, base: str | None) -> str:
    """Write an entry as a CARTRIDGE adapter; its reference. config: of the model, None if the bank says enough.

    Raises BankError for an entry that is not there, or is not dense in every layer.
    """
    spec = bank.spec
    if spec.kind != "prefix" or len(spec.layers) != spec.fingerprint.num_layers:
        raise ArtifactError(f"{bank.path}: its entries are sparse, or not of every layer; peft reads dense ones alone")
    entry = bank.resolve(id, any_tenant=True)
    block = bank.load(entry.ref)
    dense = torch.arange(block.tokens, dtype=torch.int32).expand(block.positions.shape)
    if not torch.equal(block.positions, dense):
        raise ArtifactError(f'"{entry.ref}" does not keep every token, so peft cannot read it; export another one')
    keys, values = cache_of(block, _bank_ropes(spec.fingerprint, config))
    about = entry.metadata.get(TRAINED)
    about = about if isinstance(about, Mapping) else {}
    frozen = about.get("frozen", 1)
    frozen = frozen if type(frozen) is int and 0 <= frozen <= block.tokens else 1
    write_peft(destination, keys, values, frozen=frozen, base_model=base or about.get("base_model"))
    return entry.ref


def _bank_ropes(model: Fingerprint, config: Mapping[str, Any] | None) -> list[RotaryEmbedding]:
    if config is None:
        config = {
            **{k: v for k, v in model.rope.items() if k == "no_rope_layers"},
            "rope_parameters": {k: v for k, v in model.rope.items() if k != "no_rope_layers"},
            "head_dim": model.head_dim,
            "model_type": INTERLEAVED.get(model.architecture, ""),
        }
        try:
            return model_ropes(config, model.num_layers)
        except ArtifactError as error:
            raise ArtifactError(f"--model: needed, the bank alone does not say how keys turn ({error})") from None
    return model_ropes(config, model.num_layers)
