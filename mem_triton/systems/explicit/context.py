"""Counts how much of a model's context a request's memory takes: what it names lies before its text.

RoPE is relative and memory lies at negative positions, so an engine never sees it in a prompt's length. A model that
was trained on C tokens reads C at once, whichever of them are memory. Sparse references count the tokens they keep.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

from mem_triton.store.pool.fitting import fitting
from mem_triton.store.pool.plan import Attachment


def named_tokens(plan: Sequence[Attachment], tokens: Mapping[str, int]) -> int:
    """Tokens of the entries that every token of a request sees: those that it names, and the default ones."""
    return sum(tokens[ref] for ref in {a.ref for a in plan if a.score is None})


def beyond(memory: int, prompt: int, context: int) -> str | None:
    """Why so much named memory does not fit with a prompt and one token of an answer; None if it does."""
    if not memory or memory + prompt + 1 <= context:
        return None
    return (
        f"the entries have {memory} tokens, which with a prompt of {prompt} and an answer exceed the model's context "
        f"of {context} tokens; name fewer or shorter ones"
    )


def within(plan: Sequence[Attachment], tokens: Mapping[str, int], room: int) -> tuple[Attachment, ...]:
    """The plan without the retrieved references that some token would see beyond ``room`` tokens; named ones stay."""
    return fitting(plan, tokens.__getitem__, window=1, table_pages=room, pool_pages=sys.maxsize)


def answer_limit(asked: int | None, memory: int, prompt: int, context: int) -> tuple[int, str | None]:
    """Tokens that an answer may have, and why they are fewer than asked for because of memory, None if they are not."""
    room = max(1, context - prompt)
    limit, left = room if asked is None else min(asked, room), max(1, room - memory)
    if limit <= left:
        return limit, None
    return left, f"memory takes {memory} of {context} tokens, so the answer has at most {left}"
