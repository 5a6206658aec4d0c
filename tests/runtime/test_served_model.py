"""A bank and the model that an engine really computes: dtype, RoPE, sizes, quantisation (fault 14)."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mem_triton.config import ConfigError, MemorySection
from mem_triton.store.bank import Bank
from mem_triton.store.bank.fingerprint import model_fingerprint
from mem_triton.store.block import MemoryBlock
from mem_triton.systems.engine import EngineShape
from mem_triton.systems.explicit.layout import open_bank
from mem_triton.systems.explicit.worker import ExplicitMemory
from tests.store.bank_case import spec
from tests.support.models import save_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def bank(model, tmp_path_factory) -> Path:
    folder, fingerprint = tmp_path_factory.mktemp("bank") / "b", model_fingerprint(model)
    shape = {"layers": (0,), "kv_heads": fingerprint.kv_heads, "head_dim": fingerprint.head_dim}
    Bank.create(folder, spec(fingerprint=fingerprint, **shape)).close()
    return folder


def shape_of(folder: Path, **changes) -> EngineShape:
    """An engine's that serves the folder as it is."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    usual = EngineShape(
        engine="vLLM", model=str(folder), revision=None, hf_config=config.to_dict(), dtype=torch.float32,
        hidden=config.hidden_size, heads=config.num_attention_heads, kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim, tp_size=1, pp_spans=((0, config.num_hidden_layers),), max_requests=4,
        max_step_tokens=64, max_model_len=512,
    )  # fmt: skip
    return replace(usual, **changes)


def opened(bank: Path, shape: EngineShape) -> None:
    open_bank(shape, MemorySection(bank=bank)).close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fault14_a_bank_of_another_dtype_is_said_once(model, bank, caplog, dtype):
    with caplog.at_level(logging.WARNING):
        opened(bank, shape_of(model, dtype=dtype))
    said = [record.getMessage() for record in caplog.records if "holds float32" in record.getMessage()]
    assert len(said) == (dtype != torch.float32)
    assert all(f"computes in {str(dtype)[6:]}" in line and "--dtype float32" in line for line in said)


def test_fault14_a_constant_prefix_that_the_engine_s_dtype_cannot_hold_is_refused_at_start(model, tmp_path):
    fingerprint = model_fingerprint(model)
    heads, dim, layers = fingerprint.kv_heads, fingerprint.head_dim, range(fingerprint.num_layers)
    fields = {"layers": (0,), "kv_heads": heads, "head_dim": dim, "prefix_text": "x"}
    big = torch.full((len(layers), heads, 3, dim), 70000.0)
    with Bank.create(tmp_path / "b", spec(fingerprint=fingerprint, **fields)) as made:
        made.set_sink(MemoryBlock(big, big, torch.arange(3, dtype=torch.int32).expand(big.shape[:3]).contiguous()))
    section = MemorySection(bank=tmp_path / "b", pool_gib=2**-10)

    def start(dtype: torch.dtype) -> None:
        ExplicitMemory(shape_of(model, dtype=dtype), section, list(layers), 0, 0, torch.device("cpu"), lambda *_: None)

    start(torch.bfloat16)
    with pytest.raises(ConfigError, match=r"constant prefix has numbers beyond torch\.float16"):
        start(torch.float16)
