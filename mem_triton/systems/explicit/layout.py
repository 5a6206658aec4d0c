"""Computes what the front end and every worker must see alike: the bank, the pool's size, its tables' shape.

Both compute it from the engine's shape, so that nothing about it has to be sent.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from safetensors import safe_open

from mem_triton.schema import ConfigError
from mem_triton.store.bank import Bank, BankError, BankSpec
from mem_triton.store.bank.fingerprint import model_fingerprint, model_folder
from mem_triton.store.block import MemoryBlock
from mem_triton.store.pool.pages import GIB, PageLayout
from mem_triton.systems.engine import EngineShape
from mem_triton.systems.explicit.request import MOST_REFERENCES
from mem_triton.systems.explicit.section import MemorySection
from mem_triton.systems.served_model import check_served

MOST_PAGES = 4096
"""Pages that one request may see in one step when it names ids; tables take 16 bytes for each, for every request."""


@dataclass(frozen=True)
class Layout:
    """num_pages: pages of the pool on each device. max_pages: pages that one request may see in one step.

    kv_heads: on this device; layers: memory layers of the whole model, in order. page_bytes: of one page on a device.
    temperature: of the attention to entries.
    """

    num_pages: int
    page_tokens: int
    page_bytes: int
    max_pages: int
    layers: tuple[int, ...]
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    temperature: float = 1.0

    def cache_key(self, bank: Bank) -> str:
        """What, besides references, the KV of a request with memory depends on: the bank, and how it is read."""
        parts = (bank.identity, str(self.dtype), str(self.temperature))
        return hashlib.sha256("|".join(parts).encode()).hexdigest()[:16]


def open_bank(shape: EngineShape, section: MemorySection) -> Bank:
    """The configured bank, checked against the served model. Raises ConfigError naming the differing field.

    A bank of another dtype than the engine's is read and written with a warning: numbers are rounded once on their way.
    """
    try:
        bank = Bank.open(section.bank)
    except (OSError, BankError) as error:
        raise ConfigError(f"mem_triton.memory.bank: {error}") from None
    folder = model_folder(shape.model, shape.revision)
    try:
        bank.check_model(model_fingerprint(folder))
    except BankError as error:
        raise ConfigError(f"mem_triton.memory.bank: {error}") from None
    check_served(shape, folder, bank.path)
    if bank.spec.torch_dtype != shape.dtype:
        engine = str(shape.dtype).removeprefix("torch.")
        logging.getLogger(f"{shape.engine.lower()}.mem_triton").warning(
            "mem_triton.memory.bank: %s holds %s, the engine computes in %s: what is read and captured is converted, "
            "so answers differ by rounding from those of a server that was started with --dtype %s",
            bank.path,
            bank.spec.dtype,
            engine,
            bank.spec.dtype,
        )
    return bank


def layout_of(shape: EngineShape, section: MemorySection, spec: BankSpec) -> Layout:
    """Sizes that follow from the configuration. Raises ConfigError if the pool cannot hold one page."""
    kv_heads = max(1, spec.kv_heads // shape.tp_size)
    page_tokens = section.page_tokens or (8 if spec.keep_tokens else 16)
    dtype = {"auto": shape.dtype, "int8": torch.int8, "fp8": torch.float8_e4m3fn}[section.pool_dtype]
    most_layers = max(sum(first <= layer < end for layer in spec.layers) for first, end in shape.pp_spans)
    page_bytes = PageLayout(max(1, most_layers), kv_heads, spec.head_dim, page_tokens, dtype).page_bytes
    num_pages = int(section.pool_gib * GIB) // page_bytes
    if num_pages < 1:
        raise ConfigError(f"mem_triton.memory.pool_gib: {section.pool_gib} does not hold one page; give it more")
    max_pages = _max_pages(shape, section, spec, page_tokens, num_pages)
    temperature = spec.temperature if section.temperature is None else section.temperature
    return Layout(
        num_pages, page_tokens, page_bytes, max_pages, spec.layers, kv_heads, spec.head_dim, dtype, temperature
    )


def _max_pages(shape: EngineShape, section: MemorySection, spec: BankSpec, page_tokens: int, num_pages: int) -> int:
    named = min(num_pages, MOST_PAGES)
    if section.retrieval is None or spec.kind != "memory3":
        return named
    longest = min(shape.max_step_tokens, shape.max_model_len)  # tokens of one request in one step
    chunks = longest // section.retrieval.every + 2
    tokens = spec.keep_tokens or spec.reference_tokens
    retrieved = chunks * MOST_REFERENCES * -(-tokens // page_tokens)  # a request may ask for more than the default
    return max(named, min(retrieved, 4 * num_pages))  # an entry counts once for each stretch of tokens that sees it


def join_captured(spec: BankSpec, files: Sequence[str]) -> MemoryBlock:
    """One entry out of what the ranks captured: their layers and heads in order; ranks that repeat heads count once."""
    parts: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}
    for file in files:
        with safe_open(file, framework="pt") as f:
            first_head = int(f.metadata()["first_head"])
            for layer in {int(name.split(".")[0]) for name in f.keys()}:  # noqa: SIM118
                parts[layer, first_head] = f.get_tensor(f"{layer}.keys"), f.get_tensor(f"{layer}.values")
    heads = sorted({head for _, head in parts})

    def joined(which: int) -> torch.Tensor:
        layers = [torch.cat([parts[layer, head][which] for head in heads]) for layer in spec.layers]
        return torch.stack(layers)  # [L, Hkv, T, D]

    keys = joined(0)
    positions = torch.arange(keys.shape[2], dtype=torch.int32).expand(*keys.shape[:3])
    return MemoryBlock(keys, joined(1), positions)
