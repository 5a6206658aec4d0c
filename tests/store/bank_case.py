"""A small bank's specification and blocks whose every number follows from a seed."""

from __future__ import annotations

from typing import Any

import torch

from mem_triton.store.bank import BankSpec, NewEntry
from mem_triton.store.bank.fingerprint import Fingerprint
from mem_triton.store.block import MemoryBlock

LAYERS, HEADS, DIM, TOKENS = (0, 1, 4), 2, 16, 8
MODEL = Fingerprint(
    architecture="Qwen3ForCausalLM",
    num_layers=6,
    hidden_size=64,
    query_heads=4,
    kv_heads=HEADS,
    head_dim=DIM,
    rope={"rope_theta": 10000.0},
    dtype="float32",
    weights="0123456789abcdef",
)


def spec(**changes: Any) -> BankSpec:
    """A memory3 bank in fp32, so that blocks come back bit for bit."""
    usual: dict[str, Any] = {
        "kind": "memory3",
        "fingerprint": MODEL,
        "layers": LAYERS,
        "kv_heads": HEADS,
        "head_dim": DIM,
        "keep_tokens": TOKENS,
        "codec": "fp32",
        "dtype": "float32",
    }
    return BankSpec(**(usual | changes))


def block(seed: int, tokens: int = TOKENS, layers: int = len(LAYERS), dense: bool = False) -> MemoryBlock:
    """Random keys and values; each head's own positions among 128, or 0..T-1."""
    g = torch.Generator().manual_seed(seed)
    shape = (layers, HEADS, tokens)
    if dense:
        positions = torch.arange(tokens, dtype=torch.int32).expand(shape).contiguous()
    else:
        positions = torch.rand(*shape[:2], 128, generator=g).argsort(-1)[..., :tokens].sort(-1).values.int()
    return MemoryBlock(torch.randn(*shape, DIM, generator=g), torch.randn(*shape, DIM, generator=g), positions)


def equal(a: MemoryBlock, b: MemoryBlock) -> bool:
    """Bit for bit."""
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("keys", "values", "positions"))


def entry(id: str, seed: int, text: str | None = None, **fields: Any) -> NewEntry:
    """An entry with a block of its own."""
    return NewEntry(id, text or f"The locker of {id} is number {seed}.", block(seed), **fields)
