"""Makes ``tests/data/mplus``: tiny checkpoints that the authors' code of M+ writes, and what it computes with them.

    PYTHONPATH=OFFICIAL:TRANSFORMERS python tests/data/make_mplus_golden.py

OFFICIAL: a checkout of wangyu-ustc/MemoryLLM at 5acaf52. TRANSFORMERS: transformers 4.48.2 and peft, which it needs.
Cases: "grown" begins with more long-term rows than are read, has an adapter for writing and one for reading, scaled
RoPE, and is written 70 times; "few" begins with fewer, has no adapter, a retriever of one matrix, and 9 writes.

Only their layers on FlashAttention run as shipped, so those on sdpa get what is missing (``_repair_sdpa``). The authors
sort by age with numpy's default sort, whose order of equal ages depends on the processor; here it is the
stable one, so that there is one answer. Frequencies of RoPE are rounded to bfloat16, as their README does.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

ROWS, BLOCKS, LONG_BLOCKS, VOCABULARY = 8, 6, 2, 96
TARGET = Path(__file__).parent / "mplus"
LORA = {
    "inference_mode": True,
    "r": 4,
    "lora_alpha": 8,
    "lora_dropout": 0.0,
    "target_modules": ["q_proj", "v_proj", "down_proj"],
}
POINTS = {"grown": {0, 3, 8, 70}, "few": {0, 2, 5, 9}}
"""Updates after which reading is recorded; the last one is how many there are."""
PROMPT = 12


def model_of(case: str):
    from modeling_mplus import MPlus
    from transformers import LlamaConfig

    grown = case == "grown"
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        rope_scaling={
            "rope_type": "llama3",
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
        if grown
        else None,
        tie_word_embeddings=False,
    )
    own = {
        "num_blocks": BLOCKS,
        "num_tokens": ROWS,
        "num_memory_tokens": ROWS * BLOCKS,
        "add_bos_embedding": True,
        "drop_memory_per_layer": False,  # M+ drops each layer's own whatever this says
        "add_decoder_lora": grown,
        "lora_config": LORA if grown else None,
        "num_ltm_blocks": LONG_BLOCKS,
        "update_ltm_mode": "immediate",
        "initial_rf_when_moving_stm_to_ltm": 3,
        "decay_frequency": 1,
        "update_ltm_frequency": 6 if grown else 4,
        "ltm_initial_size": 20 if grown else 5,
        "selector_hidden_dim": 16,
        "num_selector_layers": 2 if grown else 1,
        "add_selector": True,
        "selector_layers": [0, 1, 2],
        "add_encoder_retriever": grown,
        "detach_hidden_state": True,
    }
    for key, value in own.items():
        setattr(config, key, value)
    config._attn_implementation = "sdpa"
    torch.manual_seed(4 if grown else 6)
    model = MPlus(config).float().eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.uniform_(0.7, 1.3)
        elif "ltm_ages" in name:
            parameter.data = torch.randperm(200)[: len(parameter)].float() + 100
        elif "ltm_recall" in name:
            parameter.data = torch.randint(1, 8, parameter.shape).float() / 2
        elif "lora_" in name or "positional_emb" in name:
            parameter.data.normal_(std=0.2)
        elif name.startswith(("memory", "bos_embedding", "ltm.", "ltm_keys.")):
            pass
        elif name.partition("proj.")[0].endswith(("query_", "key_")):
            parameter.data.normal_(std=0.6)
        else:
            parameter.data.normal_(std=0.15)
    with torch.no_grad():  # keys are those of the rows, as in the authors' checkpoint
        for layer, rows, keys in zip(model.model.layers, model.ltm, model.ltm_keys, strict=True):
            keys.data = layer.self_attn.key_proj(layer.input_layernorm(rows)).clone()
    return model


def _repair_sdpa() -> None:
    """Their layers unpack five values of attention, and only that of FlashAttention gives so many."""
    from modeling_mplus import LlamaSdpaAttention

    stock = LlamaSdpaAttention.forward
    LlamaSdpaAttention.forward = lambda self, *arguments, **named: (*stock(self, *arguments, **named), None, None)


def rounded(model, kind: torch.dtype) -> None:
    """Round the frequencies of every rotary embedding, or compute them anew."""
    for module in model.modules():
        if hasattr(module, "original_inv_freq"):
            module.inv_freq = module.original_inv_freq.to(kind)


def read(model, prompt: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of a prompt, and the long-term rows [L, K, d] that were read for it."""
    seen, stock = [], type(model).get_ltm

    def watched(self, *arguments, **named):
        found = stock(self, *arguments, **named)
        seen.append(found[0])
        return found

    type(model).get_ltm = watched
    try:
        logits = model(prompt[None], use_cache=False).logits[0].contiguous()
    finally:
        type(model).get_ltm = stock
    return logits, torch.stack(seen).contiguous()


