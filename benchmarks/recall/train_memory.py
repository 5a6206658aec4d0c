"""Continue training the recall model with explicit memory in its mix. CPU, one thread, about 10 minutes
of an idle core::

    python -m benchmarks.recall.train_memory --model benchmarks/recall/model --out /tmp/model-memory

Memory³ (arXiv 2407.01178, section 4): a model that never saw memory in training makes little of it. Batches: questions
whose evidence is in one of one to five references, read sparse (with the selection in the loop, hard or as a bias with
gradients), dense, as dense prefixes of all layers, or as text in the context; and the old task, with and without
references that do not matter.
The loss covers answers only.
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen3ForCausalLM

from benchmarks.recall import data
from benchmarks.recall.chat import END, asking, in_context, telling
from benchmarks.recall.explicit_data import library, telling_texts
from benchmarks.recall.train_base import STAGES, save
from benchmarks.recall.train_base import batch as context_batch
from benchmarks.recall.train_base import forward as context_forward
from benchmarks.recall.train_memory_forward import (
    KEEP,
    EncodedLayer,
    forward,
    requests_memory,
    sink,
    write,
    write_prefix,
)

LAYERS = (0, 1)  # the first half, Memory³'s choice; layer 1's full stops hold whole facts
PREFIX = "Reference:"
KINDS = {"sparse": 0.3, "soft": 0.2, "dense": 0.15, "prefix": 0.1, "text": 0.08, "context": 0.17}
READ = ("sparse", "dense", "prefix")
REFERENCES, QUESTIONS, MOST = 16, 48, 5


def written(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    kind: str,
    texts: list[str],
    rows: Tensor,
    sharpness: float = 4.0,
) -> dict[int, EncodedLayer]:
    """The memory of requests that read the texts ``rows[b]`` in one of the ways "sparse", "soft", "dense", "prefix"."""
    if kind == "prefix":
        return requests_memory(write_prefix(model, tokenizer, texts), {}, rows)
    prefix = tokenizer(PREFIX)["input_ids"]
    keep = None if kind == "dense" else KEEP
    references = write(model, tokenizer, texts, LAYERS, keep, prefix, sharpness if kind == "soft" else None)
    return requests_memory(references, sink(model, prefix), rows)


def answers(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    pairs: list[tuple[str, str]],
    memory: dict[int, EncodedLayer] | None,
) -> tuple[Tensor, Tensor]:
    """Logits [B, A, vocab] that predict each row's answer, and its tokens [B, A]."""
    prompts = tokenizer([prompt for prompt, _ in pairs])["input_ids"]
    right = torch.tensor(tokenizer([answer for _, answer in pairs])["input_ids"])
    rows = [prompt + answer[:-1] for prompt, answer in zip(prompts, right.tolist(), strict=True)]
    ids = tokenizer.pad({"input_ids": rows}, padding_side="right", return_tensors="pt").input_ids
    hidden, _ = forward(model, ids, memory)
    take = torch.tensor([len(prompt) - 1 for prompt in prompts])[:, None] + torch.arange(right.shape[1])
    return model.lm_head(hidden[torch.arange(len(rows))[:, None], take]), right


