"""Trained keys and values as their files have them, checked against a model, and as a bank's block.

peft and cartridges both train a KV cache: keys after RoPE at 0...p-1, and the text starts at p. A bank keeps keys
before RoPE and places a prefix of p tokens at -p...-1 with the text from 0, which is the same attention, since RoPE is
relative. So an import turns keys back by 0...p-1, and an export turns them there again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mem_triton.ops.reposition import RotaryEmbedding, UnsupportedRopeError, rope_from_config, rotate, unrotate
from mem_triton.store.bank.fingerprint import Fingerprint
from mem_triton.store.block import MemoryBlock
from mem_triton.store.errors import ArtifactError

TRAIN_AGAIN = "import it with the model that it was trained with"


@dataclass(frozen=True)
class TrainedEntry:
    """What a file holds. form: "peft CARTRIDGE", "cartridge", ...; file: for messages.

    keys, values: fp32 [L, Hkv, p, D], keys rotated for 0...p-1; None in a file of input embeddings, fp32 [p, hidden],
    which a model has yet to turn into keys and values. frozen: leading rows that training leaves as they are.
    base_model: what the file calls the model that it was trained with, None if it does not say.
    """

    form: str
    file: str
    keys: Tensor | None
    values: Tensor | None
    embeddings: Tensor | None = None
    frozen: int = 0
    base_model: str | None = None

    @property
    def rows(self) -> int:
        """Tokens that it takes in the context."""
        return len(self.embeddings) if self.keys is None else self.keys.shape[2]

    @property
    def digest(self) -> str:
        """SHA-256 of its numbers: the same artifact is not imported twice."""
        digest = hashlib.sha256()
        for tensor in (self.keys, self.values, self.embeddings):
            if tensor is not None:
                digest.update(f"{list(tensor.shape)}".encode() + tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()


def block_of(trained: TrainedEntry, ropes: Sequence[RotaryEmbedding]) -> MemoryBlock:
    """The block that a bank keeps: keys before RoPE. ropes: of every layer."""
    where = torch.arange(trained.rows)
    keys = torch.stack([unrotate(k, where, rope) for k, rope in zip(trained.keys, ropes, strict=True)])
    positions = torch.arange(trained.rows, dtype=torch.int32).expand(keys.shape[:3]).contiguous()
    return MemoryBlock(keys, trained.values, positions)


def cache_of(block: MemoryBlock, ropes: Sequence[RotaryEmbedding]) -> tuple[Tensor, Tensor]:
    """The reverse of ``block_of``: fp32 keys rotated for 0...p-1, and values, [L, Hkv, p, D] each."""
    where = torch.arange(block.tokens)
    keys = torch.stack([rotate(k.float(), where, rope) for k, rope in zip(block.keys, ropes, strict=True)])
    return keys, block.values.float()


def composed(parts: Sequence[TrainedEntry]) -> TrainedEntry:
    """Artifacts one after the other as one, as peft's ``compose_cartridge_adapters`` has them.

    Every part keeps its own rotation 0...p-1, and the text starts behind the sum of all rows. Read side by side, as
    several entries, each would lie directly before the text instead.
    """
    keys, values = (torch.cat([getattr(part, name) for part in parts], 2) for name in ("keys", "values"))
    form = " + ".join(dict.fromkeys(part.form for part in parts))
    return replace(parts[0], form=f"composed {form}", keys=keys, values=values)


def model_ropes(config: Mapping[str, Any], num_layers: int) -> list[RotaryEmbedding]:
    """RoPE of every layer. Raises ArtifactError naming the field of ``config.json`` for keys that cannot be moved."""
    try:
        return [rope_from_config(config, layer) for layer in range(num_layers)]
    except (UnsupportedRopeError, LookupError, TypeError, ValueError, ArithmeticError) as error:
        raise ArtifactError(f"MODEL: config.json: {error}; its keys and values cannot be imported") from None


def check_attention(config: Mapping[str, Any]) -> None:
    """Raises ArtifactError naming the field that says that not every token of a text would see the rows."""
    text = config.get("text_config") or config

    def refused(field: str, what: str) -> ArtifactError:
        return ArtifactError(
            f"MODEL: config.json: {field}: {what}; trained keys and values are read by models whose layers all attend "
            "to everything before"
        )

    if config.get("is_encoder_decoder"):
        raise refused("is_encoder_decoder", "true, and an encoder's rows are no prefix of a text")
    if text.get("kv_lora_rank"):
        raise refused("kv_lora_rank", f"{text['kv_lora_rank']} (latent attention), and it has no keys of its own")
    if others := sorted({str(kind) for kind in text.get("layer_types") or () if kind != "full_attention"}):
        raise refused("layer_types", f"has {', '.join(others)}")
    if text.get("attention_chunk_size"):
        raise refused("attention_chunk_size", f"{text['attention_chunk_size']}, tokens see their own chunk alone")
    window, longest = text.get("sliding_window"), text.get("max_position_embeddings")
    if window and text.get("use_sliding_window", True) and not (longest and window >= longest):
        raise refused("sliding_window", f"{window}, and the text would lose sight of the rows")


def check_numbers(file: str, name: str, tensor: Tensor) -> Tensor:
    """A tensor as fp32. Raises ArtifactError naming it if it holds NaN, infinity, or no floats."""
    if not tensor.is_floating_point() or tensor.layout != torch.strided:
        raise ArtifactError(f"{file}: {name} is {tensor.dtype}, expected floats; export it again")
    numbers = tensor.detach().float()
    if not bool(numbers.isfinite().all()):
        raise ArtifactError(f"{file}: {name} holds NaN or infinity; train it again, or take an earlier checkpoint")
    return numbers


def check_rows(file: str, rows: int, config: Mapping[str, Any]) -> None:
    """Raises ArtifactError for an artifact that leaves no room in the model's context."""
    longest = (config.get("text_config") or config).get("max_position_embeddings")
    if rows < 1:
        raise ArtifactError(f"{file}: has no rows; there is nothing to read in it")
    if longest and rows >= longest:
        raise ArtifactError(f"{file}: {rows} rows, the model's max_position_embeddings is {longest}; {TRAIN_AGAIN}")


def check_model_shape(file: str, field: str, found: Any, model: Fingerprint, name: str) -> None:
    """Raises ArtifactError if a field differs from the model's. name: of the fingerprint's field."""
    if found != getattr(model, name):
        raise ArtifactError(f"{file}: {field}: {found!r}, the model has {getattr(model, name)}; {TRAIN_AGAIN}")


def same_model(trained_with: str, models: Sequence[str]) -> bool:
    """Whether a name means one of ``models``: the same last part, whatever folder or organisation it lies in."""

    def last(name: str) -> str:
        return name.rstrip("/\\").replace("\\", "/").rpartition("/")[2].casefold()

    return last(trained_with) in {last(name) for name in models if name}
