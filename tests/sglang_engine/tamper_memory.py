"""Negative controls of explicit memory: each switches one safety mechanism off, in every process of an engine."""

from __future__ import annotations

from typing import Any


def captures_of_the_next_row() -> None:
    """A prompt is kept from where another request's tokens would lie."""
    from mem_triton_sglang.context import ContextReader

    stock = ContextReader.__call__

    def read(self: Any, request_id: str, layer: int, tokens: int) -> Any:
        own = self.rows[request_id]
        self.rows[request_id] = own - 1
        try:
            return stock(self, request_id, layer, tokens)
        finally:
            self.rows[request_id] = own

    ContextReader.__call__ = read
