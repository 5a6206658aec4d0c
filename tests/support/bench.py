"""Tiny models and adapters on disk, and the transformers oracle: what every engine's tests compare with.

Fixtures are made once per test run; an engine's ``conftest.py`` imports those that its tests use.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from mem_triton.systems.delta_mem import save_adapter
from tests.support.models import random_adapter, save_tiny_model, tiny_model

ADAPTERS = {
    "qwen3": {"couple_lambda": False},
    "qwen2": {"delta_heads": ("q", "o"), "num_state_heads": 4, "rank": 4, "trainable_delta_scale": True},
    "llama": {"delta_heads": ("k", "v"), "state_update_mode": "no_lambda", "rankwise_gates": False},
    "mistral": {"delta_heads": ("o",), "delta_o_rmsnorm": True, "state_update_mode": "lambda_outside"},
    "smollm3": {"delta_heads": ("q", "o"), "target_layers": (0,)},
}
"""One adapter configuration per model family, chosen so that together they cover what an adapter can say."""


@dataclass
class Bench:
    """A tiny model and adapter on disk, and the same in transformers."""

    model: Path
    adapter: Path
    oracle: torch.nn.Module
    lora: Path | None = None

    @property
    def memory(self) -> dict:
        return {"delta": {"adapter": str(self.adapter)}}

    def forget(self) -> None:
        from mem_triton_transformers import reset_memory

        reset_memory(self.oracle)

    def generate(self, prompt: list[int], count: int = 12, write: bool = True) -> list[int]:
        """Greedy continuation from the oracle's present state, which moves on unless ``write`` is False."""
        from mem_triton_transformers import set_memory_write

        set_memory_write(self.oracle, write)
        ids = self.oracle.generate(torch.tensor([prompt]), max_new_tokens=count, do_sample=False)
        return ids[0, len(prompt) :].tolist()

    def fresh(self, prompt: list[int], count: int = 12) -> list[int]:
        """Greedy continuation from a zero state."""
        self.forget()
        return self.generate(prompt, count)


def make_bench(folder: Path, family: str = "qwen3", **config: Any) -> Bench:
    """config: keys of the adapter's configuration, over those of the family."""
    from mem_triton_transformers import apply_mem_triton

    size = {"hidden": 128} if family == "qwen2" else {}  # its heads are hidden / heads wide; vLLM's CPU kernel wants 32
    model = tiny_model(family, **size)
    adapter = random_adapter(model, **ADAPTERS[family] | config)
    bench = Bench(save_tiny_model(folder / "model", family, **size), save_adapter(adapter, folder / "adapter"), model)
    apply_mem_triton(model, {"delta": {"adapter": adapter}})
    return bench


@pytest.fixture(scope="session")
def bench(tmp_path_factory) -> Bench:
    return make_bench(tmp_path_factory.mktemp("qwen3"))


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    """Four prompts of 7 to 150 tokens: shorter and longer than a page (16, 32) and than a prefill chunk (64)."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(4, 500, (n,), generator=generator).tolist() for n in (7, 30, 150, 65)]


@pytest.fixture(scope="session")
def lora_bench(bench, tmp_path_factory) -> Bench:
    """The same model and adapter with a LoRA: on disk for the engine, merged into the weights for the oracle."""
    from peft import LoraConfig, get_peft_model

    from mem_triton_transformers import apply_mem_triton

    folder = tmp_path_factory.mktemp("lora")
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = get_peft_model(tiny_model(), LoraConfig(r=8, lora_alpha=16, target_modules=targets))
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    merged = model.merge_and_unload().eval()
    apply_mem_triton(merged, {"delta": {"adapter": str(bench.adapter)}})
    return Bench(bench.model, bench.adapter, merged, lora=folder)
