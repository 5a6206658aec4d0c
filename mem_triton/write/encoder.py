"""What the write path needs of a model, whatever runs it: queries and keys before RoPE, and values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class EncodedText:
    """One text's attention inputs, in the layers asked for and the model's dtype.

    queries: [L, T, Hq, D]; keys, values: [L, Hkv, T, D]. Queries and keys are those after q/k-norm and before RoPE.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor

    @property
    def tokens(self) -> int:
        """Tokens of the text."""
        return self.keys.shape[2]

    def slice(self, first: int, end: int) -> EncodedText:
        """Tokens [first, end) alone."""
        return EncodedText(self.queries[:, first:end], self.keys[:, :, first:end], self.values[:, :, first:end])


class Encoder(Protocol):
    """A model that encodes texts, each alone: ``mem_triton_transformers.TransformersEncoder`` is one.

    num_layers: layers of the model. scale: factor of its logits, D**-0.5 as a rule. max_tokens: longest text with its
    prefix, None if there is no limit.
    """

    num_layers: int
    scale: float
    max_tokens: int | None

    def encode(
        self,
        token_ids: Sequence[Sequence[int]],
        *,
        layers: Sequence[int] | None = None,
        prefix_ids: Sequence[int] | None = None,
        batch_size: int = 1,
    ) -> list[EncodedText]:
        """Encode each text after ``prefix_ids``, by an ordinary causal forward; the prefix is not in the result."""
        ...


class Tokenizer(Protocol):
    """The part of a tokenizer that is used; those of transformers have it."""

    bos_token_id: int | None
    all_special_ids: list[int]

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text."""
        ...

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of token ids."""
        ...
