"""Recall of the model and its adapter on held-out names, by where the evidence is; a table, and JSON under results/::

    python -m benchmarks.recall.evaluate --save

An answer counts if greedy decoding gives exactly "It is <value>.<|im_end|>" and, in a session, said exactly "Noted." to
what was told. One question a session, so that questions are independent; a third of the facts repeat a name of the
session with another attribute. Intervals: Wilson, 95 %.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast, Qwen3ForCausalLM

from benchmarks.common import record
from benchmarks.common.statistics import wilson
from benchmarks.recall import data
from benchmarks.recall.chat import ask, asking, in_context, reply_tokens, tell, telling
from mem_triton.systems.delta_mem import load_adapter
from mem_triton_transformers import (
    apply_mem_triton,
    get_memory,
    remove_mem_triton,
    reset_memory,
    set_memory,
    set_memory_write,
)

HERE = Path(__file__).parent
COMMAND = "python -m benchmarks.recall.evaluate"
COUNTS = (1, 2, 4, 8, 16)
STOCK = ("in context", "nowhere")
MEMORY = (
    "in context, memory on",
    "state, read only",
    "state, writing",
    "state, told in 3 requests",
    "memory reset",
    "another's memory",
)
SHARED = 1 / 3  # share of facts that repeat a name with another attribute
BATCH = 64


def load(model: Path = HERE / "model") -> tuple[Qwen3ForCausalLM, PreTrainedTokenizerFast]:
    """The shipped model without memory, in fp32, and its tokenizer."""
    return Qwen3ForCausalLM.from_pretrained(model, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(model)


@torch.inference_mode()
def right_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    where: str,
    n: int,
    sessions: int,
    seed: int,
    shared: float = SHARED,
) -> int:
    """How many of ``sessions`` questions are answered right. where: one of STOCK (no memory on the model) or MEMORY."""
    rng, right = random.Random(f"{seed} {n}"), 0  # all conditions see the same facts
    for begin in range(0, sessions, BATCH):
        rows = [data.draw(rng, n, data.HELD_OUT, shared) for _ in range(min(BATCH, sessions - begin))]
        chosen = [rng.choice(row) for row in rows]
        seeds = [rng.random() for _ in range(2 * len(rows))]
        pairs = [asking(fact, s) for fact, s in zip(chosen, seeds, strict=False)]
        told = [telling(row, s) for row, s in zip(rows, seeds[len(rows) :], strict=True)]
        if where in ("in context", "in context, memory on"):
            pairs = [in_context(text, pair) for text, pair in zip(told, pairs, strict=True)]
        served = torch.ones(len(rows), dtype=torch.bool)
        if where in MEMORY:
            served = remember(model, tokenizer, where, rows, told, random.Random(f"{seed} {n} {begin}"))
        logits, answers = ask(model, tokenizer, pairs)
        right += int(((logits.argmax(-1) == answers).all(1) & served).sum())
    return right


def remember(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    where: str,
    rows: list[list[data.Fact]],
    told: list[str],
    rng: random.Random,
) -> torch.Tensor:
    """Bring the memory into the state in which the question of ``right_answers`` finds it.

    Returns the rows [B] in which greedy decoding gives the expected reply, so that a server would write the same.
    """
    reset_memory(model)
    set_memory_write(model, True)
    if where == "in context, memory on":
        return torch.ones(len(rows), dtype=torch.bool)
    parts = [told]
    if where == "state, told in 3 requests":
        n = len(rows[0])
        cuts = sorted({0, n // 3, 2 * n // 3, n})
        parts = [[telling(row[a:b], rng.random()) for row in rows] for a, b in itertools.pairwise(cuts)]
    served = torch.ones(len(rows), dtype=torch.bool)
    for texts in parts:
        served &= (tell(model, tokenizer, texts).argmax(-1) == reply_tokens(tokenizer)).all(1)
    if where == "memory reset":
        reset_memory(model)
    if where == "another's memory":
        set_memory(model, {name: state.roll(1, 0) for name, state in get_memory(model).items()})
    if where in ("memory reset", "another's memory"):
        served[:] = True  # a control is not helped by a bad reply
    set_memory_write(model, where != "state, read only")
    return served


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    adapter: Path,
    sessions: int,
    seeds: list[int],
    counts: tuple[int, ...] = COUNTS,
) -> dict[str, dict[int, list[int]]]:
    """Right answers per seed, by condition and number of facts."""
    found: dict[str, dict[int, list[int]]] = {}
    for where in (*STOCK, *MEMORY):
        if where == MEMORY[0]:
            apply_mem_triton(model, {"delta": {"adapter": str(adapter)}})
        found[where] = {n: [right_answers(model, tokenizer, where, n, sessions, s) for s in seeds] for n in counts}
    name = "state, one name twice"
    found[name] = {
        n: [right_answers(model, tokenizer, "state, read only", n, sessions, s, shared=1.0) for s in seeds]
        for n in counts
        if 1 < n <= len(data.ATTRIBUTES)
    }
    remove_mem_triton(model)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=HERE / "model")
    parser.add_argument("--adapter", type=Path, default=HERE / "adapter")
    parser.add_argument("--sessions", type=int, default=128, help="per cell and seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[101, 102, 103])
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/recall-<cpu|gpu>-<date>.json")
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    head, begin = record.about("recall of held-out names, by where the evidence is", COMMAND), time.time()
    model, tokenizer = load(args.model)
    found = evaluate(model, tokenizer, args.adapter, args.sessions, args.seeds)
    asked = args.sessions * len(args.seeds)
    title = f"Recall of held-out names in %, {asked} sessions per cell (95 % interval)"
    table = Table("evidence", *(f"{n} fact{'s' * (n > 1)}" for n in COUNTS), title=title)
    cells = {}
    for where, by_count in found.items():
        shown = []
        for n in COUNTS:
            if n not in by_count:
                shown.append("")
                continue
            low, high = wilson(sum(by_count[n]), asked)
            share = sum(by_count[n]) / asked
            cells[f"{where} / {n}"] = {
                "recall": share,
                "interval": [low, high],
                "right_per_seed": by_count[n],
                "asked_per_seed": args.sessions,
            }
            shown.append(f"{100 * share:.1f} ({100 * low:.1f}-{100 * high:.1f})")
        table.add_row(where, *shown)
    Console(width=130).print(table)
    if args.save:
        head["machine"]["threads"] = torch.get_num_threads()
        report = head | {
            "seconds": round(time.time() - begin),
            "seeds": args.seeds,
            "shared_names": SHARED,
            "adapter": load_adapter(args.adapter).fingerprint,
            "weights_sha256": record.digests(args.model),
            "cells": cells,
        }
        path = record.save(report, "recall")
        print(f"kept in {path.relative_to(record.ROOT)}")


if __name__ == "__main__":
    main()
