"""What an adapter of a real chat model recalls from the state alone, and what it costs; JSON under results/::

    python -m benchmarks.recall_real.evaluate MODEL ADAPTER --save

Recall: held-out names, the model's own (frozen, greedy) reply to what was told, 1, 2, 4 and 8 facts; greedy decoding
must give the reply "The <attribute> of <name> is <value>." exactly, or, counted beside it, name the value alone. Beside
it another session's memory and an empty one. Cost: perplexity of ordinary text, and answers to the same questions with
the facts in the prompt, frozen and with the adapter on. Intervals: Wilson, 95 %.
"""

from __future__ import annotations

import argparse
import math
import pydoc_data.topics
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.common import record
from benchmarks.common.statistics import wilson
from benchmarks.recall import data
from benchmarks.recall_real.conversations import STAGES, session
from mem_triton.systems.delta_mem import load_adapter
from mem_triton.systems.delta_mem.training.conversations import Conversation, read_conversation
from mem_triton.systems.delta_mem.training.tokens import Session, session_of
from mem_triton_transformers import reset_memory, set_memory_write, trainable_adapter
from mem_triton_transformers.delta_training.evaluate import evaluate
from mem_triton_transformers.delta_training.forward import SessionRunner
from mem_triton_transformers.delta_training.replies import with_replies
from mem_triton_transformers.delta_training.run import load

TEXTS = ("with", "exceptions", "assignment", "class", "import", "strings")
"""Pages of Python's manual, which the standard library carries."""
TOKENS = 512


def held_out(model: Any, tokenizer: Any, sessions: int, seed: int, reply_tokens: int) -> list[Session]:
    """Sessions of held-out names for each number of facts, in tokens, with the model's own replies."""
    rng = random.Random(seed)
    stages = [i for i, (_, values) in enumerate(STAGES) if values == len(data.VALUES)]
    rows = [read_conversation(session(rng, i, data.HELD_OUT, 1.0), "held out") for i in stages for _ in range(sessions)]
    with tempfile.TemporaryDirectory() as folder:
        found: list[Conversation] = with_replies(model, tokenizer, rows, reply_tokens, Path(folder) / "replies.jsonl")
    return [session_of(tokenizer, row, 2048, 8192) for row in found]


@torch.no_grad()
def perplexity(model: Any, tokenizer: Any, on: bool) -> dict[str, float]:
    """Perplexity of each text: with the adapter off, or on with an empty memory that the text itself fills."""
    found = {}
    for name in TEXTS:
        ids = tokenizer(pydoc_data.topics.topics[name], return_tensors="pt").input_ids[:, :TOKENS].to(model.device)
        reset_memory(model)
        set_memory_write(model, on)
        loss = F.cross_entropy(model(ids).logits[0, :-1].float(), ids[0, 1:])
        found[name] = math.exp(loss.item())
    return found


def in_context(runner: SessionRunner, tokenizer: Any, some: list[Session], on: bool, rows: int) -> int:
    """How many questions are answered right by the first 24 greedy tokens with the facts in the prompt."""
    right = 0
    for begin in range(0, len(some), rows):
        batch = some[begin : begin + rows]
        prompts = [s.context.ids[: s.context.reply] for s in batch]
        longest = max(map(len, prompts))
        ids = torch.tensor([[runner.pad] * (longest - len(p)) + list(p) for p in prompts], device=runner.device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=runner.device)
        reset_memory(runner.model)
        set_memory_write(runner.model, on)
        with torch.no_grad():
            out = runner.model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=24, do_sample=False, pad_token_id=runner.pad
            )
        for s, text in zip(batch, tokenizer.batch_decode(out[:, longest:], skip_special_tokens=True), strict=True):
            answer = tokenizer.decode(s.asked.ids[s.asked.reply :], skip_special_tokens=True)
            value = answer.strip().rstrip(".").split()[-1]
            right += data.is_correct(text, data.Fact("", "", value))
    return right


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("adapter", type=Path)
    parser.add_argument("--sessions", type=int, default=64, help="for each number of facts")
    parser.add_argument("--context", type=int, default=32, help="questions from context, for each number of facts")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--seed", type=int, default=1001)
    parser.add_argument("--reply-tokens", type=int, default=24)
    parser.add_argument(
        "--save", action="store_true", help="write benchmarks/results/real-recall-<cpu|gpu>-<date>.json"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    head, begin = (
        record.about("recall of a real chat model's adapter", "python -m benchmarks.recall_real.evaluate"),
        time.time(),
    )
    model, tokenizer = load(args.model, "auto", None)
    model.set_attn_implementation("eager")
    sessions = held_out(model, tokenizer, args.sessions, args.seed, args.reply_tokens)
    adapter = load_adapter(args.adapter)
    trainable_adapter(model, adapter)
    runner = SessionRunner(model, 4096, tokenizer.pad_token_id or 0)
    found = evaluate(runner, sessions, args.rows)
    for group, value in found.items():
        shares = {
            n: f"{100 * v['share']:.1f} ({100 * v['interval'][0]:.1f}-{100 * v['interval'][1]:.1f})"
            for n, v in value.items()
        }
        print(f"{group}: {shares}", flush=True)
    texts = {"frozen": perplexity(model, tokenizer, False), "adapter": perplexity(model, tokenizer, True)}
    means = {k: math.exp(sum(map(math.log, v.values())) / len(v)) for k, v in texts.items()}
    print(f"perplexity of ordinary text: {means}, {100 * (means['adapter'] / means['frozen'] - 1):+.2f} %", flush=True)
    context = {}
    for group in found:
        some = [s for s in sessions if s.group == group][: args.context]
        context[group] = {
            name: {
                "right": (n := in_context(runner, tokenizer, some, on, args.rows)),
                "asked": len(some),
                "interval": wilson(n, len(some)),
            }
            for name, on in (("frozen", False), ("adapter", True))
        }
        print(f"in context, {group}: { {k: v['right'] for k, v in context[group].items()} } of {len(some)}", flush=True)
    if args.save:
        report = head | {
            "seconds": round(time.time() - begin),
            "settings": {k: str(v) for k, v in vars(args).items()},
            "adapter": adapter.fingerprint,
            "weights_sha256": record.digests(args.model),
            "recall": found,
            "perplexity": texts,
            "perplexity_mean": means,
            "in_context": context,
        }
        path = record.save(report, "real-recall")
        print(f"kept in {path.relative_to(record.ROOT)}")


if __name__ == "__main__":
    main()
