"""Explicit memory's configuration section."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from mem_triton.schema import Section
from mem_triton.systems.explicit.request import MOST_REFERENCES


class RetrievalSection(Section):
    """References by the similarity of what is being said: in Memory³'s schedule (arXiv 2407.01178), or, of banks that
    are not sparse, once for the whole request.

    top_k: references for each chunk. every: tokens of a chunk, of the prompt and of the answer alike.
    refresh: fetch anew while generating; False keeps the last prompt chunk's references to the end. Sparse ones alone.
    min_score: references below this cosine similarity are left out.
    """

    top_k: int = Field(default=5, ge=1, le=MOST_REFERENCES)
    every: int = Field(default=64, ge=1, le=4096)
    refresh: bool = True
    min_score: float | None = Field(default=None, ge=-1, le=1)


class MemorySection(Section):
    """Explicit memory: a bank of texts written once as keys and values.

    bank: folder made by ``mem-triton write``. pool_gib: device memory for pages, taken before the KV cache is sized;
        host_gib: host memory that keeps what had to leave the device.
    pool_dtype: "auto" holds pages in the model's dtype; "int8" and "fp8" hold twice or four times as many.
    page_tokens: tokens of a page; None chooses 8 for Memory³'s sparse references and 16 for others.
    temperature: of the attention to entries (T of adaptive parallel encoding, arXiv 2502.05431); None takes the bank's.
    default: ids attached to every request that names none. retrieval: off if absent; requests then name ids.
    capture: whether requests may keep what they say as entries (``mem_capture``): "off"; "own", in a namespace that
        ``mem-triton write`` does not use; "tenant", only those with a tenant, for that tenant alone.
    """

    bank: Path
    pool_gib: float = Field(default=1.0, gt=0)
    host_gib: float = Field(default=1.0, ge=0)
    pool_dtype: Literal["auto", "int8", "fp8"] = "auto"
    page_tokens: int | None = Field(default=None, ge=1, le=256)
    temperature: float | None = Field(default=None, ge=0.1, le=10)
    default: tuple[str, ...] = ()
    retrieval: RetrievalSection | None = None
    capture: Literal["off", "own", "tenant"] = "off"
