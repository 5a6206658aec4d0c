"""Cost of a training step of a δ-mem adapter beside that of a LoRA adapter of equal size; JSON under results/::

    python -m benchmarks.recall_real.step --save

Both train on the same tokens: what is told, then a question and its reply. δ-mem runs them as two requests with a
state between, LoRA as one row. The model has SmolLM2-135M's shape and random weights, since time does not depend on
them; both adapters sit in the same layers, on q and o. Rounds alternate; what counts is CPU time of the process,
because other work on the machine changes it less than the clock's. Gate: the ratio of the medians is at most 1.5.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.common import record
from benchmarks.common.statistics import median_and_range
from mem_triton.systems.delta_mem.training.recipe import recipe_of
from mem_triton.systems.delta_mem.training.tokens import Request, Session
from mem_triton_transformers import trainable_adapter
from mem_triton_transformers.delta_training.forward import SessionRunner
from mem_triton_transformers.delta_training.losses import memory_loss

SHAPE = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}
GATE = 1.5
Step = Callable[[], None]


def model_of(shape: dict[str, int], dtype: torch.dtype) -> LlamaForCausalLM:
    """A random frozen model."""
    torch.manual_seed(0)
    config = LlamaConfig(**shape, attn_implementation="eager")
    return LlamaForCausalLM(config).to(dtype).eval().requires_grad_(False)


def sessions(batch: int, told: int, asked: int, reply: int, vocab: int) -> list[Session]:
    """Random sessions of equal lengths."""
    rng = random.Random(0)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(rng.randrange(vocab) for _ in range(count))

    heard = [Request(ids(told), told - 4) for _ in range(batch)]
    return [Session((r,), Request(ids(asked), asked - reply), (False,) * reply) for r in heard]


def optimizer_step(parameters: list[torch.nn.Parameter], loss: Callable[[], torch.Tensor]) -> Step:
    """A whole step: loss, backward pass, clipping, AdamW."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-6)

    def step() -> None:
        optimizer.zero_grad()
        loss().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()

    return step


def delta_step(some: list[Session], shape: dict[str, int], dtype: torch.dtype) -> tuple[Step, int, tuple[int, ...]]:
    """A step of the preset ``small``; its parameters, and the layers that it sits in."""
    recipe = recipe_of("small", state_only=1.0, keep=0.0)
    model = model_of(shape, dtype)
    config = recipe.adapter_config(shape["num_hidden_layers"])
    parameters = list(trainable_adapter(model, config).values())
    runner, rng = SessionRunner(model, recipe.chunk_tokens), random.Random(0)
    step = optimizer_step(parameters, lambda: memory_loss(runner, recipe, rng, some).loss)
    return step, sum(p.numel() for p in parameters), config.target_layers


def lora_step(
    some: list[Session], shape: dict[str, int], dtype: torch.dtype, size: int, layers: tuple[int, ...]
) -> tuple[Step, int]:
    """A step of a LoRA adapter with about ``size`` parameters in the same layers, and its parameters."""
    import peft

    per_rank = len(layers) * 2 * (shape["hidden_size"] * 2)
    config = peft.LoraConfig(
        r=round(size / per_rank), target_modules=["q_proj", "o_proj"], layers_to_transform=list(layers)
    )
    model = peft.get_peft_model(model_of(shape, dtype), config, autocast_adapter_dtype=False)
    parameters = [p for p in model.parameters() if p.requires_grad]
    rows = torch.tensor([[*s.told[0].ids, *s.asked.ids] for s in some])
    reply = len(some[0].asked.ids) - some[0].asked.reply
    inner = model.base_model.model

    def loss() -> torch.Tensor:
        hidden = inner.model(input_ids=rows, use_cache=False).last_hidden_state
        logits = inner.lm_head(hidden[:, -reply - 1 : -1].flatten(0, 1)).float()
        return F.cross_entropy(logits, rows[:, -reply:].flatten())

    return optimizer_step(parameters, loss), sum(p.numel() for p in parameters)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--told", type=int, default=48)
    parser.add_argument("--asked", type=int, default=48)
    parser.add_argument("--reply", type=int, default=10)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/train-step-<cpu|gpu>-<date>.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    dtype = getattr(torch, args.dtype)
    some = sessions(args.batch, args.told, args.asked, args.reply, SHAPE["vocab_size"])
    delta, size, layers = delta_step(some, SHAPE, dtype)
    lora, lora_size = lora_step(some, SHAPE, dtype, size, layers)
    steps, cpu, wall = {"delta": delta, "lora": lora}, {"delta": [], "lora": []}, {"delta": [], "lora": []}
    for step in steps.values():
        step()  # warm-up
    for _ in range(args.rounds):
        for name, step in steps.items():
            before = time.process_time(), time.perf_counter()
            step()
            cpu[name].append(time.process_time() - before[0])
            wall[name].append(time.perf_counter() - before[1])
    figures = {name: median_and_range(values) for name, values in cpu.items()}
    ratio = figures["delta"][0] / figures["lora"][0]
    tokens = args.batch * (args.told + args.asked)
    for name, (middle, low, high) in figures.items():
        print(f"{name}: {middle:.2f} CPU s a step ({low:.2f}-{high:.2f}), {tokens / middle:.0f} tokens/s")
    print(f"ratio {ratio:.2f}, at most {GATE}; parameters {size} and {lora_size}")
    if args.save:
        head = record.about("a training step of a δ-mem adapter and of LoRA", "python -m benchmarks.recall_real.step")
        head["machine"]["threads"] = torch.get_num_threads()
        report = head | {
            "settings": vars(args),
            "layers": layers,
            "parameters": {"delta": size, "lora": lora_size},
            "cpu_seconds": cpu,
            "wall_seconds": wall,
            "ratio": ratio,
            "gate": GATE,
            "passed": ratio <= GATE,
        }
        path = record.save(report, "train-step")
        print(f"kept in {path.relative_to(record.ROOT)}")
    if ratio > GATE:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
