"""The online memory of a model: clear it, freeze it, carry it over, keep it on disk."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Mapping
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor
from transformers import PreTrainedModel

from mem_triton_transformers.attach import ModelMemory, memory_of

FILE_FORMAT = "mem_triton.delta_mem.state.v1"


class MemoryFileError(ValueError):
    """A memory file that does not belong to this model and adapter; the message names what differs."""


def reset_memory(model: PreTrainedModel) -> None:
    """Empty the memory: the next call starts from zero states, with any batch size. Segment ids are dropped too."""
    memory = memory_of(model)
    memory.call.segments = None
    memory.call.contexts.forget()
    for layer in memory.layers.values():
        layer.state = None


def set_memory_write(model: PreTrainedModel, enabled: bool) -> None:
    """Turn writing on or off. Off: tokens read the frozen states, which stay bit for bit as they are."""
    call = memory_of(model).call
    call.write_enabled = bool(enabled)
    call.contexts.begin()
    if not enabled:
        call.segments = None


def set_write_segments(
    model: PreTrainedModel, write_message_ids: Tensor | None, write_sentence_ids: Tensor | None = None
) -> None:
    """Say which tokens of the NEXT call form a message or a sentence; each is then one write of its mean (SSW).

    write_message_ids, write_sentence_ids: int [B, T] of that call, -1 = not written. Sentence ids go with granularity
    "sentence_mean", and count through the whole call. Tokens of the call all read the states from before it; writes
    follow in ascending id order. A call without ids (the default, and every call after the next one, such as the
    decoding steps of generate) writes token by token, and so does a call whose ids are all -1, as in the official code.
    Raises ValueError with an adapter that writes per token, TypeError for ids that are not integers.

    Example::

        set_write_segments(model, torch.zeros_like(batch.input_ids))      # the whole prompt is one message
        model(**batch)
    """
    memory = memory_of(model)
    granularity = memory.config.memory_write_granularity
    if granularity == "token" and (write_message_ids is not None or write_sentence_ids is not None):
        raise ValueError("set_write_segments: this adapter has memory_write_granularity='token', so it takes no ids")
    if granularity == "message_mean" and write_sentence_ids is not None:
        raise ValueError("write_sentence_ids: this adapter has memory_write_granularity='message_mean'")
    if write_message_ids is None:
        if write_sentence_ids is not None:
            raise ValueError("write_sentence_ids needs write_message_ids as well, as in the official code")
        memory.call.segments = None
        return
    segments = {"message": write_message_ids}
    if write_sentence_ids is not None:
        segments["sentence"] = write_sentence_ids
    for name, ids in segments.items():
        if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.is_floating_point() or ids.dtype == torch.bool:
            raise TypeError(f"write_{name}_ids must be an integer tensor [batch, tokens]")
    memory.call.segments = segments


def get_memory(model: PreTrainedModel) -> dict[str, Tensor]:
    """Layer name -> state [B, H, r, r]; layers that were never written are left out. Not copies."""
    return {name: layer.state for name, layer in memory_of(model).layers.items() if layer.state is not None}


def set_memory(model: PreTrainedModel, states: Mapping[str, Tensor]) -> None:
    """Replace the whole memory; layers left out of ``states`` become empty.

    Example, keeping the first of two sequences::

        set_memory(model, {name: state[:1] for name, state in get_memory(model).items()})

    Raises MemoryFileError for unknown layers and wrong shapes.
    """
    memory = memory_of(model)
    _check_states(memory, states)
    for name, layer in memory.layers.items():
        layer.state = states.get(name)
    memory.call.segments = None
    memory.call.contexts.forget()


def save_memory(model: PreTrainedModel, path: str | os.PathLike[str]) -> Path:
    """Write the states to ``path`` (.safetensors), with the adapter's fingerprint and the model's type.

    A path that ends in .pt gets the official ``delta_state.pt`` instead, which names neither.
    Raises ValueError if the memory is empty.
    """
    memory, states, path = memory_of(model), get_memory(model), Path(path)
    if not states:
        raise ValueError("the memory is empty: run the model before save_memory")
    states = {name: state.detach().cpu().contiguous() for name, state in states.items()}
    partial = path.with_name(path.name + ".partial")  # a reader never sees half a file
    if path.suffix == ".pt":  # one head: the official code keeps [B, r, r]
        heads = memory.config.num_state_heads
        torch.save({name: state.squeeze(1) if heads == 1 else state for name, state in states.items()}, partial)
    else:
        shapes = {name: list(state.shape) for name, state in states.items()}
        safetensors.torch.save_file(states, partial, metadata=_identity(model) | {"shapes": json.dumps(shapes)})
    partial.replace(path)
    return path


def load_memory(model: PreTrainedModel, path: str | os.PathLike[str]) -> None:
    """Replace the memory by a file of ``save_memory``, or by an official ``delta_state.pt``.

    Raises MemoryFileError, before anything changes, if the file is of another adapter, model type or shape.
    """
    path = Path(path)
    states = _read_official(path) if path.suffix == ".pt" else _read(path, _identity(model))
    try:
        set_memory(model, states)
    except MemoryFileError as error:
        raise MemoryFileError(f"{path}: {error}") from None


def _identity(model: PreTrainedModel) -> dict[str, str]:
    return {
        "format": FILE_FORMAT,
        "adapter": memory_of(model).adapter().fingerprint,
        "model_type": model.config.model_type,
    }


def _read(path: Path, expected: Mapping[str, str]) -> dict[str, Tensor]:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            found = file.metadata() or {}
            for key, value in expected.items():
                if found.get(key) != value:
                    raise MemoryFileError(f"{path}: {key} is {found.get(key)!r}, but this model needs {value!r}")
            states = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, safe_open is no mapping
    except safetensors.SafetensorError as error:
        raise MemoryFileError(f"{path} is not a safetensors file: {error}") from None
    shapes = {name: list(state.shape) for name, state in states.items()}
    if found.get("shapes") != json.dumps(shapes) and json.loads(found.get("shapes", "null")) != shapes:
        raise MemoryFileError(f"{path}: the tensors' shapes differ from those that its metadata lists")
    return states


def _read_official(path: Path) -> dict[str, Tensor]:
    try:
        data = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise MemoryFileError(f"{path} holds more than tensors, and is not loaded for safety: {error}") from None
    if not isinstance(data, dict) or not all(isinstance(state, Tensor) for state in data.values()):
        raise MemoryFileError(f"{path} must hold a dict of layer name -> state tensor")
    states = {name: state.unsqueeze(1) if state.dim() == 3 else state for name, state in data.items()}
    return {name: state.to(torch.promote_types(state.dtype, torch.float32)) for name, state in states.items()}


def _check_states(memory: ModelMemory, states: Mapping[str, Tensor]) -> None:
    spec = memory.config.spec
    wanted, batches = (spec.heads, spec.rank, spec.rank), set()
    for name, state in states.items():
        if name not in memory.layers:
            raise MemoryFileError(f"state {name} is of no layer with memory: {', '.join(list(memory.layers)[:4])}, ...")
        if state.dim() != 4 or tuple(state.shape[1:]) != wanted:
            raise MemoryFileError(
                f"state {name} has shape {tuple(state.shape)}, expected (batch, {', '.join(map(str, wanted))})"
            )
        batches.add(state.shape[0])
    if len(batches) > 1:
        raise MemoryFileError(f"the states differ in batch size: {sorted(batches)}")
