"""Describes an engine to memory systems: the served model's sizes, and how it is split and batched.

Each integration makes one from its engine's configuration, in the front end and in every worker alike, so that nothing
about it has to be sent.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class EngineShape:
    """engine: its name, for messages. model, revision: a folder or a Hugging Face id. hf_config: the text config.

    hidden: width of the hidden state. heads, kv_heads: of the whole model. tp_size: ranks that split heads. pp_spans:
    each pipeline stage's layers, first and end. max_requests: running at once. max_step_tokens: processed in one step.
    max_model_len: tokens of a prompt and its answer. quantization: how the engine quantises weights, None: not at all.
    splits_prompts: the option that keeps prompts whole, where they may go through the model in several steps.
    """

    engine: str
    model: str
    revision: str | None
    hf_config: Mapping[str, Any]
    dtype: torch.dtype
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    tp_size: int
    pp_spans: tuple[tuple[int, int], ...]
    max_requests: int
    max_step_tokens: int
    max_model_len: int
    quantization: str | None = None
    splits_prompts: str | None = None

    @property
    def architecture_fingerprint(self) -> str:
        """sha256 of the model's architecture and sizes: what a session's state must have been made with."""
        kinds = (int, float, str, list)
        sizes = {k: v for k, v in self.hf_config.items() if isinstance(v, kinds) and not k.startswith("_")}
        for unstable in ("transformers_version", "dtype", "torch_dtype", "name_or_path"):
            sizes.pop(unstable, None)
        return hashlib.sha256(json.dumps(sizes, sort_keys=True, default=str).encode()).hexdigest()
