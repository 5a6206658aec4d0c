"""Replies to many prompts at once, also behind trained keys and values, which take the places before the prompt."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

AT_ONCE = 16
"""Prompts of a forward call."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn: temperature, the share of the probability that is drawn from (top-p), a seed."""

    temperature: float
    top_p: float
    seed: int


@torch.no_grad()
def reply_all(
    model: Any,
    prompts: Sequence[Sequence[int]],
    most_tokens: int,
    ends: Collection[int],
    sampling: Sampling | None = None,
    prefix: Callable[[int], Any] | None = None,
    prefix_tokens: int = 0,
) -> list[list[int]]:
    """Decode a reply to each prompt; greedily without ``sampling``. The token that ends a reply is part of it.

    prefix: a cache of ``prefix_tokens`` keys and values for so many rows, None for none.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    replies: list[list[int]] = [[] for _ in prompts]
    draw = torch.Generator().manual_seed(sampling.seed) if sampling else None
    for first in range(0, len(order), AT_ONCE):
        rows = order[first : first + AT_ONCE]
        found = _some(model, [prompts[i] for i in rows], most_tokens, ends, sampling, draw, prefix, prefix_tokens)
        for i, reply in zip(rows, found, strict=True):
            replies[i] = reply
    return replies


def _some(
    model: Any,
    prompts: Sequence[Sequence[int]],
    most_tokens: int,
    ends: Collection[int],
    sampling: Sampling | None,
    draw: torch.Generator | None,
    prefix: Callable[[int], Any] | None,
    before: int,
) -> list[list[int]]:
    count, longest, device = len(prompts), max(map(len, prompts)), model.device
    ids = torch.zeros(count, longest, dtype=torch.long)
    mask = torch.zeros(count, before + longest, dtype=torch.long)
    mask[:, :before] = 1
    for row, prompt in enumerate(prompts):  # padded on the left, so that all replies begin at one place
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, before + longest - len(prompt) :] = 1
    positions = before + (mask[:, before:].cumsum(-1) - 1).clamp_min(0)
    cache = prefix(count) if prefix else None
    replies: list[list[int]] = [[] for _ in prompts]
    over = [False] * count
    for _ in range(most_tokens):
        out = model(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            position_ids=positions.to(device),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache = out.past_key_values
        chosen = _chosen(out.logits[:, -1].float().cpu(), sampling, draw)
        for row, token in enumerate(chosen.tolist()):
            if not over[row]:
                replies[row].append(token)
                over[row] = token in ends
        if all(over):
            break
        ids, positions = chosen[:, None], positions[:, -1:] + 1
        mask = torch.cat([mask, torch.ones(count, 1, dtype=torch.long)], 1)
    return replies


def _chosen(logits: Tensor, sampling: Sampling | None, draw: torch.Generator | None) -> Tensor:
    if sampling is None:
        return logits.argmax(-1)
    ordered, tokens = (logits / sampling.temperature).softmax(-1).sort(-1, descending=True)
    ordered[ordered.cumsum(-1) - ordered > sampling.top_p] = 0
    return tokens.gather(1, torch.multinomial(ordered, 1, generator=draw))[:, 0]
