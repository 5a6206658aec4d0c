"""Lessons: a question, the teacher's answer to it, and the teacher's hidden states where it gave that answer.

The teacher is the frozen model with a chunk of the document as its system message; the student has the trained rows in
that place (Cartridges, arXiv 2506.06266, section 4). Hidden states are kept in place of logits, which are as many
numbers as the vocabulary has tokens: the same head makes logits of both.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mem_triton.store.files import write_durably
from mem_triton.systems.explicit.cartridge_recipe import CartridgeRecipe
from mem_triton.systems.explicit.cartridge_template import cartridge_template
from mem_triton_transformers.cartridge_training.decoding import Sampling, reply_all
from mem_triton_transformers.cartridge_training.questions import Question
from mem_triton_transformers.runs.folders import TrainingError

AT_ONCE = 8
"""Lessons of a forward call of the teacher."""


@dataclass(frozen=True)
class Lesson:
    """prompt: tokens that the student reads behind its rows; asked: that the teacher reads; answer: the teacher's."""

    prompt: tuple[int, ...]
    asked: tuple[int, ...]
    answer: tuple[int, ...]


class Chats:
    """Renders chats as tokens: with a chunk as the system message, and without any."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        try:
            self._alone = cartridge_template(tokenizer)
            self.with_chunk("chunk", "question")
        except Exception as error:  # templates raise what they like about a chat that they do not want
            raise TrainingError(f"MODEL: its chat template cannot be used for a cartridge: {error}") from None

    def with_chunk(self, chunk: str, asked: str) -> list[int]:
        """Tokens of a chat whose system message is the chunk, up to the answer."""
        messages = [{"role": "system", "content": chunk}, {"role": "user", "content": asked}]
        return self._tokens(messages, None)

    def alone(self, asked: str) -> list[int]:
        """Tokens of a chat that stands behind a cartridge, up to the answer."""
        return self._tokens([{"role": "user", "content": asked}], self._alone)

    def _tokens(self, messages: list[dict[str, str]], template: str | None) -> list[int]:
        return self.tokenizer.apply_chat_template(
            messages, chat_template=template, add_generation_prompt=True, tokenize=True, return_dict=False
        )


def make_lessons(
    model: Any,
    chats: Chats,
    chunks: Sequence[str],
    questions: Sequence[Question],
    answers: int,
    recipe: CartridgeRecipe,
    path: Path,
    say: Callable[[str], None],
) -> list[Lesson]:
    """Let the teacher answer each question ``answers`` times, the first time greedily.

    What is answered lies in ``path``, so that a run that goes on has the same lessons without asking again.
    """
    prompts = [chats.with_chunk(chunks[q.chunk], q.text) for q in questions]
    digest = [list(map(list, prompts)), answers, recipe.answer_tokens, recipe.temperature, recipe.seed]
    said = _read(path, digest)
    if said is None:
        said = []
        for turn in range(answers):
            sampling = Sampling(recipe.temperature, 0.95, recipe.seed + turn) if turn else None
            said += reply_all(model, prompts, recipe.answer_tokens, sampling)
            say(f"answers of the model with the text: {len(said)} of {answers * len(prompts)}")
        text = json.dumps({"of": digest, "answers": said})
        write_durably(path, lambda temporary: temporary.write_text(text) and None)
    alone = [tuple(chats.alone(q.text)) for q in questions]
    found: dict[tuple[tuple[int, ...], tuple[int, ...]], Lesson] = {}
    for i, answer in enumerate(said):
        i %= len(prompts)
        found.setdefault((alone[i], tuple(answer)), Lesson(alone[i], tuple(prompts[i]), tuple(answer)))
    return list(found.values())


@torch.no_grad()
def targets(model: Any, lessons: Sequence[Lesson]) -> list[Tensor]:
    """The teacher's hidden states in front of each token of an answer, [tokens, hidden] for each lesson."""
    order = sorted(range(len(lessons)), key=lambda i: len(lessons[i].asked) + len(lessons[i].answer))
    found: dict[int, Tensor] = {}
    for first in range(0, len(order), AT_ONCE):
        rows = order[first : first + AT_ONCE]
        pairs = [(lessons[i].asked, lessons[i].answer) for i in rows]
        for i, hidden in zip(rows, hidden_states(model, pairs), strict=True):
            found[i] = hidden.clone()
    return [found[i] for i in range(len(lessons))]


def hidden_states(
    model: Any, rows: Sequence[tuple[Sequence[int], Sequence[int]]], cache: Any = None, before: int = 0
) -> list[Tensor]:
    """Last hidden states in front of each token of the answers. rows: (prompt, answer). cache: of ``before`` keys."""
    device, texts = model.device, [[*prompt, *answer][:-1] for prompt, answer in rows]
    longest = max(map(len, texts))
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros(len(rows), before + longest, dtype=torch.long)
    for row, text in enumerate(texts):
        ids[row, : len(text)] = torch.tensor(text)
        mask[row, : before + len(text)] = 1
    positions = torch.arange(before, before + longest).expand(len(rows), -1)
    backbone = getattr(model, model.base_model_prefix)
    out = backbone(
        input_ids=ids.to(device),
        attention_mask=mask.to(device),
        position_ids=positions.to(device),
        past_key_values=cache,
        use_cache=cache is not None,
    ).last_hidden_state
    return [out[i, len(prompt) - 1 : len(prompt) + len(answer) - 1] for i, (prompt, answer) in enumerate(rows)]


def logits_of(model: Any, hidden: Tensor) -> Tensor:
    """Logits of hidden states, float32."""
    logits = model.get_output_embeddings()(hidden).float()
    cap = getattr(model.config, "final_logit_softcapping", None)
    return cap * torch.tanh(logits / cap) if cap else logits


def check_head(model: Any, lesson: Lesson) -> None:
    """Raises TrainingError for a model that makes its logits in another way than ``logits_of``."""
    ids = torch.tensor([lesson.prompt], device=model.device)
    with torch.no_grad():
        (hidden,) = hidden_states(model, [(lesson.prompt, lesson.answer[:1])])
        right = model(input_ids=ids, logits_to_keep=1).logits[0].float()
        if not torch.allclose(logits_of(model, hidden), right, rtol=0.05, atol=0.05 * float(right.std())):
            raise TrainingError(f"MODEL: {type(model).__name__} scales its logits in a way that is not known here")


def _read(path: Path, digest: list[Any]) -> list[list[int]] | None:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return found["answers"] if isinstance(found, dict) and found.get("of") == digest else None
