"""Adapters of peft that learn a prompt: a folder with ``adapter_config.json`` and ``adapter_model.safetensors``.

PREFIX_TUNING and CARTRIDGE hold keys and values, ``prompt_embeddings`` [p, 2 * L * Hkv * D], viewed as
[p, 2L, Hkv, D] with keys in even and values in odd places
(https://huggingface.co/docs/peft/package_reference/cartridges). PROMPT_TUNING and P_TUNING hold input embeddings
[p, hidden]. What a projection or an encoder has computed is folded into them when peft saves.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mem_triton.store.bank.fingerprint import Fingerprint
from mem_triton.store.bank.formats.pickled import load_pickled
from mem_triton.store.bank.formats.trained import TRAIN_AGAIN, TrainedEntry, check_model_shape, check_numbers
from mem_triton.store.errors import ArtifactError, not_written
from mem_triton.store.files import is_occupied, read_object, write_durably

CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
TENSOR = "prompt_embeddings"
KEYS_AND_VALUES = ("PREFIX_TUNING", "CARTRIDGE")
EMBEDDINGS = ("PROMPT_TUNING", "P_TUNING")


def read_peft(folder: Path, model: Fingerprint) -> TrainedEntry:
    """An adapter for ``model``. Raises ArtifactError naming the file and the field that does not fit."""
    config = read_object(folder / CONFIG, "give a folder as peft saves it", ArtifactError)
    kind = config.get("peft_type")
    where = str(folder / CONFIG)
    if kind not in (*KEYS_AND_VALUES, *EMBEDDINGS):
        raise ArtifactError(
            f"{where}: peft_type: {_short(kind)} holds no keys and values, expected "
            f"{', '.join((*KEYS_AND_VALUES, *EMBEDDINGS))}; adapters of weights are the engine's own (LoRA)"
        )
    task, modules = config.get("task_type"), config.get("num_transformer_submodules")
    if task not in (None, "CAUSAL_LM"):
        raise ArtifactError(
            f"{where}: task_type: {_short(task)}, expected CAUSAL_LM; others have an encoder or a head that no "
            "decoder serves"
        )
    if modules not in (None, 1):
        raise ArtifactError(
            f"{where}: num_transformer_submodules: {_short(modules)}, expected 1; encoder-decoder adapters have two, "
            "and no decoder serves them"
        )
    rows = config.get("num_virtual_tokens")
    if type(rows) is not int or rows < 1:
        raise ArtifactError(f"{where}: num_virtual_tokens: {_short(rows)}, expected a whole number above 0; repair it")
    frozen = config.get("num_frozen_tokens") or 0
    if type(frozen) is not int or not 0 <= frozen <= rows:
        raise ArtifactError(f"{where}: num_frozen_tokens: {_short(frozen)}, expected 0 to {rows}; repair it")
    check_model_shape(where, "num_layers", config.get("num_layers"), model, "num_layers")
    base = config.get("base_model_name_or_path")
    base = base if isinstance(base, str) and base else None
    if kind in EMBEDDINGS:
        check_model_shape(where, "token_dim", config.get("token_dim"), model, "hidden_size")
        embeddings = _tensor(folder, (rows, model.hidden_size))
        return TrainedEntry(f"peft {kind}", str(folder), None, None, embeddings, base_model=base)
    heads, width = config.get("num_attention_heads"), config.get("token_dim")
    check_model_shape(where, "num_attention_heads (KV heads)", heads, model, "kv_heads")
    if type(width) is not int or width != heads * model.head_dim:
        raise ArtifactError(
            f"{where}: token_dim: {_short(width)}, the model has {heads} KV heads of {model.head_dim}; {TRAIN_AGAIN}"
        )
    flat = _tensor(folder, (rows, 2 * model.num_layers * width))
    halves = flat.view(rows, model.num_layers, 2, heads, model.head_dim).permute(2, 1, 3, 0, 4)  # [2, L, Hkv, p, D]
    return TrainedEntry(f"peft {kind}", str(folder), *(x.contiguous() for x in halves), frozen=frozen, base_model=base)


def write_peft(folder: Path, keys: Tensor, values: Tensor, *, frozen: int, base_model: str | None) -> None:
    """A CARTRIDGE adapter. keys, values: [L, Hkv, p, D], keys rotated for 0...p-1; frozen: of its rows.

    folder: made, and must not be there or be empty. Raises ArtifactError, and BankError for a disk that does not take
    it.
    """
    layers, heads, rows, dim = keys.shape
    config = {
        "peft_type": "CARTRIDGE",
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "revision": None,
        "base_model_name_or_path": base_model,
        "num_virtual_tokens": rows,
        "num_frozen_tokens": frozen,
        "num_layers": layers,
        "num_attention_heads": heads,
        "token_dim": heads * dim,
        "num_transformer_submodules": 1,
    }
    flat = torch.stack((keys, values)).permute(3, 1, 0, 2, 4).reshape(rows, -1).float().contiguous()
    if is_occupied(folder):
        raise ArtifactError(f"{folder} is there already; choose another destination")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        header = {"format": "pt"}
        write_durably(folder / WEIGHTS, lambda temporary: save_file({TENSOR: flat}, temporary, metadata=header))
        text = json.dumps(config, indent=2) + "\n"
        write_durably(folder / CONFIG, lambda temporary: temporary.write_text(text))  # last: now it is an adapter
    except (OSError, SafetensorError) as error:
        raise not_written(folder, error) from None


def _tensor(folder: Path, shape: tuple[int, int]) -> Tensor:
    """The one tensor of an adapter, fp32 of this shape."""
    file = folder / WEIGHTS
    if not file.exists() and (folder / PICKLED).exists():
        file = folder / PICKLED
        tensors = load_pickled(file)
        _check_names(file, tensors)
        tensor = tensors[TENSOR]
        found = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
    else:
        try:
            with safe_open(file, framework="pt") as opened:
                _check_names(file, list(opened.keys()))
                found = tuple(opened.get_slice(TENSOR).get_shape())
                tensor = opened.get_tensor(TENSOR) if found == shape else None
        except (OSError, SafetensorError, ValueError) as error:
            if isinstance(error, ArtifactError):
                raise
            raise ArtifactError(f"{file}: {error}; it is missing or cut off: fetch it again") from None
    if found != shape:
        raise ArtifactError(
            f"{file}: {TENSOR} is {_short(found)}, {CONFIG} and the model say {list(shape)}; fetch both files again"
        )
    return check_numbers(str(file), TENSOR, tensor)


def _check_names(file: Path, names: Any) -> None:
    if TENSOR not in names:
        raise ArtifactError(f"{file}: has no tensor {TENSOR}; give a folder as peft saves it")
    if others := sorted(str(name) for name in names if name != TENSOR):
        raise ArtifactError(
            f"{file}: holds {_short(others[0])}, too (modules_to_save), which would be lost; train without it"
        )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "…"
