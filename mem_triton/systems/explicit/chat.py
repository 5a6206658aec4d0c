"""What of a chat is worth keeping: its turns, each closed, without the system prompt of the chat that it comes from.

A kept chat is read before another one, which brings its own system prompt and asks for its own answer. Where a
turn begins and ends is learnt from the tokenizer's chat template by rendering a chat of known words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_ASKED, _SAID, _AGAIN = "mem0asked0", "mem0said0", "mem0again0"
_THOUGHTS = ("<think>", "</think>")

Ids = tuple[int, ...]


@dataclass(frozen=True)
class ChatFrame:
    """How a tokenizer's chats look, in tokens.

    user: what a user's turn begins with. assistant: what an answer begins with, and answer_begins: the same with the
    blanks behind it; empty where an answer follows without a word. ends: what ends an answer, and closed: the same with
    the blanks behind it. bos: begins every text, empty if nothing does. thought: ends what an answer thinks first.
    blank: tokens that say nothing.
    """

    user: Ids
    assistant: Ids
    answer_begins: Ids
    ends: Ids
    closed: Ids
    bos: Ids = ()
    thought: Ids = ()
    blank: frozenset[int] = frozenset()

    def is_chat(self, ids: Sequence[int]) -> bool:
        """Whether these tokens are a rendered chat."""
        return _find(ids, self.user) is not None

    def kept(self, ids: Sequence[int], answer: Sequence[int] | None) -> list[int]:
        """The tokens to keep of a prompt. answer: the tokens of its answer, None to leave it out.

        Text that is no chat stays as it is. Of a chat the turn that waits for an answer goes, or gets it, and closes.
        """
        ids = list(ids)
        if not self.is_chat(ids):
            return ids if answer is None else ids + list(answer)
        kept = [*self.bos, *ids[_find(ids, self.user) :]]
        begun = _find(kept, self.assistant, last=True) if self.assistant else None
        waits = begun is not None and self.blank.issuperset(kept[begun + len(self.assistant) :])
        if answer is not None:
            said = list(answer)
            thought = _find(said, self.thought, last=True) if self.thought else None
            if thought is not None:  # as templates leave it out of the turns that lie behind
                said = said[thought + len(self.thought) :]
                while said and said[0] in self.blank:
                    del said[0]
            return self._close((kept[:begun] + list(self.answer_begins) if waits else kept) + said)
        if waits:
            return kept[:begun]
        if begun is not None and _find(kept[begun:], self.ends) is None:  # a turn that the request has begun itself
            return self._close(kept)
        return kept

    def _close(self, kept: list[int]) -> list[int]:
        if kept[-len(self.ends) :] == list(self.ends):
            del kept[-len(self.ends) :]
        return [*kept, *self.closed]


def chat_frame(tokenizer: Any) -> ChatFrame | None:
    """The frame of a tokenizer's own chat template; None without one, or if its turns do not begin with special tokens,
    so that they could not be told from text."""
    try:
        return _chat_frame(tokenizer)
    except Exception:  # templates raise what they like about a chat that they do not want
        return None


def _chat_frame(tokenizer: Any) -> ChatFrame | None:
    def render(*said: str) -> str:
        roles = ("user", "assistant")
        messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(said)]
        return tokenizer.apply_chat_template(messages, tokenize=False)

    def ids(text: str) -> Ids:
        return tuple(tokenizer.encode(text, add_special_tokens=False))

    whole, asked, answered = render(_ASKED, _SAID, _AGAIN), render(_ASKED), render(_ASKED, _SAID)
    to_answer, _, rest = whole[whole.index(_ASKED) + len(_ASKED) :].partition(_SAID)
    begins = to_answer.removeprefix(asked[asked.index(_ASKED) + len(_ASKED) :])
    closed = answered[answered.rindex(_SAID) + len(_SAID) :]
    user = rest.partition(_AGAIN)[0].removeprefix(closed)
    bos = tokenizer.bos_token
    added = tokenizer.get_added_vocab()
    frame = ChatFrame(
        ids(user.strip()),
        ids(begins.strip()),
        ids(begins),
        ids(closed.strip()),
        ids(closed),
        ids(bos) if bos and whole.startswith(bos) else (),
        ids(_THOUGHTS[1]) if _THOUGHTS[1] in added else (),
        frozenset(token for text in ("\n", "\n\n", " ", *(set(_THOUGHTS) & set(added))) for token in ids(text)),
    )
    marks, special = (frame.user, frame.ends), {*tokenizer.all_special_ids, *added.values()}
    return frame if all(mark and mark[0] in special for mark in marks) else None


def _find(ids: Sequence[int], part: Ids, last: bool = False) -> int | None:
    """Where ``part`` stands in ``ids`` first, or last; None if nowhere."""
    places = range(len(ids) - len(part) + 1)
    return next((i for i in (reversed(places) if last else places) if tuple(ids[i : i + len(part)]) == part), None)
