"""A small checkpoint in the layout of MemoryLLM's authors, converted; what transformers writes and answers with it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from mem_triton.systems.memoryllm.checkpoint import Checkpoint
from mem_triton.systems.memoryllm.convert import convert
from mem_triton.systems.memoryllm.mplus import MPlusCheckpoint
from mem_triton.systems.memoryllm.pools import Pools
from mem_triton_transformers import apply_mem_triton, inject, read_pool, remove_mem_triton
from tests.support.models import tiny_model, tiny_tokenizer

ROWS, BLOCKS, LAYERS, HEADS, SIZE, BOS = 16, 5, 3, 4, 32, 3
LINEARS = ("self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
"""Linears with adapters: of each way in which engines cut and join them some, and not all parts of the joined."""


LONG, KEYS = 40, 12
"""Long-term rows of a checkpoint of M+, and the width of its retriever's keys."""
MPLUS = {
    "num_ltm_blocks": 2,
    "update_ltm_mode": "immediate",
    "initial_rf_when_moving_stm_to_ltm": 3,
    "decay_frequency": 1,
    "update_ltm_frequency": 2,
    "selector_hidden_dim": KEYS,
    "num_selector_layers": 2,
    "add_selector": True,
}
"""Two of five blocks are long-term, and every second write merges what was dropped."""


