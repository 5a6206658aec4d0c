"""Reads a running request's own keys and values, for prompts that are kept."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class ContextReader:
    """Reads a request's context out of SGLang's pools. rows: request id -> row of ``req_to_token``, kept by the worker.

    runner: its pools are there only later, when the KV cache has been made.
    """

    def __init__(self, runner: Any) -> None:
        self.runner = runner
        self.rows: dict[str, int] = {}

    def __call__(self, request_id: str, layer: int, tokens: int) -> tuple[Tensor, Tensor]:
        """Keys with their rotation and values of the first ``tokens`` tokens, copied: [Hkv, tokens, D]."""
        runner = self.runner
        slots = runner.req_to_token_pool.req_to_token[self.rows[request_id], :tokens].to(torch.int64)
        pool = runner.token_to_kv_pool
        keys, values = pool.get_key_buffer(layer)[slots], pool.get_value_buffer(layer)[slots]  # [tokens, Hkv, D]
        return keys.transpose(0, 1), values.transpose(0, 1)
