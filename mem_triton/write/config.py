"""How a bank is written: what is encoded, in which layers, and how much of it is kept."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from mem_triton.write.encoder import Tokenizer

PREFIX_TEXT = "<s>Reference:"
"""The paper's constant prefix of every reference; it serves as attention sink when they are read."""


PARALLEL: Mapping[str, Any] = MappingProxyType(
    {"layers": "all", "keep_tokens": None, "reference_tokens": 512, "overlap_tokens": 64, "prefix_text": None}
)
"""What goes with kind "parallel" if nothing else is said; its head depends on the model."""


class WriteConfig(BaseModel):
    """The choices of the write path (Memory³, arXiv 2407.01178, section 3.2); the defaults are the paper's.

    kind: "memory3" cuts texts into references and keeps a few tokens of each; "prefix" keeps whole texts in all layers;
    "parallel" cuts them and keeps all tokens in all layers, for models that were not trained with references (its other
    choices are ``PARALLEL``). layers: "first_half", "all", or a list. keep_tokens: tokens kept a KV head, None for all.
    reference_tokens: longest reference. selection: how tokens are chosen, see ``ops.memory_selection``.
    prefix_text: constant text before every reference, stored once for all layers; None for the tokenizer's BOS token
    alone, which is not stored. context: "reference" encodes each reference alone; "document" encodes whole documents,
    in windows of ``window_tokens`` that overlap by half, and then cuts their keys and values, so that a reference knows
    what came before it (the paper's remark 3). overlap_tokens: of what came before, that a parallel reference repeats.
    temperature: of the attention to entries (arXiv 2502.05431, section 3).

    Example::

        WriteConfig(layers=[8, 9, 10], keep_tokens=None).layer_indices(num_layers=36)
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["memory3", "prefix", "parallel"] = "memory3"
    layers: Literal["first_half", "all"] | tuple[int, ...] = "first_half"
    keep_tokens: int | None = Field(default=8, ge=1)
    reference_tokens: int = Field(default=128, ge=1, le=65536)
    selection: Literal["softmax", "exp_sum"] = "softmax"
    prefix_text: str | None = PREFIX_TEXT
    context: Literal["reference", "document"] = "reference"
    window_tokens: int = Field(default=4096, ge=16)
    overlap_tokens: int = Field(default=0, ge=0)
    temperature: float = Field(default=1.0, ge=0.1, le=10)

    @model_validator(mode="after")
    def _check(self) -> WriteConfig:
        if isinstance(self.layers, tuple) and (not self.layers or sorted(set(self.layers)) != list(self.layers)):
            raise ValueError(f"layers must ascend and not be empty, got {list(self.layers)}")
        if self.keep_tokens is not None and self.keep_tokens > self.reference_tokens:
            raise ValueError(f"keep_tokens={self.keep_tokens} exceeds reference_tokens={self.reference_tokens}")
        if self.kind == "prefix" and self.context == "document":
            raise ValueError('context="document" is for references; a prefix is its whole document')
        if self.kind == "parallel":
            if self.keep_tokens is not None or self.context == "document":
                raise ValueError('kind "parallel" keeps all tokens of references that are encoded alone; see "memory3"')
        elif self.overlap_tokens:
            raise ValueError('overlap_tokens is for kind "parallel"')
        if self.kind == "parallel" and 2 * self.overlap_tokens > self.reference_tokens:
            raise ValueError(f"overlap_tokens={self.overlap_tokens} is more than half of {self.reference_tokens}")
        return self

    def layer_indices(self, num_layers: int) -> tuple[int, ...]:
        """Return the layers that are stored, of a model of so many. Raises ValueError for one that it does not have."""
        if self.kind in ("prefix", "parallel") or self.layers == "all":
            return tuple(range(num_layers))
        if self.layers == "first_half":
            return tuple(range(max(1, num_layers // 2)))
        if not 0 <= self.layers[0] <= self.layers[-1] < num_layers:
            raise ValueError(f"layers: the model has 0..{num_layers - 1}, got {list(self.layers)}")
        return self.layers


def prefix_ids(tokenizer: Tokenizer, prefix_text: str | None) -> list[int]:
    """Token ids before every reference. "<s>" at the start means the tokenizer's BOS token, nothing if it has none."""
    bos = getattr(tokenizer, "bos_token_id", None)
    if prefix_text is None:
        return [] if bos is None or bos not in tokenizer.encode("") else [bos]
    text = prefix_text.removeprefix("<s>")
    start = [bos] if bos is not None and text != prefix_text else []
    return start + (tokenizer.encode(text, add_special_tokens=False) if text else [])
