"""From the authors' checkpoints to an ordinary Llama beside a store of pools, and back.

The adapter that reads is merged into the served weights in fp32; the one that writes stays beside them as the product
of two thin matrices, added during a write alone.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from mem_triton.ops.reposition.given import GIVEN
from mem_triton.store.bank.fingerprint import model_fingerprint
from mem_triton.store.errors import not_written
from mem_triton.store.files import INDEX, SINGLE, is_occupied, write_durably
from mem_triton.systems.memoryllm.checkpoint import MEMORY, OWN_KEYS, Checkpoint
from mem_triton.systems.memoryllm.mplus import MPLUS_KEYS, MPlusCheckpoint, tensors_back
from mem_triton.systems.memoryllm.pools import WEIGHTS, Pools
from mem_triton.systems.memoryllm.read_adapter import READ, named_factors, write_read_adapter
from mem_triton.systems.memoryllm.records import PoolError, digest_of, tensors_of

Dtype = Literal["auto", "float32", "bfloat16"]
DTYPES: tuple[Dtype, ...] = ("auto", "float32", "bfloat16")
TOKENIZER = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
)
ROPES = ("bf16", "exact")
"""Frequencies of RoPE: rounded as the authors of M+ run it, or as they are."""
ADAPTERS = {"default": "write", "decoder_adapter": READ}
"""Adapters of a checkpoint, by what they are for."""
DROPPED = (*OWN_KEYS, *MPLUS_KEYS, "torch_dtype", "transformers_version", "_name_or_path", "attn_implementation")
MAIN = "main"


def convert(
    source: Path,
    target: Path,
    dtype: Dtype = "auto",
    kind: type[Checkpoint] = Checkpoint,
    rope: str = "exact",
    merged: bool = True,
) -> str | None:
    """Write ``target/model`` and ``target/memory``; the reference of the checkpoint's pool, None if it has no rows.

    dtype: of the model and the rows; "auto" keeps that of the checkpoint's embeddings. kind: ``MPlusCheckpoint`` for
    M+, and rope "bf16" puts the frequencies that its authors run it with into the model's configuration. merged: the
    adapter that reads is part of the model; else it is ``target/read``, which an engine serves as LoRA. Raises
    PoolError for a checkpoint that cannot be read, or a target that is there already.
    """
    if is_occupied(target):
        raise PoolError(f"{target} is there already; choose another folder")
    chosen = dtype if dtype != "auto" else _stored_dtype(source, kind)
    checkpoint = kind(source, chosen)
    mplus = checkpoint if isinstance(checkpoint, MPlusCheckpoint) else None
    frequencies = mplus.frequencies() if mplus is not None and rope == "bf16" else None
    made = not target.exists()
    try:
        target.mkdir(parents=True, exist_ok=True)
        factors = _write_model(checkpoint, target / "model", getattr(torch, chosen), frequencies, merged)
        about = {"model": model_fingerprint(target / "model").model_dump(), "checkpoint": checkpoint.config}
        if not merged:
            about[READ] = write_read_adapter(target / READ, factors, target / "model")
        with Pools.create(target / "memory", checkpoint.shape, about) as pools:
            extra = {name: checkpoint.tensor(name).float() for name in MEMORY[1:3] if name in checkpoint.names}
            extra |= mplus.retriever() if mplus is not None else {}
            tensors = {name: x.contiguous() for name, x in (extra | factors).items()}
            header = {"digest": digest_of(tensors, WEIGHTS)}
            write_durably(target / "memory" / WEIGHTS, lambda temporary: save_file(tensors, temporary, header))
            rows = checkpoint.tensor("memory") if checkpoint.initialized else None
            reference = pools.add(MAIN, rows, long_term=None if mplus is None else mplus.long_term(rows))
    except BaseException as error:
        for part in ("model", "memory", READ):
            shutil.rmtree(target / part, ignore_errors=True)
        if made:
            shutil.rmtree(target, ignore_errors=True)
        if isinstance(error, (OSError, SafetensorError)):
            raise not_written(target, error) from None
        raise
    return reference if checkpoint.initialized else None


def convert_back(source: Path, target: Path, pool: str = MAIN) -> None:
    """Write a checkpoint that the authors' code loads, with the rows of one pool, from what ``convert`` made.

    What is served becomes its base weights; an adapter that reads which was merged adds nothing, and the one that
    writes has the rank of both. Raises PoolError.
    """
    if is_occupied(target):
        raise PoolError(f"{target} is there already; choose another folder")
    with Pools.open(source / "memory") as pools:
        shape, config = pools.shape, dict(pools.about.get("checkpoint") or {})
        infos = {info.name: info for info in pools.list("")}
        empty = pool in infos and infos[pool].version == 0
        state = None if empty else pools.state(pool)
        rows = torch.zeros(shape.layers, shape.rows, shape.hidden) if state is None else state.rows
        extra = load_weights(pools.path)
    try:
        tensors = {
            name: x for path in sorted((source / "model").glob("*.safetensors")) for name, x in _load(path).items()
        }
        kind = tensors["model.embed_tokens.weight"].dtype
        tensors |= {name: x.to(kind) for name, x in extra.items() if name in MEMORY}
        tensors["memory"] = rows.to(kind)
        if state is not None and state.long_term is not None:
            tensors |= tensors_back(state.long_term, extra, config, kind)
        else:
            tensors["initialized"] = torch.tensor(0 if empty else 1, dtype=torch.uint8)
        if config.get("lora_config"):
            rank = _add_adapters(tensors, extra, config, kind)
            config["lora_config"] = {**config["lora_config"], "r": rank, "lora_alpha": rank}
        target.mkdir(parents=True, exist_ok=True)
        for name in TOKENIZER:
            if (source / "model" / name).exists():
                shutil.copyfile(source / "model" / name, target / name)
        config["torch_dtype"] = str(kind).removeprefix("torch.")
        whole = {name: x.clone(memory_format=torch.contiguous_format) for name, x in tensors.items()}
        write_durably(target / SINGLE, lambda temporary: save_file(whole, temporary, metadata={"format": "pt"}))
        text = json.dumps(config, indent=1) + "\n"
        write_durably(target / "config.json", lambda temporary: temporary.write_text(text))
    except (OSError, SafetensorError) as error:
        raise not_written(target, error) from None


def load_weights(store: Path) -> dict[str, Tensor]:
    """What lies beside a store's pools: embeddings, and factors of the adapter that writes. Raises PoolError."""
    path = store / WEIGHTS
    try:
        tensors, header = tensors_of(path)
    except (OSError, SafetensorError) as error:
        raise PoolError(f"{path}: {error}; convert the checkpoint again") from None
    if header.get("digest") not in (None, digest_of(tensors, WEIGHTS)):
        raise PoolError(f"{path}: has changed since it was written; convert the checkpoint again")
    return tensors


