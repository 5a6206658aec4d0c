"""Tokens of rows, and batches in which rows share their common prefix, so that nothing is computed twice or padded.

All prompts of a chat template begin alike: with the system's message, often with a longer instruction. A batch is one
sequence: that prefix once, then what is each row's own, with positions that go on behind the prefix and a mask in which
a row sees the prefix and itself. Loss and gradients are those of padded rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mem_triton.systems.memo.training.rows import Row, RowError

IGNORED = -100
"""The label of tokens without a loss."""
LONGEST = 4096
"""Tokens of a packed sequence; its mask has their square."""


@dataclass(frozen=True)
class Tokens:
    """The ids of a row; ``answer`` of them, at the end, are trained."""

    ids: tuple[int, ...]
    answer: int


def tokens_of(tokenizer: Any, row: Row, most: int) -> Tokens:
    """The row as a server's chat template renders its prompt, and the answer with the end of its turn.

    Raises RowError for a row of more than ``most`` tokens, and for templates that render an answer in another way than
    they ask for one.
    """
    prompt = tokenizer.apply_chat_template(row.messages, add_generation_prompt=True, tokenize=False)
    whole = tokenizer.apply_chat_template([*row.messages, {"role": "assistant", "content": row.answer}], tokenize=False)
    if not whole.startswith(prompt):
        raise RowError(
            f"{row.where}: this model's chat template does not continue its own generation prompt with the answer, so "
            "what is trained would not be what is asked; give a template that does (tokenizer.chat_template)"
        )
    head = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    answer = tokenizer(whole[len(prompt) :].rstrip(), add_special_tokens=False)["input_ids"]
    if len(head) + len(answer) > most:
        raise RowError(f"{row.where}: has {len(head) + len(answer)} tokens, at most {most}: cut it, or --most-tokens")
    return Tokens((*head, *answer), len(answer))


def packs(model: PreTrainedModel) -> bool:
    """Whether every layer of a model attends to what its mask says, so that rows can lie in one sequence.

    Its attention becomes torch's own then: others take no such mask, or take it for numbers to add.
    """
    text = model.config.get_text_config()
    kinds = getattr(text, "layer_types", None) or ["full_attention"]
    if set(kinds) != {"full_attention"} or getattr(text, "sliding_window", None) or not model._supports_sdpa:
        return False
    model.set_attn_implementation("sdpa")
    return True


def packed(rows: Sequence[Tokens]) -> dict[str, Tensor] | None:
    """One sequence [1, T] with labels, positions and a mask [1, 1, T, T]; None if it would be too long."""
    shared = min(min(len(row.ids) - row.answer for row in rows), _common([row.ids for row in rows])) - 1
    if shared < 1 or len(rows) == 1:
        shared = 0
    total = shared + sum(len(row.ids) - shared for row in rows)
    if total > LONGEST:
        return None
    ids, labels, positions, owner = list(rows[0].ids[:shared]), [IGNORED] * shared, list(range(shared)), [0] * shared
    for number, row in enumerate(rows, 1):
        own = len(row.ids) - shared
        ids += row.ids[shared:]
        labels += [*[IGNORED] * (own - row.answer), *row.ids[len(row.ids) - row.answer :]]
        positions += range(shared, len(row.ids))
        owner += [number] * own
    whose = torch.tensor(owner)
    seen = (whose[:, None] == whose) | (whose == 0)
    return {
        "input_ids": torch.tensor([ids]),
        "labels": torch.tensor([labels]),
        "position_ids": torch.tensor([positions]),
        "attention_mask": seen.tril()[None, None],
    }


def padded(rows: Sequence[Tokens], fill: int) -> dict[str, Tensor]:
    """Rows [B, T] filled up at their right ends."""
    longest = max(len(row.ids) for row in rows)
    ids = [[*row.ids, *[fill] * (longest - len(row.ids))] for row in rows]
    labels = [
        [*[IGNORED] * (len(row.ids) - row.answer), *row.ids[-row.answer :], *[IGNORED] * (longest - len(row.ids))]
        for row in rows
    ]
    mask = [[1] * len(row.ids) + [0] * (longest - len(row.ids)) for row in rows]
    return {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels), "attention_mask": torch.tensor(mask)}


def _common(rows: Sequence[tuple[int, ...]]) -> int:
    """How many tokens all rows begin with alike."""
    low, high = min(rows), max(rows)
    same = next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), min(len(low), len(high)))
    return min(same, *(len(row) for row in rows))
