"""Makes ``tests/data/memoryllm``: tiny checkpoints that the authors' code writes, and what it computes with them.

    PYTHONPATH=OFFICIAL:TRANSFORMERS python tests/data/make_memoryllm_golden.py

OFFICIAL: a checkout of wangyu-ustc/MemoryLLM at 5acaf52. TRANSFORMERS: transformers 4.48.2 and peft, which it needs.
Cases: "plain" has an uninitialised pool and no adapters, and drops the same rows in all layers; "adapters" has one
adapter for writing and one for reading, and drops rows of each layer's own.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

ROWS, BLOCKS = 8, 4
TARGET = Path(__file__).parent / "memoryllm"
LORA = {
    "inference_mode": True,
    "r": 4,
    "lora_alpha": 8,
    "lora_dropout": 0.0,
    "target_modules": ["q_proj", "v_proj", "down_proj"],
}
TEXTS = {"long": 21, "short": 5, "exact": ROWS, "again": 13}
"""Texts that are injected one after the other, by their number of tokens; each is drawn for with its place as seed."""
PROMPT = 11


def model_of(case: str):
    from configuration_memoryllm import MemoryLLMConfig
    from modeling_memoryllm import MemoryLLM

    adapters = case == "adapters"
    config = MemoryLLMConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        num_blocks=BLOCKS,
        num_tokens=ROWS,
        num_memory_tokens=ROWS * BLOCKS,
        add_bos_embedding=True,
        drop_memory_per_layer=adapters,
        add_decoder_lora=adapters,
        lora_config=LORA if adapters else None,
        initializer_range=0.15,
        attn_implementation="sdpa",
        tie_word_embeddings=False,
    )
    config._attn_implementation = "sdpa"
    torch.manual_seed(3 if adapters else 2)
    model = MemoryLLM(config).float().eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.uniform_(0.7, 1.3)
        elif "lora_" in name or "positional_emb" in name:
            parameter.data.normal_(std=0.2)
        elif name not in ("memory", "bos_embedding"):
            parameter.data.normal_(std=0.15)
    if adapters:
        model.initialized += 1
    return model


def main() -> None:
    for case in ("plain", "adapters"):
        model = model_of(case)
        folder = TARGET / case
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: x.detach().clone().contiguous() for name, x in model.state_dict().items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(model.config.to_dict(), indent=1, default=str) + "\n")
        chance, found = torch.Generator().manual_seed(5), {}
        found["prompt"] = torch.randint(0, 96, (PROMPT,), generator=chance)
        with torch.no_grad():
            for seed, (name, length) in enumerate(TEXTS.items()):
                ids = found[f"{name}.ids"] = torch.randint(0, 96, (length,), generator=chance)
                torch.manual_seed(seed)
                found[f"{name}.delta"] = model.inject_memory(ids[None], update_memory=True)[0].clone().contiguous()
                found[f"{name}.memory"] = model.memory.data.clone().contiguous()
                found[f"{name}.logits"] = model(found["prompt"][None], use_cache=False).logits[0].contiguous()
            output = model(found["prompt"][None], use_cache=True)  # and greedy tokens, through its own cache
            tokens = []
            for _ in range(8):
                tokens.append(output.logits[0, -1].argmax())
                output = model(tokens[-1].view(1, 1), past_key_values=output.past_key_values, use_cache=True)
            found["tokens"] = torch.stack(tokens)
        save_file(found, folder / "expected.safetensors")


if __name__ == "__main__":
    main()
