"""Holds some tokens' keys and values in some layers: what a bank stores and a pool loads."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class MemoryBlock:
    """Keys before RoPE, values, and the place of each token in its text.

    keys, values: [L, Hkv, T, D] in the layers, KV heads and dtype of its bank; positions: int32 [L, Hkv, T], counted
    from the text's first token, ascending. Memory³ keeps different tokens in each head, so positions differ by head;
    a dense prefix has 0..T-1 everywhere.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor

    @property
    def tokens(self) -> int:
        """Tokens kept per head."""
        return self.keys.shape[2]
