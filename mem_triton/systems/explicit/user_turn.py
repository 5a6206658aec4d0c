"""Finds the last thing that a user said in a rendered chat: what a bank is searched for.

Engines get chats as tokens, system prompt and earlier turns included. Where a user's turn begins and ends in them is
learnt from the chat template itself, so that chats of every route and of Python's ``chat`` are read alike.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence

Render = Callable[[list[dict[str, str]]], str]
"""Messages to the template's text, with the generation prompt."""


class UserTurns:
    """Finds the last user message of a chat. openers: what precedes one; end: what follows it.

    Example::

        turns = UserTurns.of(render)                                   # None: the template's turns cannot be told apart
        turns.last("<|im_start|>user\\nWho has the key?<|im_end|>\\n<|im_start|>assistant\\n")     # "Who has the key?"
    """

    def __init__(self, openers: Sequence[str], end: str) -> None:
        self.openers, self.end = tuple(openers), end

    @classmethod
    def of(cls, render: Render) -> UserTurns | None:
        """Learn from a template. Raises whatever it raises."""
        system, first, answer, second = "memtritonsystem", "memtritonfirst", "memtritonanswer", "memtritonsecond"
        said = [_message("user", first), _message("assistant", answer), _message("user", second)]
        before, rest = _around(render(said), first)
        after_user, rest = _around(rest, answer)
        before_again, after = _around(rest, second)
        opener = _common_prefix(before[::-1], before_again[::-1])[::-1]
        end = next(filter(None, _common_prefix(after_user, after).splitlines()), "").strip()
        if not opener.strip() or not end:
            return None
        return cls([opener, *_after_system(render, system, first)], end)

    def last(self, text: str) -> str | None:
        """The last user message in ``text``, None if there is none."""
        start = max(text.rfind(opener) + len(opener) if opener in text else -1 for opener in self.openers)
        if start < 0:
            return None
        return text[start:].split(self.end, 1)[0].strip() or None


class LastUserMessage:
    """The last user message of tokens, by a template that is asked for when the first chat comes.

    decode: token ids to text, with special tokens. render: None where the model has no chat template.
    """

    def __init__(self, decode: Callable[[list[int]], str], render: Render | None, logger: logging.Logger) -> None:
        self._decode, self._render, self._logger = decode, render, logger

    @functools.cached_property
    def _turns(self) -> UserTurns | None:
        try:
            turns = UserTurns.of(self._render) if self._render is not None else None
        except Exception as error:  # a template may raise anything
            self._logger.warning("references are searched by the whole prompt: the chat template fails: %s", error)
            return None
        if turns is None:
            self._logger.info("references are searched by the whole prompt: no user's turn is marked in it")
        return turns

    def of(self, prompt_ids: Sequence[int], most: int) -> str | None:
        """The message, or as much of its end as the prompt's last ``most`` tokens are long; None if there is none."""
        if self._turns is None or (message := self._turns.last(self._decode(list(prompt_ids)))) is None:
            return None
        return message[-len(self._decode(list(prompt_ids[-most:]))) :]


def _after_system(render: Render, system: str, first: str) -> list[str]:
    """What stands between a system prompt and the user's text where a template puts both into one turn."""
    try:
        between, _ = _around(_around(render([_message("system", system), _message("user", first)]), system)[1], first)
    except Exception:  # templates without system prompts raise errors of their own
        return []
    return [between] if len(between.strip()) >= 3 else []  # an empty line may stand in any message


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _around(text: str, mark: str) -> tuple[str, str]:
    before, found, after = text.partition(mark)
    if not found:
        raise ValueError("the chat template leaves a message out")
    return before, after


def _common_prefix(one: str, other: str) -> str:
    length = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return one[:length]
