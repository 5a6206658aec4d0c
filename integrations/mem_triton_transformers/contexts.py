"""Records how far memory has written each context, so that no token is written twice or removed unseen.

A call begins a context unless it brings a cache that holds tokens already. Whether it repeats a text is seen in its
tokens, and whether tokens were taken back in the length of a cache that memory has seen before.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

CACHES = ("past_key_values", "cache")
"""What transformers calls a model's cache, as an argument and in what comes back; the second since 5.21 or so."""


class Contexts:
    """The contexts that a model's memory has written, as far as later calls can be compared with them."""

    def __init__(self) -> None:
        self._begun: Tensor | None = None  # [B, T] the last call's tokens, if it began a context
        self._written: WeakKeyDictionary[Any, int] = WeakKeyDictionary()  # cache -> its length after the last write

    def forget(self) -> None:
        """Begin anew: the next call is compared with nothing."""
        self._begun = None
        self._written.clear()

    def begin(self) -> None:
        """The next call begins a context, whatever the last one was."""
        self._begun = None

    def check(self, tokens: Tensor | None, cache: Any) -> None:
        """Raise ValueError if a call that writes would write tokens again, or behind ones that were taken back.

        tokens: [B, T] ids or [B, T, hidden] embeddings of the call; cache: what it was given, None for nothing.
        """
        past = length_of(cache)
        if past:
            written = self._written.get(cache, 0)
            if past < written:
                raise ValueError(
                    f"the cache was cropped from {written} to {past} tokens, but memory has written all of them: take "
                    "memory back too (get_memory before, set_memory after), or turn writing off with "
                    "set_memory_write(model, False)"
                )
        elif past == 0 and tokens is not None and self._repeats(_ids(tokens)):
            raise ValueError(
                f"this call runs the last one's {self._begun.shape[1]} tokens again, with more behind them and without "
                "a cache; memory would write them twice: pass past_key_values and only the new tokens, call "
                "reset_memory(model) before each call, or turn writing off with set_memory_write(model, False)"
            )

    def commit(self, tokens: Tensor | None, cache: Any, past: int | None) -> None:
        """Note a call that has written. cache: after the call; past: its length before."""
        self._begun = None if past or tokens is None else _ids(tokens).detach().clone()
        if length := length_of(cache):
            self._written[cache] = length

    def _repeats(self, ids: Tensor) -> bool:
        begun = self._begun
        if begun is None or ids.shape[0] != begun.shape[0] or ids.shape[1] <= begun.shape[1]:
            return False
        return ids.dtype == begun.dtype and torch.equal(ids[:, : begun.shape[1]].to(begun.device), begun)


def length_of(cache: Any) -> int | None:
    """Count the tokens that a cache holds, 0 for no cache; None if it has no length."""
    if cache is None:
        return 0
    length = getattr(cache, "get_seq_length", None)
    return None if length is None else int(length())


def cache_argument(model: nn.Module) -> str:
    """Name of the argument that gives a model its cache."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def cache_of(output: Any) -> Any:
    """The cache that comes back from a call; None if none does."""
    fields = output if isinstance(output, Mapping) else {}
    return next((fields[name] for name in CACHES if fields.get(name) is not None), None)


def _ids(tokens: Tensor) -> Tensor:
    return tokens if tokens.dim() == 2 else tokens[..., 0]  # of embeddings one channel tells them apart
