"""``runtime.worker.layout`` by vLLM's configuration, until the front end reads shapes."""

from __future__ import annotations

from vllm.config import VllmConfig

from mem_triton.config import MemorySection
from mem_triton.runtime.worker import layout
from mem_triton.runtime.worker.layout import GIB, MOST_PAGES, Layout, join_captured, model_folder
from mem_triton.store.bank import Bank, BankSpec
from mem_triton_vllm.shape import shape_of

__all__ = ["GIB", "MOST_PAGES", "Layout", "join_captured", "layout_of", "model_folder", "open_bank"]


def open_bank(vllm_config: VllmConfig, section: MemorySection) -> Bank:
    """See ``runtime.worker.layout``."""
    return layout.open_bank(shape_of(vllm_config), section)


def layout_of(vllm_config: VllmConfig, section: MemorySection, spec: BankSpec) -> Layout:
    """See ``runtime.worker.layout``."""
    return layout.layout_of(shape_of(vllm_config), section, spec)
