"""Replies to many prompts at once, by transformers' own ``generate``."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch

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
    model: Any, prompts: Sequence[Sequence[int]], most_tokens: int, sampling: Sampling | None = None
) -> list[list[int]]:
    """Decode a reply to each prompt; greedily without ``sampling``. The token that ends a reply is part of it.

    model: one of transformers, or of peft with trained keys and values, which stand before each prompt then.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    replies: list[list[int]] = [[] for _ in prompts]
    options: dict[str, Any] = {"do_sample": False}
    if sampling is not None:
        options = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
    ends = _ends(model)
    with torch.random.fork_rng(enabled=sampling is not None):
        if sampling is not None:
            torch.manual_seed(sampling.seed)
        for first in range(0, len(order), AT_ONCE):
            rows = order[first : first + AT_ONCE]
            longest = max(len(prompts[i]) for i in rows)
            ids = torch.zeros(len(rows), longest, dtype=torch.long)
            for row, i in enumerate(rows):  # padded on the left, so that all replies begin at one place
                ids[row, longest - len(prompts[i]) :] = torch.tensor(prompts[i])
            mask = torch.arange(longest) >= longest - torch.tensor([[len(prompts[i])] for i in rows])
            ids, mask = ids.to(model.device), mask.long().to(model.device)
            out = model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=most_tokens, pad_token_id=0, **options
            )
            for i, reply in zip(rows, out[:, longest:].tolist(), strict=True):
                replies[i] = reply[: next((n for n, token in enumerate(reply, 1) if token in ends), None)]
    return replies


def _ends(model: Any) -> Collection[int]:
    found = model.generation_config.eos_token_id
    return found if isinstance(found, list) else [] if found is None else [found]
