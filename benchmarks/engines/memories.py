"""What is compared: engines with one kind of memory each, and pairs of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.engines import made_up
from benchmarks.engines.made_up import Made, MadeBank

STOCK = "stock"


@dataclass(frozen=True)
class Memory:
    """What one engine has besides its model. section: mem_triton's configuration, None for the stock engine.

    reads: whether requests read of it; pools: a store of MemoryLLM.
    """

    name: str
    section: dict[str, Any] | None = None
    adapter: Path | None = None
    bank: MadeBank | None = None
    pools: Path | None = None
    reads: bool = True


@dataclass(frozen=True)
class Comparison:
    """memory against baseline, by the names of their engines, same command and prompts otherwise.

    more: tokens that the baseline's prompts have more, because they hold as text what the other one has as memory.
    """

    name: str
    memory: str
    baseline: str = STOCK
    more: int = 0


def comparisons(asked: list[str], part: str) -> list[Comparison]:
    """What ``--memory`` means in a part. Raises ValueError for an unknown name."""
    if part == "pool":
        return [Comparison("shared pool", "pool", "pool per request")]
    text = made_up.REFERENCES * made_up.REFERENCE_TOKENS
    known = {
        "delta": Comparison("delta", "delta"),
        "explicit": Comparison("explicit", "explicit"),
        "pool": Comparison("pool", "pool"),
        "memoryllm": Comparison("memoryllm", "memoryllm"),
        "memoryllm-unread": Comparison("memoryllm, unread", "memoryllm unread"),
        "text": Comparison("memory instead of text", "explicit", more=text),
    }
    if unknown := [name for name in asked if name not in known]:
        raise ValueError(f"--memory {unknown[0]}: choose from {', '.join(known)}")
    return [known[name] for name in asked]


def make_memory(name: str, made: Made, folder: Path, pool_tokens: int) -> Memory:
    """The adapter or bank of one engine, under ``folder``."""
    if name == STOCK:
        return Memory(name, reads=False)
    if name == "delta":
        adapter = made_up.make_adapter(made, folder)
        return Memory(name, {"delta": {"adapter": str(adapter)}}, adapter)
    if name.startswith("memoryllm"):
        return _with_pools(name, made, made_up.make_store(made, folder, pool_tokens), pool_tokens)
    if name == "explicit":
        return _with_bank(name, made, made_up.make_references(made, folder))
    return _with_bank(name, made, made_up.make_pool(made, folder, pool_tokens, shared=name == "pool"))


def _with_bank(name: str, made: Made, bank: MadeBank) -> Memory:
    """A server whose requests all read the bank's entries without asking; its pages hold them twice over."""
    gib = max(0.05, 2 * bank.tokens * kv_bytes_per_token(made) / 2**30)
    section = {"bank": str(bank.path), "default": list(bank.refs), "pool_gib": round(gib, 3)}
    return Memory(name, {"memory": section}, bank=bank)


def _with_pools(name: str, made: Made, store: Path, rows: int) -> Memory:
    """A server of MemoryLLM whose requests all read the newest version, or none; three of them have room."""
    reads = name == "memoryllm"
    gib = max(0.05, 3 * (rows + 128) * kv_bytes_per_token(made) / 2**30)
    section = {"pools": str(store), "default": "main" if reads else None, "gib": round(gib, 3)}
    return Memory(name, {"memoryllm": section}, pools=store, reads=reads)


def kv_bytes_per_token(made: Made) -> int:
    """Bytes of one token's keys and values in all layers."""
    c = made.model.config
    size = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    return 2 * c.num_hidden_layers * c.num_key_value_heads * size * made.dtype.itemsize
