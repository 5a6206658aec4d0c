"""Describes a layer to ``attention_inputs``."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class HeadInputs:
    """What happens to the heads of a layer's fused projection, whose columns are q | k | v, before attention.

    heads, kv_heads, head_dim: of this rank. delta: [rows, H*r] in fp32 or the model's dtype, what a read adds to a
    column; only the rows of the parts in ``corrects`` (letters of "qkv", in this order), one below the other.
    q_norm, k_norm: RMS norm weights [head_dim], None = no norm; eps: theirs. cos_sin: [positions, R], R/2 cosines and
    R/2 sines of a position, None = no rotation; interleaved: pairs are neighbours (GPT-J), else R/2 apart (NeoX).
    """

    heads: int
    kv_heads: int
    head_dim: int
    corrects: str = ""
    delta: Tensor | None = None
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    eps: float = 1e-6
    cos_sin: Tensor | None = None
    interleaved: bool = False

    @property
    def width(self) -> int:
        """Columns of q | k | v."""
        return (self.heads + 2 * self.kv_heads) * self.head_dim

    @property
    def rotated(self) -> int:
        """R: channels of a head that are rotated."""
        return 0 if self.cos_sin is None else self.cos_sin.shape[1]

    def part(self, letter: str) -> tuple[int, int]:
        """First head and number of heads of q, k or v."""
        first = {"q": 0, "k": self.heads, "v": self.heads + self.kv_heads}[letter]
        return first, self.heads if letter == "q" else self.kv_heads

    def touched(self) -> tuple[int, int]:
        """First head and number of heads between which all lie that anything happens to; (0, 0) if nothing does."""
        letters = set(self.corrects) | set("qk" if self.cos_sin is not None else "")
        letters |= {letter for letter, norm in (("q", self.q_norm), ("k", self.k_norm)) if norm is not None}
        spans = [self.part(letter) for letter in sorted(letters)]
        if not spans:
            return 0, 0
        first = min(begin for begin, _ in spans)
        return first, max(begin + count for begin, count in spans) - first
