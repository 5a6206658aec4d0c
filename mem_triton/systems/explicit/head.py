"""Reads the head of a bank's references once, before all of them, and drops it where a prompt repeats it.

References of kind "parallel" are encoded under the head of a chat, as text between that head and the user's words. A
request with some reads [head | references side by side | the rest of its prompt], as if they stood in the user's turn:
each reference ends where the prompt begins, and the head ends where the longest of them begins. So the head's place
depends on the request. It is an entry of its own, named for that place, whose keys and values are the bank's constant
prefix.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mem_triton import metrics
from mem_triton.store.bank import Bank
from mem_triton.store.pool.plan import Attachment
from mem_triton.write.config import prefix_ids

_NAME = "#head@"
"""No id of an entry begins so, see ``mem_triton.ids``."""


def is_head(ref: str) -> bool:
    """Whether a reference is the head's."""
    return ref.startswith(_NAME)


def head_end(ref: str) -> int | None:
    """How far before the prompt the head of this reference ends; None for another reference."""
    return int(ref.removeprefix(_NAME)) if is_head(ref) else None


@dataclass(frozen=True)
class Joined:
    """A plan with its head. dropped: tokens of the prompt that the head is instead of; note: why it is none."""

    plan: tuple[Attachment, ...]
    tokens: Mapping[str, int]
    dropped: int = 0
    note: str | None = None


class BankHead:
    """The head of a bank's references. tokenizer: the served model's, None without one.

    Example::

        joined = head.join(plan, {"notes:0f@1": 44}, prompt_ids)
        engine.run(prompt_ids[joined.dropped :], joined.plan)
    """

    def __init__(self, bank: Bank, tokenizer: Callable[[], Any] | None, logger: logging.Logger) -> None:
        self._bank, self._tokenizer, self._logger = bank, tokenizer, logger
        self._tokens = 0
        self._said: set[str] = set()

    @property
    def tokens(self) -> int:
        """Its length, 0 where the bank has none, or none yet."""
        if not self._tokens and self._bank.spec.kind == "parallel" and (sink := self._bank.sink()) is not None:
            self._tokens = sink.tokens
        return self._tokens

    @functools.cached_property
    def _ids(self) -> list[int] | None:
        return None if self._tokenizer is None else prefix_ids(self._tokenizer(), self._bank.spec.prefix_text)

    def repeated(self, prompt_ids: Sequence[int]) -> tuple[int, str | None]:
        """(tokens at a prompt's start that are the head's, why there are none)."""
        if not self.tokens:
            return 0, None
        if self._ids is None:
            return 0, "the server has no tokenizer, so it cannot see whether the prompt begins with the bank's head"
        if len(self._ids) < len(prompt_ids) and list(prompt_ids[: len(self._ids)]) == self._ids:
            return len(self._ids), None
        return 0, (
            "the prompt does not begin with the head that the bank was written under (see mem-triton bank info, "
            "prefix_text), so it stands behind the references with a head of its own"
        )

    def join(self, plan: Sequence[Attachment], tokens: Mapping[str, int], prompt_ids: Sequence[int]) -> Joined:
        """The plan that begins with the head, if there is a plan and a head."""
        if not plan or not self.tokens:
            return Joined(tuple(plan), tokens)
        dropped, note = self.repeated(prompt_ids)
        if note is not None:
            metrics.HEADS_APART.inc()
            if note not in self._said:
                self._said.add(note)
                self._logger.warning("a request reads references of a chat, but %s", note)
        ref = f"{_NAME}{max(tokens[a.ref] for a in plan)}"
        return Joined((Attachment(ref), *plan), {ref: self.tokens, **tokens}, dropped, note)
