"""The model's own replies to requests that end with the user's message: greedy, made once, kept in a file.

What a server writes into a session's state includes what the model itself said. An adapter that was trained on other
replies recalls worse behind its own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from mem_triton.systems.delta_mem.training.conversations import Chat, ChatMessage, Conversation
from mem_triton.systems.delta_mem.training.tokens import prompt_text

BATCH = 64


def with_replies(
    model: PreTrainedModel,
    tokenizer: Any,
    conversations: Sequence[Conversation],
    most: int,
    path: Path,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Conversation]:
    """The conversations with every open request answered by the model, in at most ``most`` tokens.

    path: a JSONL file of replies that were made before, which grows; lines that a kill has cut short are made again.
    """
    known = _read(path)
    chats = {chat for c in conversations for chat in (*c.told, c.asked) if chat[-1].role == "user"}
    prompts = {chat: prompt_text(tokenizer, chat) for chat in chats}
    keys = {chat: _key(text, most) for chat, text in prompts.items()}
    missing = sorted(
        {(prompts[chat], keys[chat]) for chat in chats if keys[chat] not in known}, key=lambda x: len(x[0])
    )
    for begin in range(0, len(missing), BATCH):
        batch = missing[begin : begin + BATCH]
        texts = _generate(model, tokenizer, [prompt for prompt, _ in batch], most)
        known |= dict(zip((key for _, key in batch), texts, strict=True))
        with path.open("a", encoding="utf-8") as file:
            for (_, key), text in zip(batch, texts, strict=True):
                file.write(json.dumps({"key": key, "reply": text}) + "\n")
        progress(min(begin + BATCH, len(missing)), len(missing))

    def answered(chat: Chat) -> Chat:
        return (*chat, ChatMessage("assistant", known[keys[chat]])) if chat in keys else chat

    return [
        Conversation(tuple(map(answered, c.told)), answered(c.asked), c.stage, c.group, c.where) for c in conversations
    ]


@torch.no_grad()
def _generate(model: PreTrainedModel, tokenizer: Any, prompts: list[str], most: int) -> list[str]:
    side, tokenizer.padding_side = tokenizer.padding_side, "left"
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    try:
        rows = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in prompts]
        longest = max(map(len, rows))
        ids = torch.tensor([[pad or 0] * (longest - len(row)) + row for row in rows], device=model.device)
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=model.device)
        out = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=most, do_sample=False, pad_token_id=pad or 0
        )
    finally:
        tokenizer.padding_side = side
    return [text.strip() for text in tokenizer.batch_decode(out[:, longest:], skip_special_tokens=True)]


def _key(prompt: str, most: int) -> str:
    return hashlib.sha256(f"{most}\n{prompt}".encode()).hexdigest()


def _read(path: Path) -> dict[str, str]:
    known = {}
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                row = json.loads(line)
                known[row["key"]] = str(row["reply"])
            except (ValueError, KeyError, TypeError):
                continue
    return known
