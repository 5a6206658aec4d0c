"""Conversations as the tokens that a server would process, request by request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from mem_triton.systems.delta_mem.training.conversations import Chat, Conversation, DataError


@dataclass(frozen=True)
class Request:
    """One request. ids: prompt and reply; reply: index of the reply's first token, trained from there on."""

    ids: tuple[int, ...]
    reply: int


@dataclass(frozen=True)
class Session:
    """A conversation in tokens.

    told: what the server has processed of each request, that is, all but its last sampled token. asked: the whole last
    request, end of turn included. recalled: which tokens of its reply only the memory can know, because they were told
    and do not stand in the asked prompt. context: told and asked in one chat, None if nothing was told.
    """

    told: tuple[Request, ...]
    asked: Request
    recalled: tuple[bool, ...]
    context: Request | None = None
    stage: int = 0
    group: str = ""

    @property
    def tokens(self) -> int:
        """Tokens of all requests."""
        return sum(len(request.ids) for request in (*self.told, self.asked))


def prompt_text(tokenizer: Any, chat: Chat) -> str:
    """The text that a server makes of a chat, up to where the assistant begins to write."""
    return tokenizer.apply_chat_template([m.as_dict() for m in chat], add_generation_prompt=True, tokenize=False)


def request_of(tokenizer: Any, chat: Chat, where: str) -> Request:
    """The tokens of a chat that ends with the assistant's reply, end of turn included.

    Raises DataError if it ends otherwise, or the chat template renders a reply differently from what a server sends.
    """
    messages = [message.as_dict() for message in chat]
    if messages[-1]["role"] != "assistant":
        raise DataError(f"{where}: the chat ends with the user's message; add the assistant's reply")
    prompt = prompt_text(tokenizer, chat[:-1])
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    if not whole.startswith(prompt):
        raise DataError(
            f"{where}: this model's chat template does not continue its own generation prompt with the reply, so what "
            "is trained would not be what is served; give a template that does (tokenizer.chat_template)"
        )
    head = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    reply = tokenizer(whole[len(prompt) :].rstrip(), add_special_tokens=False)["input_ids"]
    return Request((*head, *reply), len(head))


def session_of(tokenizer: Any, conversation: Conversation, most_asked: int, most_told: int) -> Session:
    """Tokens of a conversation whose requests all have replies.

    most_asked, most_told: tokens of the asked request and of all told ones together; a longer row is refused, since a
    cut one would train something else. Raises DataError.
    """
    told = tuple(request_of(tokenizer, chat, conversation.where) for chat in conversation.told)
    told = tuple(replace(request, ids=request.ids[:-1]) for request in told)
    asked = request_of(tokenizer, conversation.asked, conversation.where)
    for what, count, most, option in (
        ("the asked request", len(asked.ids), most_asked, "--asked-tokens"),
        ("what is told", sum(len(r.ids) for r in told), most_told, "--told-tokens"),
    ):
        if count > most:
            raise DataError(f"{conversation.where}: {what} has {count} tokens, at most {most}: cut it, or {option}")
    heard = {token for request in told for token in request.ids}
    seen = set(asked.ids[: asked.reply])
    recalled = tuple(token in heard and token not in seen for token in asked.ids[asked.reply :])
    context = request_of(tokenizer, conversation.in_context(), conversation.where) if told else None
    return Session(told, asked, recalled, context, conversation.stage, conversation.group)


def padded(rows: Sequence[Sequence[int]], fill: int) -> tuple[list[list[int]], list[list[int]]]:
    """Rows of ids filled up at their right ends, and the mask of what is valid."""
    longest = max(map(len, rows))
    ids = [[*row, *[fill] * (longest - len(row))] for row in rows]
    return ids, [[1] * len(row) + [0] * (longest - len(row)) for row in rows]
