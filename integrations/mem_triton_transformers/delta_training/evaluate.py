"""What held-out sessions are answered with one's own memory, with another session's, and with an empty one.

A loss can fall without any recall, because answers get the right form. Only the comparison shows whether the memory is
what answers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from mem_triton.systems.delta_mem.training.tokens import Session
from mem_triton_transformers.delta_training.forward import SessionRunner, another
from mem_triton_transformers.delta_training.losses import divergence
from mem_triton_transformers.runs.statistics import wilson

CONDITIONS = ("own", "another", "empty")
Counts = dict[str, Any]


@torch.no_grad()
def evaluate(
    runner: SessionRunner, sessions: Sequence[Session], rows: int, begun: Callable[[], None] = lambda: None
) -> dict[str, Counts]:
    """Per group of sessions and condition: sessions, exact replies with their 95 % interval, loss of recalled tokens.

    Sessions that tell nothing form the group "plain": perplexity of their replies frozen, with an empty and with
    another session's memory, and the divergence from frozen. rows: sessions of one call. begun: called before each
    batch. The question writes, as a server's does by default.
    """
    found: dict[str, Counts] = {}
    telling = [session for session in sessions if session.told]
    for group in sorted({session.group for session in telling}):
        some = [session for session in telling if session.group == group]
        totals = {name: {"sessions": 0, "exact": 0, "loss": 0.0, "tokens": 0} for name in CONDITIONS}
        for batch in _batches(some, rows):
            begun()
            asked = [session.asked for session in batch]
            only = torch.tensor([r for session in batch for r in session.recalled])
            states = runner.tell([session.told for session in batch])
            memories = {"own": states, "another": another(states), "empty": runner.zeros(len(batch))}
            if len(batch) == 1:
                del memories["another"]  # it would be its own
            for name, memory in memories.items():
                answers, total = runner.ask(asked, memory, write=True), totals[name]
                total["sessions"] += len(batch)
                total["exact"] += int(answers.exact(len(batch)).sum())
                total["loss"] += answers.losses().cpu()[only].sum().item()
                total["tokens"] += int(only.sum())
        found[group] = {name: _summary(total) for name, total in totals.items() if total["sessions"]}
    plain = [session for session in sessions if not session.told]
    if plain:
        found["plain"] = _plain(runner, plain, telling, rows, begun)
    return found


def _summary(total: Counts) -> Counts:
    low, high = wilson(total["exact"], total["sessions"])
    loss = total["loss"] / total["tokens"] if total["tokens"] else None
    return {
        "sessions": total["sessions"],
        "exact": total["exact"],
        "share": total["exact"] / total["sessions"],
        "interval": [low, high],
        "recalled_loss": loss,
    }


def _plain(
    runner: SessionRunner, plain: Sequence[Session], telling: Sequence[Session], rows: int, begun: Callable[[], None]
) -> Counts:
    sums = dict.fromkeys(("frozen", "empty", "another", "kl_empty", "kl_another"), 0.0)
    tokens = 0
    for i, batch in enumerate(_batches(plain, rows)):
        begun()
        asked = [session.asked for session in batch]
        frozen = runner.ask(asked, None, write=False)
        sums["frozen"] += frozen.losses().sum().item()
        tokens += len(frozen.labels)
        memories = {"empty": runner.zeros(len(batch))}
        if telling:
            told = [telling[(i * rows + j) % len(telling)].told for j in range(len(batch))]
            memories["another"] = runner.tell(told)
        for name, memory in memories.items():
            answers = runner.ask(asked, memory, write=True)
            sums[name] += answers.losses().sum().item()
            sums[f"kl_{name}"] += divergence(frozen.logits, answers.logits).item() * len(frozen.labels)
    shown = {name: math.exp(min(50.0, sums[name] / tokens)) for name in ("frozen", *memories)}
    return {
        "sessions": len(plain),
        "tokens": tokens,
        "perplexity": shown,
        "divergence": {name: sums[f"kl_{name}"] / tokens for name in memories},
    }


def _batches(sessions: Sequence[Session], rows: int) -> list[Sequence[Session]]:
    """Batches of at most so many, the last one not of a single session where that can be helped."""
    cuts = [sessions[i : i + rows] for i in range(0, len(sessions), rows)]
    if len(cuts) > 1 and len(cuts[-1]) == 1:
        cuts[-2:] = [[*cuts[-2], *cuts[-1]]]
    return cuts


def one_line(found: dict[str, Counts]) -> str:
    """An evaluation in a line: for each group the exact shares own / another's / empty."""
    parts = []
    for group, value in found.items():
        if group == "plain":
            shown = value["perplexity"]
            parts.append("plain perplexity " + " / ".join(f"{name} {shown[name]:.2f}" for name in shown))
        else:
            shares = " / ".join(f"{name} {100 * value[name]['share']:.0f} %" for name in value)
            loss = value["own"]["recalled_loss"]
            parts.append(f"{group or 'held out'}: {shares}" + (f" (loss {loss:.2f})" if loss is not None else ""))
    return "; ".join(parts)
