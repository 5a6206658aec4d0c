"""Train the base model to answer from context. CPU, one thread, about 20 minutes::

    python -m benchmarks.recall.train_base --out benchmarks/recall/model

Stages of growing templates, the next one when 90 % of the answers are right; the last is the chat format.
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import GenerationConfig, Qwen3ForCausalLM

from benchmarks.recall import data
from benchmarks.recall.init import induction_init, recall_config
from benchmarks.recall.tokenizer import train_tokenizer

# (fact forms, question forms with answer); "{v}" in a question marks the answer
STAGES = [
    ([" {name} {value}."], [" {name} {value}."]),
    ([" {name} is {value}.", " {name} = {value}."], [" {name}? {value}.", " {name} is {value}."]),
    (
        [" {name} is {value}.", " The {name} is {value}."],
        [" {name}? It is {value}.", " What is {name}? It is {value}."],
    ),
    (
        [" {name}'s {attribute} is {value}.", " of {name} is {value}.", " {attribute} of {name} is {value}."],
        [" {name}? It is {value}.", " {name}'s {attribute}? It is {value}.", " {attribute} of {name}? It is {value}."],
    ),
    ([" " + f for f in data.FACT_FORMS], [f" {q} It is {{value}}." for q in data.QUESTION_FORMS]),
]


# attributes by themselves: without these the model matches names and never learns to tell attributes apart
ATTRIBUTES_ONLY = (
    [" {attribute} is {value}.", " The {attribute} is {value}.", " Note that {attribute} is {value}."],
    [
        " {attribute}? It is {value}.",
        " What is the {attribute}? It is {value}.",
        " Tell me the {attribute}? It is {value}.",
    ],
)


def plain_text(rng, told, asked, forms):
    """One training text without chat markers, and the character spans of its answers."""
    told_forms, asked_forms = forms
    text, spans = "", []
    for fact in told:
        text += rng.choice(told_forms).format(**vars(fact))
    for fact in asked:
        form = rng.choice(asked_forms)
        text += form.format(**vars(fact))
        end = len(text) - 1
        spans.append((end - len(fact.value) - 1, end))
    return text, spans


def chat_text(rng, told, asked):
    """One training text in the chat format: facts in one or several messages, then questions, each answered."""
    turns, spans = [], []
    cuts = (
        sorted(rng.sample(range(1, len(told)), min(rng.choice([0, 0, 0, 1, 2]), len(told) - 1)))
        if len(told) > 1
        else []
    )
    for a, b in zip([0, *cuts], [*cuts, len(told)], strict=True):
        turns.append(("user", data.fact_message(told[a:b], rng.random())))
        turns.append(("assistant", data.REPLY))
    for fact in asked:
        turns += [("user", data.question(fact, rng.random())), ("assistant", data.ANSWER.format(value=fact.value))]
    text = ""
    for role, content in turns:
        start = len(text) + len(f"<|im_start|>{role}\n")
        text += f"<|im_start|>{role}\n{content}<|im_end|>\n"
        if role == "assistant":
            spans.append((start, start + len(content) + len("<|im_end|>")))
    return text, spans


def batch(rng, tokenizer, stage, n, m, size):
    """ids [B, T], loss weights [B, T] of predicting each token, value mask [B, T]."""
    texts, all_spans = [], []
    attributes_only = stage in (3, 4) and rng.random() < 0.35
    shared = rng.choice([0.0, 0.4, 1.0]) if stage >= 4 else 0.0
    n = min(n, len(data.ATTRIBUTES)) if attributes_only or shared == 1.0 else n
    for _ in range(size):
        told = data.draw(rng, n, data.TRAINED, 1.0 if attributes_only else shared)
        asked = [rng.choice(told) for _ in range(m)]
        if stage == len(STAGES):
            text, spans = chat_text(rng, told, asked)
        else:
            text, spans = plain_text(rng, told, asked, ATTRIBUTES_ONLY if attributes_only else STAGES[stage])
        texts.append(text)
        all_spans.append(spans)
    encoded = tokenizer(texts, return_offsets_mapping=True, padding=True, return_tensors="pt")
    ids, starts = encoded.input_ids, encoded.offset_mapping[..., 0]
    answer = torch.zeros(ids.shape, dtype=torch.bool)
    for row, spans in enumerate(all_spans):
        for a, b in spans:
            answer[row] |= (starts[row] >= a) & (starts[row] < b)
    words = torch.tensor(tokenizer.convert_tokens_to_ids([f"Ġ{word}" for word in data.VALUES]))
    values = answer & torch.isin(ids, words)
    return ids, answer & (encoded.attention_mask > 0), values


def forward(model, ids, positions):
    """Logits that predict the tokens at ``positions`` (bool [B, T]), and those tokens."""
    hidden = model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
    take = positions[:, 1:]
    return model.lm_head(hidden[take]), ids[:, 1:][take]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=1200)
    parser.add_argument("--resume", type=Path)
    parser.add_argument("--stage", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    tokenizer = train_tokenizer()
    model = Qwen3ForCausalLM(recall_config(len(tokenizer), tokenizer.eos_token_id))
    induction_init(model, args.seed)
    if args.resume:
        model = Qwen3ForCausalLM.from_pretrained(args.resume)
    print(f"vocab {len(tokenizer)}, parameters {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M", flush=True)
    matrices = [p for n, p in model.named_parameters() if p.dim() == 2 and "embed" not in n]
    rest = [p for n, p in model.named_parameters() if p.dim() != 2 or "embed" in n]
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.98), fused=True)
    begin, stage, step, right, tokens, most = time.time(), args.stage, 0, 0.0, 0, 8
    last = len(STAGES)
    while (elapsed := time.time() - begin) < args.seconds:
        fraction = elapsed / args.seconds
        rate = min(1, (step + 1) / 30) * min(1, max(0.05, (1 - fraction) / 0.3))
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * rate
        now = stage if rng.random() < 0.6 else rng.randint(0, stage)
        n = rng.randint(2, most) if rng.random() < 0.9 else 1
        m = 8
        ids, answer, values = batch(rng, tokenizer, now, n, m, max(4, 160 // (n + 2 * m)))
        logits, target = forward(model, ids, answer)
        loss = F.cross_entropy(logits, target, reduction="none")
        is_value = values[:, 1:][answer[:, 1:]]
        loss = loss[is_value].mean() + (0.1 * loss[~is_value].mean() if (~is_value).any() else 0.0)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step, tokens = step + 1, tokens + ids.numel()
        accuracy = (logits.detach().argmax(-1) == target)[is_value].float().mean().item()
        if now == stage and n > 1:
            right = 0.95 * right + 0.05 * accuracy
        if right > 0.9 and stage < last:
            stage, right = stage + 1, 0.0
            print(f"{elapsed:6.0f} s  step {step}  stage {stage}", flush=True)
        elif right > 0.97 and stage == last and most < 16:
            most, right = 16, 0.5
            print(f"{elapsed:6.0f} s  step {step}  up to {most} facts", flush=True)
        if step % 50 == 0:
            print(
                f"{elapsed:6.0f} s  step {step}  stage {stage}  loss {loss.item():.3f}  right {right:.3f}  "
                f"{tokens / max(elapsed, 1):.0f} tokens/s",
                flush=True,
            )
        if step % 400 == 0:
            save(model, tokenizer, args.out)
    save(model, tokenizer, args.out)


def save(model, tokenizer, out: Path) -> None:
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=0, do_sample=False)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    main()