def tokens_of(seed: int, count: int) -> list[int]:
    return torch.randint(4, 500, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


PROMPTS = [tokens_of(i, n) for i, n in enumerate((7, 30, 150, 65))]
TEXTS = [tokens_of(40 + i, n) for i, n in enumerate((37, 5, ROWS, 70))]
"""Longer and shorter than what a write makes, and exactly so long."""


def write_checkpoint(folder: Path, initialized: bool, mplus: bool = False) -> Path:
    """As the authors' code saves one, with an adapter for writing and one for reading. mplus: of M+."""
    model = tiny_model("llama", layers=LAYERS, hidden=HEADS * SIZE, heads=HEADS, kv_heads=2, head_dim=SIZE)
    chance = torch.Generator().manual_seed(11)

    def random(*shape: int, std: float = 1.0) -> torch.Tensor:
        return torch.randn(*shape, generator=chance) * std

    tensors: dict[str, torch.Tensor] = {}
    targets = tuple(f"{name}.weight" for name in LINEARS)
    for name, tensor in model.state_dict().items():
        if not name.endswith(targets):
            tensors[name] = tensor
            continue
        stem = name.removesuffix(".weight")
        tensors[f"{stem}.base_layer.weight"] = tensor
        for adapter in ("default", "decoder_adapter"):
            tensors[f"{stem}.lora_A.{adapter}.weight"] = random(4, tensor.shape[1], std=0.08)
            tensors[f"{stem}.lora_B.{adapter}.weight"] = random(tensor.shape[0], 4, std=0.08)
    width = HEADS * SIZE
    tensors |= {
        "memory": random(LAYERS, ROWS * BLOCKS, width),
        "bos_embedding": random(LAYERS, 1, width),
        "new_memory_positional_emb": random(1, 1, width, std=0.3),
        "initialized": torch.tensor(int(initialized), dtype=torch.uint8),
    }
    own: dict[str, Any] = {}
    if mplus:
        own = MPLUS | {"hidden_act": "silu", "ltm_initial_size": LONG}
        tensors["memory"] = tensors["memory"][:, : ROWS * (BLOCKS - MPLUS["num_ltm_blocks"])]
        del tensors["initialized"]
        for layer in range(LAYERS):
            stem = f"model.layers.{layer}.self_attn"
            tensors |= {f"{stem}.{x}_proj.0.weight": random(2 * KEYS, width, std=0.3) for x in ("query", "key")}
            tensors |= {f"{stem}.{x}_proj.2.weight": random(KEYS, 2 * KEYS, std=0.3) for x in ("query", "key")}
            tensors |= {f"ltm.{layer}": random(LONG, width), f"ltm_keys.{layer}": random(LONG, KEYS)}
            tensors[f"ltm_ages.{layer}"] = torch.randperm(900, generator=chance)[:LONG].float()
            tensors[f"ltm_recall_frequencies.{layer}"] = torch.randint(1, 4, (LONG,), generator=chance).float()
    lora = {"r": 4, "lora_alpha": 8, "target_modules": [name.rpartition(".")[2] for name in LINEARS]}
    config = model.config.to_dict() | {
        "model_type": "memoryllm",
        "architectures": ["MemoryLLM"],
        "num_blocks": BLOCKS,
        "num_tokens": ROWS,
        "num_memory_tokens": ROWS * BLOCKS,
        "add_bos_embedding": True,
        "drop_memory_per_layer": initialized,
        "add_decoder_lora": True,
        "lora_config": lora,
        "bos_token_id": BOS,
        **own,
    }
    folder.mkdir(parents=True)
    save_file({name: x.contiguous() for name, x in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config, default=str))
    tiny_tokenizer().save_pretrained(folder)
    return folder


@dataclass
class PoolBench:
    """folder: the converted checkpoint. oracle: its model in transformers, which knows nothing of the engine."""

    folder: Path
    oracle: Any
    initialized: bool

    @property
    def model(self) -> Path:
        return self.folder / "model"

    def store(self, place: Path) -> Path:
        """A copy of the store, to be written into."""
        shutil.copytree(self.folder / "memory", place / "memory")
        return place / "memory"

    def section(self, store: Path, **more: Any) -> dict[str, Any]:
        """The configuration's section."""
        return {"memoryllm": {"pools": str(store), "gib": 0.01, **more}}

    def write(self, store: Path, text: Sequence[int], pool: str = "main", seed: int = 0, **section: Any) -> str:
        """Write a text with transformers; the new version's reference."""
        model = apply_mem_triton(self.oracle, {"memoryllm": {"pools": str(store), **section}})
        try:
            return inject(model, text, pool, seed=seed)
        finally:
            remove_mem_triton(model)

    def answer(self, store: Path, prompt: Sequence[int], pool: str | None, count: int = 12) -> list[int]:
        """Greedy tokens of a prompt that reads a pool, None for none, in transformers."""
        return self.scored(store, prompt, pool, count)[0]

    def scored(
        self, store: Path, prompt: Sequence[int], pool: str | None, count: int = 12
    ) -> tuple[list[int], list[float]]:
        """The same with the log-probabilities of the tokens."""
        model = apply_mem_triton(self.oracle, {"memoryllm": {"pools": str(store)}})
        try:
            with read_pool(model, [pool]), torch.no_grad():
                ids = torch.tensor([list(prompt)])
                options = {"do_sample": False, "pad_token_id": 0, "use_cache": True}
                told = {"return_dict_in_generate": True, "output_logits": True}
                made = model.generate(ids, max_new_tokens=count, **options, **told)
        finally:
            remove_mem_triton(model)
        new = made.sequences[0, len(prompt) :].tolist()
        return new, [float(step[0].log_softmax(-1)[token]) for step, token in zip(made.logits, new, strict=True)]


def unmerged_of(bench: PoolBench, target: Path) -> Path:
    """The bench's checkpoint, converted with the adapter that reads apart; its folder."""
    convert(bench.folder.parent / "source", target, merged=False)
    return target


def rows_of(store: Path, reference: str, tenant: str = "") -> torch.Tensor:
    """The rows that lie on the disk."""
    with Pools.open(store) as pools:
        return pools.rows(reference, tenant)


def off(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest difference, as a part of the largest number."""
    return float((got - wanted).abs().max() / wanted.abs().max())


def make_pool_bench(folder: Path, initialized: bool = True, mplus: bool = False) -> PoolBench:
    from transformers import AutoModelForCausalLM

    source, kind = write_checkpoint(folder / "source", initialized, mplus), MPlusCheckpoint if mplus else Checkpoint
    convert(source, folder / "converted", kind=kind, rope="bf16")
    model = AutoModelForCausalLM.from_pretrained(folder / "converted" / "model", dtype=torch.float32).eval()
    return PoolBench(folder / "converted", model, initialized)
