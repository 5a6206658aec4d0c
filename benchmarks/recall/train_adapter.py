"""Train the δ-mem adapter of the frozen recall model, through mem_triton_transformers. CPU, one thread::

    python -m benchmarks.recall.train_adapter --model benchmarks/recall/model --out benchmarks/recall/adapter

A session is one to three chats that tell facts, then two chats that ask for one each, with writes on or off at random.
Some batches also train the reply to what is told, and answers from context with memory on.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoTokenizer, Qwen3ForCausalLM

from benchmarks.recall import data
from benchmarks.recall.chat import ask, asking, in_context, reply_tokens, tell, telling
from benchmarks.recall.memory_init import memory_init
from mem_triton.systems.delta_mem import DeltaMemAdapter, DeltaMemConfig, load_adapter, save_adapter
from mem_triton_transformers import adapter_from, reset_memory, set_memory_write, trainable_adapter

LAYER = 1  # its input holds a whole fact at the full stop after the value, thanks to the look-back heads of layer 0
CONFIG = DeltaMemConfig(
    rank=16,
    alpha=16.0,
    num_state_heads=8,
    delta_heads=("q", "o"),
    target_layers=(LAYER,),
    beta_bias_init=-4.0,
    output_init="zero",
)
LADDER = (1, 2, 4, 8, 12)  # facts per session; the next step when 85 % of the values are right


def session(model, tokenizer, rng, n, batch, rounds, pool, shared, writes=None, replies=False):
    """Tell n facts in one to three requests, ask ``rounds`` times. Logits and answers of all questions, and of replies
    (None without ``replies``)."""
    told = [data.draw(rng, n, pool, shared) for _ in range(batch)]
    requests = rng.choice([1, 1, 2, 3])
    reset_memory(model)
    set_memory_write(model, True)
    cuts = sorted(rng.sample(range(1, n), min(requests - 1, n - 1))) if n > 1 else []
    said = None
    for a, b in zip([0, *cuts], [*cuts, n], strict=True):
        texts = [telling(row[a:b], rng.random()) for row in told]
        said = tell(model, tokenizer, texts, None if replies else LAYER + 1)
    results = []
    for _ in range(rounds):
        set_memory_write(model, rng.random() < 0.5 if writes is None else writes)
        results.append(ask(model, tokenizer, [asking(rng.choice(row), rng.random()) for row in told]))
    set_memory_write(model, True)
    logits, answers = zip(*results, strict=True)
    return torch.cat(logits), torch.cat(answers), said


def context(model, tokenizer, rng, n, batch):
    """Facts and a question in one chat, with memory on: what the model could do before must stay."""
    rows = [data.draw(rng, n, data.TRAINED, 1 / 3) for _ in range(batch)]
    reset_memory(model)
    pairs = [in_context(telling(r, rng.random()), asking(rng.choice(r), rng.random())) for r in rows]
    return *ask(model, tokenizer, pairs), None


@torch.no_grad()
def recall(model, tokenizer, n, questions, seed, shared=1 / 3, writes=None) -> float:
    """Share of held-out facts whose whole greedy answer is right, from the state alone."""
    rng, right, batch = random.Random(seed), 0, 64
    for _ in range(questions // batch):
        logits, answers, _ = session(model, tokenizer, rng, n, batch, 1, data.HELD_OUT, shared, writes)
        right += (logits.argmax(-1) == answers).all(1).sum().item()
    return right / (questions // batch * batch)


def trained_for_sessions(model: Qwen3ForCausalLM) -> DeltaMemAdapter:
    """What was trained so far. Asked outside a session, questions fare worse with it; so it is for sessions alone."""
    return replace(adapter_from(model), scope="sessions")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path(__file__).parent / "model")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--resume", type=Path)
    parser.add_argument("--seconds", type=float, default=460)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--most", type=int, default=1, choices=LADDER, help="facts at the start")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rng = random.Random(args.seed)
    model = Qwen3ForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    begin = time.time()
    if args.resume:
        parameters = trainable_adapter(model, load_adapter(args.resume))
    else:
        start = memory_init(model, tokenizer, CONFIG, LAYER, args.seed)
        parameters = trainable_adapter(model, CONFIG, args.seed)
        with torch.no_grad():
            for name, value in start.items():
                parameters[f"model.layers.{LAYER}.self_attn.{name}"].copy_(value)
    print(
        f"adapter parameters {sum(p.numel() for p in parameters.values())}, start after {time.time() - begin:.0f} s: "
        f"{[recall(model, tokenizer, k, 128, 9) for k in (1, 2, 4, 8)]}",
        flush=True,
    )
    optimizer = torch.optim.Adam(parameters.values(), lr=args.rate, betas=(0.9, 0.98))
    begin, step, right, most, history = time.time(), 0, 0.0, args.most, []
    while (elapsed := time.time() - begin) < args.seconds:
        rate = min(1, (step + 1) / 20) * min(1, max(0.03, (1 - elapsed / args.seconds) / 0.4))
        for group in optimizer.param_groups:
            group["lr"] = args.rate * rate
        n = most if rng.random() < 0.6 else rng.randint(1, most)
        batch = max(16, min(args.batch, args.batch * 8 // n))
        alone, replies = rng.random() < 0.85, rng.random() < 0.3
        if alone:
            shared = rng.choice([0.0, 1 / 3, 2 / 3])
            logits, answers, said = session(model, tokenizer, rng, n, batch, 2, data.TRAINED, shared, replies=replies)
        else:
            logits, answers, said = context(model, tokenizer, rng, n, batch // 2)
        loss = F.cross_entropy(logits.flatten(0, 1), answers.flatten(), reduction="none").view(answers.shape)
        loss = loss[:, 2].mean() + loss.mean()  # token 2 is the value; the others must stay as they are
        if said is not None:
            loss = loss + F.cross_entropy(said.flatten(0, 1), reply_tokens(tokenizer).repeat(len(said)))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        optimizer.step()
        step += 1
        if n == most and alone:
            right = 0.9 * right + 0.1 * (logits[:, 2].argmax(-1) == answers[:, 2]).float().mean().item()
        if right > 0.85 and most < LADDER[-1]:
            most, right = LADDER[LADDER.index(most) + 1], 0.0
            print(f"{elapsed:6.0f} s  step {step}  up to {most} facts", flush=True)
        if step % 25 == 0:
            print(f"{elapsed:6.0f} s  step {step}  n {n}  loss {loss.item():.3f}  right {right:.3f}", flush=True)
        if step % 100 == 0:
            history.append({k: recall(model, tokenizer, k, 128, 9) for k in (1, 2, 4, 8, 16)})
            print(f"{elapsed:6.0f} s  step {step}  held-out names, state alone: {history[-1]}", flush=True)
            save_adapter(trained_for_sessions(model), args.out)
    save_adapter(trained_for_sessions(model), args.out)
    final = {k: recall(model, tokenizer, k, 512, 10) for k in (1, 2, 4, 8, 16)}
    print(f"FINAL {time.time() - begin:.0f} s, {step} steps: {json.dumps(final)}", flush=True)


if __name__ == "__main__":
    main()
