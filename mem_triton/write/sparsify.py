"""From a text's queries, keys and values to the block that a bank stores."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mem_triton.ops.memory_selection import select_tokens
from mem_triton.store.block import MemoryBlock
from mem_triton.write.encoder import EncodedText


def dense(text: EncodedText) -> MemoryBlock:
    """Keep every token of the text, in every head."""
    positions = torch.arange(text.tokens, dtype=torch.int32).expand(*text.keys.shape[:3]).contiguous()
    return MemoryBlock(text.keys.cpu(), text.values.cpu(), positions)


def sparsify(
    text: EncodedText,
    keep: int | None,
    *,
    scale: float,
    selection: str = "softmax",
    valid: Sequence[bool] | None = None,
) -> MemoryBlock:
    """Keep the ``keep`` tokens of each layer and KV head that the text attends to most, in order (Memory³, 3.2).

    keep: None for all tokens. scale: factor of the model's logits. valid: a flag a token; False is never chosen.
    A text with fewer valid tokens gives a block of those. Raises ValueError if none is valid.
    """
    usable = torch.ones(text.tokens, dtype=torch.bool) if valid is None else torch.tensor(valid, dtype=torch.bool)
    if usable.shape != (text.tokens,):
        raise ValueError(f"valid has {len(usable)} flags for {text.tokens} tokens")
    if not usable.any():
        raise ValueError("a text of special tokens alone has nothing to keep")
    if keep is None and usable.all():
        return dense(text)
    if keep is None:
        chosen = usable.nonzero().flatten().expand(*text.keys.shape[:2], -1)
    else:
        chosen = _selected(text, keep, scale, selection, usable)
    index = chosen.to(text.keys.device)[..., None].expand(*chosen.shape, text.keys.shape[3])  # [L, Hkv, keep, D]
    keys, values = (x.gather(2, index).cpu() for x in (text.keys, text.values))
    return MemoryBlock(keys, values, chosen.to("cpu", torch.int32).contiguous())


def _selected(text: EncodedText, keep: int, scale: float, selection: str, usable: torch.Tensor) -> torch.Tensor:
    """Token indices [L, Hkv, min(keep, usable tokens)]: the layers are the selection's batch."""
    keys = text.keys.transpose(1, 2)  # [L, T, Hkv, D]
    flags = usable.to(keys.device).expand(keys.shape[:2])
    indices, _ = select_tokens(text.queries, keys, keep=keep, valid=flags, mode=selection, scale=scale)
    return indices[..., : min(keep, int(usable.sum()))].long()
