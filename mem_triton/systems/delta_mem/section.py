"""δ-mem's configuration section."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from mem_triton.schema import Section

Scope = Literal["all", "sessions"]
"""Which requests δ-mem is for: all, or those that name a session."""


class DeltaSection(Section):
    """δ-mem, the online state.

    adapter: folder or Hugging Face id with ``delta_mem_config.json`` and the adapter's tensors.
    revision: branch, tag or commit of a Hugging Face id.
    tokens_per_state: KV-cache tokens that share one stored state; None chooses 16, or 1 under speculative decoding.
    scope: whose answers the adapter corrects: "all", or "sessions", those of requests that name a session; None: what
        the adapter was trained for, as its ``mem_triton.json`` says. A request overrides it with ``mem_read``.
    """

    adapter: str = Field(min_length=1)
    revision: str | None = None
    tokens_per_state: int | None = Field(default=None, ge=1, le=1024)
    scope: Scope | None = None