def main() -> None:
    np.argsort = functools.partial(np.argsort, kind="stable")
    _repair_sdpa()
    for case, points in POINTS.items():
        model = model_of(case)
        folder = TARGET / case
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: x.detach().clone().contiguous() for name, x in model.state_dict().items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(model.config.to_dict(), indent=1, default=str) + "\n")
        rounded(model, torch.bfloat16)
        model.put_ltm_to_numpy()
        chance, found = torch.Generator().manual_seed(5), {}
        prompt = found["prompt"] = torch.randint(3, VOCABULARY, (PROMPT,), generator=chance)
        texts = torch.full((max(points), 14), -1)
        deltas = []
        with torch.no_grad():
            for update in range(max(points) + 1):
                if update in points:
                    found[f"{update}.logits"], found[f"{update}.picks"] = read(model, prompt)
                    found[f"{update}.memory"] = model.memory.data.clone().contiguous()
                if update < max(points):
                    length = int(torch.randint(4, 15, (1,), generator=chance))
                    texts[update, :length] = torch.randint(3, VOCABULARY, (length,), generator=chance)
                    torch.manual_seed(update)
                    deltas.append(model.inject_memory(texts[update, :length][None], update_memory=True)[0].clone())
            found["texts"], found["deltas"] = texts, torch.stack(deltas).contiguous()
            for layer in range(3):
                found[f"ltm.{layer}"] = model.ltm[layer].clone()
                found[f"ltm_keys.{layer}"] = model.ltm_keys[layer].clone()
                found[f"ltm_ages.{layer}"] = torch.tensor(model.ltm_ages[layer].astype(int))
                found[f"ltm_recall_frequencies.{layer}"] = torch.tensor(model.ltm_recall_frequencies[layer]).double()
                found[f"memory_ages.{layer}"] = torch.tensor(model.memory_ages[layer].astype(int).copy())
                if model.cached_dropped_memories is not None:
                    found[f"cached.{layer}"] = model.cached_dropped_memories[layer].clone()
                    found[f"cached_keys.{layer}"] = model.cached_dropped_keys[layer].clone()
                    found[f"cached_ages.{layer}"] = torch.tensor(model.cached_dropped_memory_ages[layer].astype(int))
            output = model(prompt[None], use_cache=True)  # and greedy tokens, through its own cache
            tokens = []
            for _ in range(8):
                tokens.append(output.logits[0, -1].argmax())
                output = model(tokens[-1].view(1, 1), past_key_values=output.past_key_values, use_cache=True)
            found["tokens"] = torch.stack(tokens)
            rounded(model, torch.float32)
            found["exact.logits"], found["exact.picks"] = read(model, prompt)
        save_file({name: x.contiguous() for name, x in found.items()}, folder / "expected.safetensors")
        print(case, [len(x) for x in model.ltm], {k: tuple(v.shape) for k, v in found.items() if "cached" in k})
        print((found["exact.logits"] - found[f"{max(points)}.logits"]).abs().max(), found["tokens"])


if __name__ == "__main__":
    main()
