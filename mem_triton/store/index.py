"""Embedders: texts to unit vectors, for retrieval from a bank. The default needs no model and no network.

Example::

    embedder = embedder_from("lexical")
    embedder.embed(["The locker of Mara Stone is falcon."]).shape         # (1, 512)
"""

from __future__ import annotations

import re
import zlib
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Protocol

import numpy as np


class EmbedderError(ValueError):
    """An embedder that is unknown, not installed, cannot be reached or answers nonsense."""


class Embedder(Protocol):
    """name: what ``embedder_from`` made it of; dim: length of a vector."""

    name: str
    dim: int

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """float32 [len(texts), dim], each row of length 1. Raises EmbedderError."""
        ...


def embedder_from(spec: str) -> Embedder:
    """An embedder by its name.

    "lexical" or "lexical:<dim>": hashed words and character n-grams, offline, the same in every process.
    "sentence-transformers:<model or folder>": any such model, on the CPU.
    "openai:<base url>#<model>": an endpoint that speaks OpenAI's embeddings API; OPENAI_API_KEY is its key.
    Raises EmbedderError naming what is wrong and what to do.
    """
    raise NotImplementedError
