"""What the front end and every worker must see alike: the store, and how versions lie in pages of the device.

Both compute it from the engine's shape, so that nothing about it has to be sent.
"""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass

from mem_triton.schema import ConfigError
from mem_triton.store.bank.fingerprint import Fingerprint, model_fingerprint, model_folder
from mem_triton.store.errors import BankError
from mem_triton.store.pool.pages import GIB, PageLayout
from mem_triton.systems.engine import EngineShape
from mem_triton.systems.memoryllm.pools import Pools
from mem_triton.systems.memoryllm.section import MemoryLLMSection
from mem_triton.systems.memoryllm.shape import PoolShape
from mem_triton.systems.served_model import config_differences

PAGE_TOKENS = 64
"""Rows of a page: a version is one long prefix, which small pages would only give a longer table."""


@dataclass(frozen=True)
class PoolLayout:
    """rows: of a version, the learned first one included. pages: that they take; versions: that fit on a device.

    page: one page on this device. row_bytes: host memory of a version's hidden rows. picks: pages of the long-term rows
    that one request reads; requests: how many requests have such pages at once.
    """

    rows: int
    pages: int
    versions: int
    page: PageLayout
    row_bytes: int
    picks: int = 0
    requests: int = 0

    @property
    def total(self) -> int:
        """Pages of the pool on a device."""
        return self.versions * self.pages + self.requests * self.picks

    @property
    def version_bytes(self) -> int:
        """Of a version's keys and values on a device."""
        return self.pages * self.page.page_bytes

    def describe(self) -> str:
        """Sizes, for the log."""
        said = (
            f"{self.rows} rows a layer, {self.version_bytes / GIB:.2f} GiB of keys and values a version, "
            f"{self.versions} version(s) on the device; hidden rows {self.row_bytes / GIB:.2f} GiB on the host"
        )
        if not self.picks:
            return said
        each = self.picks * self.page.page_bytes / GIB
        return f"{said}; long-term rows of {self.requests} request(s) at once, {each:.3f} GiB each"


def open_store(engine: EngineShape, section: MemoryLLMSection) -> Pools:
    """The configured store, checked against the served model. Raises ConfigError naming the field that differs."""
    try:
        pools = Pools.open(section.pools, max_pools=section.max_pools)
        made = Fingerprint(**pools.about["model"])
        folder = model_folder(engine.model, engine.revision)
        here = model_fingerprint(folder)
    except (OSError, BankError, LookupError, TypeError, ValueError) as error:
        raise ConfigError(f"mem_triton.memoryllm.pools: {error}") from None
    if pools.shape.long_term is not None and section.ltm.selection == "whole" and engine.splits_prompts:
        raise ConfigError(
            f"mem_triton.memoryllm.ltm.selection: {section.pools} is a store of M+, whose rows a prompt chooses with "
            f"all its tokens, and this engine splits prompts; start it with {engine.splits_prompts}, or let each part "
            'choose for itself: "ltm": {"selection": "chunk"}'
        )
    if engine.quantization is not None:
        raise ConfigError(
            f"mem_triton.memoryllm.pools: the engine quantises the weights ({engine.quantization}), and pools are "
            "written and read by the weights that they were converted with; start it without --quantization"
        )
    differences = made.differences(here) or config_differences(engine, folder)
    if differences:
        raise ConfigError(
            f"mem_triton.memoryllm.pools: {section.pools} was made for another model ({'; '.join(differences)}); "
            "serve the folder `model` beside it"
        )
    if pools.shape.torch_dtype != engine.dtype:
        logging.getLogger(f"{engine.engine.lower()}.mem_triton").warning(
            "mem_triton.memoryllm.pools: %s holds %s, the engine computes in %s: rows are rounded on their way",
            section.pools,
            pools.shape.dtype,
            str(engine.dtype).removeprefix("torch."),
        )
    return pools


def layout_of(engine: EngineShape, section: MemoryLLMSection, shape: PoolShape) -> PoolLayout:
    """Sizes that follow from the configuration. Raises ConfigError if no version fits."""
    rows = shape.rows + shape.bos
    layers = max(end - first for first, end in engine.pp_spans)
    page = PageLayout(layers, max(1, engine.kv_heads // engine.tp_size), engine.head_dim, PAGE_TOKENS, engine.dtype)
    pages = page.pages_for(rows)
    size = pages * page.page_bytes
    room, picks, requests = int(section.gib * GIB), 0, 0
    if shape.long_term is not None:  # every request that reads has pages of its own; half of the room at most
        picks = page.pages_for(shape.long_term.read)
        each = picks * page.page_bytes
        requests = max(1, min(engine.max_requests, room // 2 // each))
        room -= requests * each
    versions = min(max(room, 0) // size, section.max_pools * section.versions)
    if versions < 1:
        size += picks * page.page_bytes
        raise ConfigError(
            f"mem_triton.memoryllm.gib: {section.gib} holds no version of a pool, which takes {size / GIB:.3f} GiB on "
            "each device; give it more"
        )
    row_bytes = shape.layers * shape.rows * shape.hidden * shape.torch_dtype.itemsize
    return PoolLayout(rows, pages, versions, page, row_bytes, picks, requests)


def cache_key(engine: EngineShape, pools: Pools) -> str:
    """What, besides a version, the KV of a request that reads it depends on: the model and the precision."""
    parts = (pools.about["model"]["weights"], str(engine.dtype))
    return hashlib.sha256("|".join(parts).encode()).hexdigest()[:16]