def memory_batch(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, rng: random.Random, kind: str, count: int = REFERENCES
) -> tuple[Tensor, Tensor]:
    """Questions to a library of references; each request reads the one that tells, and up to four others."""
    told, texts = library(rng, count, (1, rng.choice([2, 4, 4, 6])), data.TRAINED, rng.choice([0.0, 1 / 3, 2 / 3]))
    pairs, rows = [], torch.full((QUESTIONS, MOST), -1)
    inside = rng.random() < 0.12  # the facts are in the context, the references are about others
    for b in range(QUESTIONS // 3 if inside else QUESTIONS):
        gold, *others = rng.sample(range(count), rng.randint(1, MOST))
        asked = asking(rng.choice(told[gold]), rng.random())
        read = others if inside else rng.sample([gold, *others], len(others) + 1)
        pairs.append(in_context(telling(told[gold], rng.random()), asked) if inside else asked)
        rows[b, : len(read)] = torch.tensor(read, dtype=torch.long)
    memory = written(model, tokenizer, kind, texts, rows[: len(pairs)], rng.uniform(2, 8))
    return answers(model, tokenizer, pairs, memory)


def text_batch(tokenizer: PreTrainedTokenizerFast, rng: random.Random, size: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    """References as text, then six questions, each answered: ids, answers and values [B, T]."""
    texts, asked = [], []
    for _ in range(size):
        told, own = library(rng, rng.randint(1, MOST), (1, 4), data.TRAINED, rng.choice([0.0, 1 / 3, 2 / 3]))
        asked.append([rng.choice(rng.choice(told)) for _ in range(6)])
        texts.append(telling_texts(own) + END + "\n")
    ids = [tokenizer(text)["input_ids"] for text in texts]
    answer = [[False] * len(row) for row in ids]
    for row, flags, facts in zip(ids, answer, asked, strict=True):
        for fact in facts:
            for text, flag in zip(asking(fact, rng.random()), (False, True), strict=True):
                more = tokenizer(text)["input_ids"]
                row += more
                flags += [flag] * len(more)
            row += tokenizer("\n")["input_ids"]
            flags += [False] * (len(row) - len(flags))
    longest = max(map(len, ids))
    padded = torch.tensor([row + [tokenizer.pad_token_id] * (longest - len(row)) for row in ids])
    answered = torch.tensor([flags + [False] * (longest - len(flags)) for flags in answer])
    words = torch.tensor(tokenizer.convert_tokens_to_ids([f"Ġ{word}" for word in data.VALUES]))
    return padded, answered, answered & torch.isin(padded, words)


def context_loss(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, rng: random.Random, references: bool
) -> tuple[Tensor, float]:
    """Facts and questions in one chat, no memory: the old task, or references as text."""
    if references:
        ids, answer, values = text_batch(tokenizer, rng)
    else:
        n = rng.randint(1, 16)
        ids, answer, values = context_batch(rng, tokenizer, len(STAGES), n, 8, max(4, 160 // (n + 16)))
    logits, target = context_forward(model, ids, answer)
    loss = F.cross_entropy(logits, target, reduction="none")
    is_value = values[:, 1:][answer[:, 1:]]
    right = (logits.detach().argmax(-1) == target)[is_value].float().mean().item()
    return loss[is_value].mean() + 0.1 * loss[~is_value].mean(), right


@torch.no_grad()
def recall(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, kind: str, references: int, seed: int = 9
) -> float:
    """Share of 128 held-out questions, each to references of its own, whose whole greedy answer is right."""
    rng, right, size = random.Random(seed), 0, 32
    for _ in range(128 // size):
        pairs, texts = [], []
        for _ in range(size):
            told, own = library(rng, references, (1, 4))
            pairs.append(asking(rng.choice(rng.choice(told)), rng.random()))
            texts += own
        memory = written(model, tokenizer, kind, texts, torch.arange(len(texts)).view(size, references))
        logits, expected = answers(model, tokenizer, pairs, memory)
        right += int((logits.argmax(-1) == expected).all(1).sum())
    return right / 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path(__file__).parent / "model")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--rate", type=float, default=5e-4)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    model = Qwen3ForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    matrices = [p for n, p in model.named_parameters() if p.dim() == 2 and "embed" not in n]
    rest = [p for n, p in model.named_parameters() if p.dim() != 2 or "embed" in n]
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.rate, betas=(0.9, 0.98), fused=True)
    begin, shares = time.time(), dict.fromkeys(KINDS, 0.0)
    for step in range(1, args.steps + 1):
        rate = min(1, step / 30) * min(1, max(0.03, (1 - step / args.steps) / 0.4))
        for group in optimizer.param_groups:
            group["lr"] = args.rate * rate
        kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
        if kind in ("context", "text"):
            loss, right = context_loss(model, tokenizer, rng, kind == "text")
        else:
            logits, expected = memory_batch(model, tokenizer, rng, kind)
            each = F.cross_entropy(logits.flatten(0, 1), expected.flatten(), reduction="none").view(expected.shape)
            loss = each[:, 2].mean() + 0.2 * each.mean()  # token 2 is the value
            right = (logits.detach()[:, 2].argmax(-1) == expected[:, 2]).float().mean().item()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        elapsed = time.time() - begin
        shares[kind] = 0.9 * shares[kind] + 0.1 * right
        if step % 25 == 0:
            shown = "  ".join(f"{name} {share:.3f}" for name, share in shares.items())
            print(f"{elapsed:6.0f} s  step {step}  loss {loss.item():.3f}  right: {shown}", flush=True)
        if step % 200 == 0:
            found = {kind: recall(model, tokenizer, kind, 3) for kind in READ}
            print(f"{elapsed:6.0f} s  step {step}  held-out names, 3 references: {found}", flush=True)
            save(model, tokenizer, args.out)
    save(model, tokenizer, args.out)
    found = {f"{kind} / {r}": recall(model, tokenizer, kind, r, 10) for kind in READ for r in (1, 3, 5)}
    print(f"FINAL {time.time() - begin:.0f} s, {args.steps} steps: {found}", flush=True)


if __name__ == "__main__":
    main()
