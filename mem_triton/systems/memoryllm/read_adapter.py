"""The adapter that reads, beside an unmerged model: a folder of peft, which engines serve as LoRA."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from mem_triton.store.files import write_durably
from mem_triton.systems.lora import Adapter, files_digest
from mem_triton.systems.memoryllm.records import PoolError

READ = "read"
"""The folder beside ``model`` and ``memory``, its digest in what a store says of itself, and its factors' prefix."""


def named_factors(weight: str, factors: Mapping[str, tuple[Tensor, Tensor] | None]) -> dict[str, Tensor]:
    """A linear's factors as they lie beside a store's pools: "write.model.layers.3.mlp.up_proj.down"."""
    stem = weight.removesuffix(".weight")
    parts = {use: dict(zip(("down", "up"), pair, strict=True)) for use, pair in factors.items() if pair is not None}
    return {f"{use}.{stem}.{part}": x for use, pair in parts.items() for part, x in pair.items()}


def factors_of(extra: Mapping[str, Tensor], use: str) -> dict[str, tuple[Tensor, Tensor]]:
    """The factors of one use by their linear, out of what lies beside a store's pools."""
    stems = {name.removeprefix(f"{use}.").rpartition(".")[0] for name in extra if name.startswith(f"{use}.")}
    return {stem: (extra[f"{use}.{stem}.down"], extra[f"{use}.{stem}.up"]) for stem in sorted(stems)}


def write_read_adapter(folder: Path, beside: Mapping[str, Tensor], model: Path) -> str:
    """Write the adapter that reads as peft saves one; the digest of its files. Raises PoolError if there is none."""
    found = factors_of(beside, READ)
    if not found:
        raise PoolError("--unmerged: the checkpoint has no adapter that reads; convert it without")
    folder.mkdir()
    tensors = {
        f"base_model.model.{stem}.lora_{part}.weight": x.contiguous()
        for stem, pair in found.items()
        for part, x in zip("AB", pair, strict=True)
    }
    rank = max(len(down) for down, _ in found.values())
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(model),
        "r": rank,
        "lora_alpha": rank,  # the scale is in the factors
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
        "target_modules": sorted({stem.rpartition(".")[2] for stem in found}),
    }
    write_durably(
        folder / "adapter_model.safetensors", lambda temporary: save_file(tensors, temporary, {"format": "pt"})
    )
    text = json.dumps(config, indent=1) + "\n"
    write_durably(folder / "adapter_config.json", lambda temporary: temporary.write_text(text) and None)
    return files_digest(str(folder))


def unfit_adapter(wanted: str | None, lora: Adapter | None) -> str | None:
    """Why a request with this LoRA adapter cannot read a pool, None if it can.

    wanted: digest of the adapter that reads, None if it is merged into the served model.
    """
    if wanted is None:
        if not lora:
            return None
        return "a LoRA adapter computes other keys and values than those that the pool's rows were made to"
    if lora and lora.identity.rpartition(":")[2] == wanted:
        return None
    return (
        f"the pools were converted with --unmerged, and the LoRA adapter in the folder `{READ}` beside them (digest "
        f"{wanted}) alone reads them; name it in the request"
    )
