"""Banks of random keys and values: what they cost to read is that of real ones, what they say is nothing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from mem_triton.store.bank import Bank, BankSpec, NewEntry
from mem_triton.store.bank.fingerprint import model_fingerprint
from mem_triton.store.block import MemoryBlock
from mem_triton.store.pool.pages import PageLayout
from mem_triton.write import WriteConfig, bank_spec

PAGE = 16
"""Tokens of a memory page."""


def random_bank(path: Path, model: Path, texts: Mapping[str, str], tokens: int) -> BankSpec:
    """Make a bank of kind "prefix" for the model of a folder. texts: by id, what each entry is found by; tokens: of
    each."""
    spec = bank_spec(WriteConfig(kind="prefix"), model_fingerprint(model))
    generator = torch.Generator().manual_seed(0)
    shape = len(spec.layers), spec.kv_heads, tokens
    positions = torch.arange(tokens, dtype=torch.int32).expand(*shape[:2], -1)
    with Bank.create(path, spec) as bank:
        for id, text in texts.items():
            keys, values = 0.1 * torch.randn(2, *shape, spec.head_dim, generator=generator).to(spec.torch_dtype)
            bank.add([NewEntry(id, text, MemoryBlock(keys, values, positions))])
    return spec


def pool_bytes(spec: BankSpec, tokens: int, dtype: torch.dtype) -> int:
    """Bytes that an entry takes in a pool of ``dtype``."""
    layout = PageLayout(len(spec.layers), spec.kv_heads, spec.head_dim, PAGE, dtype)
    return -(-tokens // PAGE) * layout.page_bytes