def _load(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise PoolError(f"{path}: {error}; convert the checkpoint again") from None


def _stored_dtype(source: Path, kind: type[Checkpoint]) -> str:
    name = str(kind(source, "float32").dtype_of("model.embed_tokens.weight")).removeprefix("torch.")
    if name not in DTYPES:
        raise PoolError(f"{source}: its tensors are {name}; choose --dtype float32 or bfloat16")
    return name


def _write_model(
    checkpoint: Checkpoint, folder: Path, dtype: torch.dtype, frequencies: list[float] | None, merged: bool
) -> dict[str, Tensor]:
    """The served Llama, in as many files as the checkpoint; the factors that are beside it, by use and linear."""
    folder.mkdir()
    files: dict[str, dict[str, str]] = {}
    for name, here in checkpoint.model_tensors():
        files.setdefault(checkpoint.files[checkpoint.names[here]], {})[name] = here
    beside: dict[str, Tensor] = {}
    for i, names in enumerate(files.values()):
        tensors = {}
        for name, here in names.items():
            tensor, adapter = checkpoint.tensor(here), checkpoint.adapter(name)
            if adapter is not None and merged:
                down, up = adapter.read
                tensor = tensor.float() + up @ down
                beside |= named_factors(name, {"write": adapter.beside_merged})
            elif adapter is not None:
                beside |= named_factors(name, {READ: adapter.read, "write": adapter.write or adapter.read})
            elif not merged and (joined := checkpoint.adapter_beside(name)) is not None:
                down = torch.zeros_like(joined.read[0])
                beside |= named_factors(name, {READ: (down, torch.zeros(len(tensor), len(down)))})
            tensors[name] = (tensor.to(dtype) if tensor.is_floating_point() else tensor).contiguous()
        path = folder / (SINGLE if len(files) == 1 else f"model-{i + 1:05d}-of-{len(files):05d}.safetensors")
        write_durably(path, lambda temporary, held=tensors: save_file(held, temporary, metadata={"format": "pt"}))
    if len(files) > 1:
        _write_index(folder)
    config = {key: value for key, value in checkpoint.config.items() if key not in DROPPED}
    config |= {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": str(dtype).removeprefix("torch.")}
    if frequencies is not None:
        config[GIVEN] = frequencies
    config["tie_word_embeddings"] = "lm_head.weight" not in checkpoint.names
    write_durably(folder / "config.json", lambda temporary: temporary.write_text(json.dumps(config, indent=1) + "\n"))
    _copy_tokenizer(checkpoint.folder, folder)
    return beside


def _write_index(folder: Path) -> None:
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found |= dict.fromkeys(file.keys(), path.name)
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    text = json.dumps({"metadata": {"total_size": size}, "weight_map": found}, indent=1) + "\n"
    write_durably(folder / INDEX, lambda temporary: temporary.write_text(text))


def _copy_tokenizer(source: Path, target: Path) -> None:
    """With a tokenizer that puts no BOS before a text, where the pool's own stands."""
    for name in TOKENIZER:
        if not (source / name).exists():
            continue
        shutil.copyfile(source / name, target / name)
        if name not in ("tokenizer.json", "tokenizer_config.json"):
            continue
        data: dict[str, Any] = json.loads((target / name).read_text(encoding="utf-8"))
        if name == "tokenizer_config.json":
            data["add_bos_token"] = False
        else:
            data["post_processor"] = _without_templates(data.get("post_processor"))
        (target / name).write_text(json.dumps(data, ensure_ascii=False, indent=1), encoding="utf-8")


def _without_templates(processor: Any) -> Any:
    """A tokenizer's post-processing less what puts special tokens around a text."""
    if not isinstance(processor, Mapping) or processor.get("type") == "TemplateProcessing":
        return None
    if processor.get("type") == "Sequence":
        kept = [part for part in map(_without_templates, processor.get("processors") or []) if part is not None]
        return {**processor, "processors": kept} if kept else None
    return dict(processor)


def _add_adapters(tensors: dict[str, Tensor], extra: Mapping[str, Tensor], config: Mapping[str, Any], kind: Any) -> int:
    """Name the weights of linears with adapters as peft does, and put the adapters beside them; their rank."""
    targets = tuple(f".{name}.weight" for name in config["lora_config"].get("target_modules") or ())
    rank = max([len(x) for name, x in extra.items() if name.endswith(".down")] or [int(config["lora_config"]["r"])])
    for name in [name for name in tensors if name.endswith(targets) and ".layers." in name]:
        stem, weight = name.removesuffix(".weight"), tensors.pop(name)
        tensors[f"{stem}.base_layer.weight"] = weight
        nothing = torch.zeros(rank, weight.shape[1]), torch.zeros(weight.shape[0], rank)
        for adapter, use in ADAPTERS.items() if config.get("add_decoder_lora") else (("default", "write"),):
            a, b = (extra.get(f"{use}.{stem}.{part}", x) for part, x in zip(("down", "up"), nothing, strict=True))
            tensors |= {f"{stem}.lora_A.{adapter}.weight": a.to(kind), f"{stem}.lora_B.{adapter}.weight": b.to(kind)}
    return rank


def describe(pools: Pools) -> dict[str, Any]:
    """What a store holds, and how much room a version takes on a device; of M+ also the rows that a request chooses."""
    shape, model = pools.shape, pools.about.get("model") or {}
    size = shape.torch_dtype.itemsize
    row = 2 * shape.layers * model.get("kv_heads", 0) * model.get("head_dim", 0) * size
    told = {
        **asdict(shape),
        "hidden_bytes": shape.layers * shape.rows * shape.hidden * size,
        "keys_and_values_bytes": (shape.rows + shape.bos) * row,
        "model": model.get("weights"),
        "read_adapter": pools.about.get(READ),
    }
    return told if shape.long_term is None else told | {"chosen_bytes": shape.long_term.read * row}
