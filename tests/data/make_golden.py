"""Golden numbers: what the official δ-mem code computes on tiny random models. Run by hand, not by the tests.

    python tests/data/make_golden.py PATH_TO_CHECKOUT_OF_declare-lab/delta-Mem

Made at commit 5cd5d915 of the official code, unpatched, with transformers 5.19.0 and torch 2.13.0 on CPU: fp32, eager
attention, DELTA_MEM_SCAN_IMPL=torch. Writes next to this file ``golden.safetensors`` (model weights, adapters, token
ids, logits and states), ``golden.json`` (configs, and the official config's keys), and ``official/`` (an adapter and a
state file as the official code saves them). Also checks here, where the official code is at hand, that it reads our
adapter and state files and then computes the same.

Every variant runs three calls on one KV cache: 12, 9 and 1 tokens for two rows, the second left-padded by three.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import tempfile
from pathlib import Path

os.environ["DELTA_MEM_SCAN_IMPL"] = "torch"
HERE = Path(__file__).resolve().parent
sys.path[:0] = [sys.argv[1], str(HERE.parent.parent), str(HERE.parent.parent / "integrations")]

import torch  # noqa: E402
import transformers  # noqa: E402
from deltamem.core import delta as official  # noqa: E402
from deltamem.core.delta_impl import load_delta_mem_state_dict, save_delta_mem_adapter  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from mem_triton.systems.delta_mem import DeltaMemAdapter, load_adapter, save_adapter  # noqa: E402
from mem_triton_transformers import apply_mem_triton, get_memory, load_memory, save_memory  # noqa: E402
from tests.support.models import random_adapter, tiny_model  # noqa: E402

MODEL = {"layers": 2, "hidden": 32, "heads": 2, "kv_heads": 1, "head_dim": 16, "vocab": 48, "std": 0.2}
FAMILIES = ("qwen3", "smollm3")
CALLS = (12, 9, 1)
PADDING = 3

VARIANTS: dict[str, dict] = {
    "tsw": {"rank": 8, "delta_heads": ["q", "o"]},
    "msw": {"rank": 4, "num_state_heads": 4},
    "uncoupled": {"rank": 4, "couple_lambda": False},
    "lambda_outside": {"rank": 4, "state_update_mode": "lambda_outside"},
    "no_lambda": {"rank": 4, "state_update_mode": "no_lambda"},
    "no_lambda_uncoupled": {"rank": 4, "state_update_mode": "no_lambda", "couple_lambda": False},
    "not_rankwise": {"rank": 4, "rankwise_gates": False},
    "not_rankwise_msw": {"rank": 4, "rankwise_gates": False, "num_state_heads": 2, "couple_lambda": False},
    "raw_qk": {"rank": 4, "normalize_qk": False},
    "scale_layer": {"rank": 4, "trainable_delta_scale": True},
    "scale_head": {
        "rank": 4,
        "trainable_delta_scale": True,
        "delta_scale_granularity": "head",
        "delta_scale_max": 3.0,
        "alpha": 6.0,
    },
    "o_rmsnorm": {"rank": 4, "delta_o_rmsnorm": True, "delta_o_rmsnorm_eps": 1e-3, "delta_heads": ["k", "o"]},
    "one_layer": {"rank": 4, "target_layers": [1]},
    "frozen": {"rank": 4},
    "message_mean": {"rank": 4, "memory_write_granularity": "message_mean"},
    "message_mean_no_ids": {"rank": 4, "memory_write_granularity": "message_mean"},
    "sentence_mean": {"rank": 4, "memory_write_granularity": "sentence_mean", "num_state_heads": 2},
    "smollm3": {"rank": 4},
}
HEAD_SUBSETS = ["".join(c) for n in range(1, 5) for c in itertools.combinations("qkvo", n)]


def main() -> None:
    models = {family: tiny_model(family, **MODEL) for family in FAMILIES}
    tensors = {f"model.{f}.{k}": v.clone() for f, model in models.items() for k, v in model.state_dict().items()}
    tensors |= {f"call.{i}.{key}": value for i, call in enumerate(calls()) for key, value in call.items()}
    for i, (name, config) in enumerate(VARIANTS.items()):
        adapter = random_adapter(models[family_of(name)], seed=100 + i, **config)
        tensors |= {f"{name}.adapter.{key}": value for key, value in adapter.tensors().items()}
        tensors |= {f"{name}.{key}": value for key, value in run(name, adapter).items()}
    every_head = random_adapter(models["qwen3"], seed=99, rank=4)
    tensors |= {f"heads.adapter.{key}": value for key, value in every_head.tensors().items()}
    for heads in HEAD_SUBSETS:
        config = every_head.config.model_copy(update={"delta_heads": tuple(heads)})
        result = run("heads", DeltaMemAdapter(config, every_head.layers))
        tensors |= {f"heads.{heads}.{key}": result[key] for key in ("logits.1", "logits.2")}
    tsw = random_adapter(models["qwen3"], seed=100, **VARIANTS["tsw"])
    tensors |= {f"tsw_sdpa.{key}": value for key, value in run("tsw", tsw, attention="sdpa").items() if "state" in key}
    save_file({key: value.contiguous() for key, value in tensors.items()}, HERE / "golden.safetensors")
    about = {
        "official_commit": os.popen(f"git -C {sys.argv[1]} rev-parse HEAD").read().strip(),
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "model": MODEL,
        "head_subsets": HEAD_SUBSETS,
        "variants": VARIANTS,
        "official_config_defaults": official.HFDeltaMemConfig().to_dict(),
    }
    (HERE / "golden.json").write_text(json.dumps(about, indent=1) + "\n")
    save_official_files(tsw)
    check_our_files(random_adapter(models["qwen3"], seed=100, **VARIANTS["tsw"]))
    check_our_files(random_adapter(models["qwen3"], seed=101, **VARIANTS["msw"]))


def family_of(variant: str) -> str:
    return "smollm3" if variant == "smollm3" else "qwen3"


def calls() -> list[dict[str, Tensor]]:
    """Inputs of the three calls; ids of messages and sentences count on from call to call, -1 is not written."""
    generator = torch.Generator().manual_seed(7)
    made, seen = [], 0
    for i, tokens in enumerate(CALLS):
        seen += tokens
        mask = torch.ones(2, seen, dtype=torch.long)
        mask[1, :PADDING] = 0
        position = torch.arange(tokens)
        message = (2 * i + (position >= tokens // 2)).expand(2, -1).clone()
        message[:, position >= tokens - 2] = -1 if tokens > 2 else 2 * i
        if i == 1:
            message[1] = message[1].where(message[1] != 2, 3)  # rows that hold different messages
        made.append(
            {
                "input_ids": torch.randint(0, MODEL["vocab"], (2, tokens), generator=generator),
                "attention_mask": mask,
                "message_ids": message,
                "sentence_ids": (5 * i + position // 3).expand(2, -1).clone(),
            }
        )
    return made


def official_model(adapter: DeltaMemAdapter, family: str, attention: str = "eager") -> nn.Module:
    model = tiny_model(family, attn_implementation=attention, **MODEL)
    official.attach_delta_mem(model, official.HFDeltaMemConfig.from_dict(adapter.config.to_dict()))
    load_delta_mem_state_dict(model, adapter.tensors())
    return model


@torch.no_grad()
def run(variant: str, adapter: DeltaMemAdapter, attention: str = "eager") -> dict[str, Tensor]:
    """Logits and states after each call, by the official code."""
    model, cache, result = official_model(adapter, family_of(variant), attention), transformers.DynamicCache(), {}
    for i, call in enumerate(calls()):
        official.set_delta_mem_write_enabled(model, not (variant == "frozen" and i == 1))
        if variant in ("message_mean", "sentence_mean"):
            official.set_delta_mem_write_message_ids(model, call["message_ids"])
        if variant == "sentence_mean":
            official.set_delta_mem_write_sentence_ids(model, call["sentence_ids"])
        output = model(input_ids=call["input_ids"], attention_mask=call["attention_mask"], past_key_values=cache)
        result[f"logits.{i}"] = output.logits
        for name, state in official.get_delta_mem_online_state(model).items():
            result[f"state.{i}.{name}"] = state
    return result


def save_official_files(adapter: DeltaMemAdapter) -> None:
    model = official_model(adapter, "qwen3")
    save_delta_mem_adapter(model, HERE / "official", official.HFDeltaMemConfig.from_dict(adapter.config.to_dict()))
    call = calls()[0]
    with torch.no_grad():
        model(input_ids=call["input_ids"], attention_mask=call["attention_mask"])
    torch.save(official.get_delta_mem_online_state(model), HERE / "official" / "delta_state.pt")


@torch.no_grad()
def check_our_files(adapter: DeltaMemAdapter) -> None:
    """A8 from us to them: the official loaders take our adapter and state files, and the next call agrees."""
    first, second = ({"input_ids": call["input_ids"]} for call in calls()[:2])
    ours = apply_mem_triton(tiny_model("qwen3", **MODEL), {"delta": {"adapter": adapter}})
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(adapter, folder, format="pt")
        assert load_adapter(folder).fingerprint == adapter.fingerprint
        ours(**first)
        save_memory(ours, f"{folder}/delta_state.pt")
        theirs = tiny_model("qwen3", **MODEL)
        official.attach_delta_mem(theirs, official.HFDeltaMemConfig.from_pretrained(folder))
        official.load_delta_mem_adapter(theirs, folder)
        official.load_delta_mem_online_state(theirs, torch.load(f"{folder}/delta_state.pt", weights_only=True))
        difference = (theirs(**second).logits - ours(**second).logits).abs().max()
        assert difference < 1e-5, difference
        torch.save(official.get_delta_mem_online_state(theirs), f"{folder}/theirs.pt")
        states = get_memory(ours)
        load_memory(ours, f"{folder}/theirs.pt")
        for name, state in get_memory(ours).items():
            assert (state - states[name]).abs().max() < 1e-6
    print(f"official code reads our files, logits differ by {difference:.1e}")


if __name__ == "__main__":
    main()
