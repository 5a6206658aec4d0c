"""Trained keys and values as peft and HazyResearch's code save them, and what transformers makes of them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.support.models import save_tiny_model

ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 1024,
    },
}


def save_model(folder: Path, rope: str = "default", **options: Any) -> Path:
    return save_tiny_model(folder, "llama", rope_parameters=ROPES[rope], **options)


def load_model(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()


def chance_cache(model: Any, rows: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Keys, as they lie after RoPE at 0...p-1, and values: [L, Hkv, p, D] each."""
    config = model.config
    shape = (config.num_hidden_layers, config.num_key_value_heads, rows, config.head_dim)
    chance = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=chance), torch.randn(shape, generator=chance)


def save_cartridge(file: Path, keys: Tensor, values: Tensor, fixed: int = 1, word: str = "fixed") -> Path:
    """As HazyResearch's code does: ``fixed`` rows that are not trained, in a list of their own, and the others."""

    def part(tensor: Tensor, rows: slice) -> nn.ParameterList:
        if rows == slice(0, 0):
            return nn.ParameterList()
        return nn.ParameterList([nn.Parameter(layer[None, :, rows].clone()) for layer in tensor])

    lists = {f"trainable_{name}": part(x, slice(fixed, None)) for name, x in (("keys", keys), ("values", values))}
    lists |= {f"{word}_{name}": part(x, slice(0, fixed)) for name, x in (("keys", keys), ("values", values))}
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(lists, file)
    return file


def save_adapter(folder: Path, base: Path, config: Any, seed: int = 0) -> Path:
    """A fresh adapter of peft with weights by chance, saved by peft."""
    from peft import get_peft_model

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = get_peft_model(load_model(base), config)
        for parameter in model.prompt_encoder.parameters():
            parameter.data.normal_(0, 1.0)
        model.save_pretrained(folder)
    return folder


def peft_logits(base: Path, adapter: Path, ids: Tensor) -> Tensor:
    """What the model gives with the adapter, for the text alone."""
    from peft import PeftModel

    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(load_model(base), adapter).eval()
        return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, -ids.shape[1] :]


def cache_logits(model: Any, ids: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """What transformers gives with these keys and values as its KV cache."""
    from transformers import DynamicCache

    cache = DynamicCache()
    for layer, (k, v) in enumerate(zip(keys, values, strict=True)):
        cache.update(*(x[None].expand(len(ids), -1, -1, -1).to(model.dtype) for x in (k, v)), layer)
    with torch.no_grad():
        return model(ids, past_key_values=cache).logits


def cache_tokens(model: Any, prompt: list[int], keys: Tensor, values: Tensor, count: int) -> list[int]:
    """Greedy tokens after the prompt, by transformers with these keys and values as its KV cache."""
    ids = torch.tensor([prompt])
    for _ in range(count):
        ids = torch.cat([ids, cache_logits(model, ids, keys, values)[:, -1:].argmax(-1)], 1)
    return ids[0, len(prompt) :].tolist()


class Served:
    """A model, a bank with a cartridge and an adapter of peft in it, and the template for chats that read them.

    cartridge, adapter: their keys and values as the files have them.
    """

    def __init__(self, folder: Path) -> None:
        from peft import CartridgeConfig

        from tests.cli.test_cli import run

        self.model, self.bank, self.template = (
            save_model(folder / "model", "llama3"),
            folder / "bank",
            folder / "c.jinja",
        )
        self.hf = load_model(self.model)
        self.cartridge = chance_cache(self.hf, 21, seed=1)
        save_cartridge(folder / "cartridge.pt", *self.cartridge)
        config = CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=9)
        save_adapter(folder / "adapter", self.model, config, seed=2)
        flat = load_file(folder / "adapter" / "adapter_model.safetensors")["prompt_embeddings"]
        self.adapter = flat.view(9, 2, 2, 2, 32).permute(2, 1, 3, 0, 4).unbind(0)  # p, L, K and V, Hkv, D
        sources = (folder / "cartridge.pt", folder / "adapter")
        run("import", *sources, self.bank, "--model", self.model, "--chat-template", self.template)

    def section(self) -> dict[str, Any]:
        return {"memory": {"bank": str(self.bank), "pool_gib": 0.01}}

    def after(self, prompt: list[int], name: str | None, count: int = 12) -> list[int]:
        """What transformers generates with these keys and values as its KV cache; with none for None."""
        keys, values = getattr(self, name) if name else (self.cartridge[0][:, :, :0], self.cartridge[1][:, :, :0])
        return cache_tokens(self.hf, prompt, keys, values, count)

    def chat_ids(self, text: str) -> list[int]:
        """A question's tokens under the template."""
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self.model)
        messages = [{"role": "user", "content": text}]
        return tokenizer.apply_chat_template(
            messages, chat_template=self.template.read_text(), add_generation_prompt=True, return_dict=False
        )


def trained_entries_are_read_over_http(server: Any, served: Served) -> None:
    """What any engine's server must do with trained entries; its tokens are those of transformers with the cache."""
    prompt = [260 + i * 7 % 200 for i in range(40)]
    answers = {name: server.tokens(prompt, fields={"mem_ids": [name]}) for name in ("cartridge", "adapter")}
    assert answers == {name: served.after(prompt, name) for name in answers}
    plain = server.tokens(prompt)
    assert plain == served.after(prompt, None) and plain not in answers.values(), "they matter"
    response = server.complete(prompt, fields={"mem_ids": ["cartridge", "adapter"]})
    told = server.report(response)
    assert told["trained"].startswith("cartridge@1, adapter@1 were not trained together")
    assert "not trained together" in server.printed()
    assert "trained" not in server.report(server.complete(prompt, fields={"mem_ids": ["adapter"]}))
    asked = served.chat_ids("who?")
    chat = server.chat("who?", 12, fields={"mem_ids": ["cartridge"]}, ignore_eos=True).json()
    assert chat["usage"]["prompt_tokens"] == len(asked), "the template that was derived is the one in use"
