"""The recall benchmark's chats as a server processes them: texts, and forward calls of a model over them.

A session is a number of chats. Each chat is a request of its own: positions start at 0, and there is no KV cache of
another; only the memory's states pass from one to the next. The last sampled token, <|im_end|>, is never processed, so
it is not in the state.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from benchmarks.recall import data

START, END = "<|im_start|>", "<|im_end|>"


def telling(told: list[data.Fact], seed: float) -> str:
    """The chat that tells facts, up to the last processed token."""
    message = data.fact_message(told, seed)
    return f"{START}user\n{message}{END}\n{START}assistant\n{data.REPLY}"


def asking(fact: data.Fact, seed: float) -> tuple[str, str]:
    """The chat that asks for a fact: its prompt, and the right answer."""
    return f"{START}user\n{data.question(fact, seed)}{END}\n{START}assistant\n", data.ANSWER.format(
        value=fact.value
    ) + END


def in_context(told: str, asked: tuple[str, str]) -> tuple[str, str]:
    """The chat that goes on after ``telling`` with ``asking``."""
    return f"{told}{END}\n{asked[0]}", asked[1]


def tell(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, texts: list[str], layers: int | None = None
) -> Tensor | None:
    """Process one text a row, which writes it to memory. Returns the logits [B, R, vocab] that predict the reply.

    layers: run only so many, for the memory alone, where the rest cannot matter to it; then nothing is returned.
    """
    encoded = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
    everything = model.config.num_hidden_layers
    model.config.num_hidden_layers = layers or everything
    try:
        hidden = model.model(
            input_ids=encoded.input_ids, attention_mask=encoded.attention_mask, use_cache=False
        ).last_hidden_state
    finally:
        model.config.num_hidden_layers = everything
    if layers:
        return None
    size = reply_tokens(tokenizer).numel()
    take = encoded.attention_mask.sum(1, keepdim=True) - size + torch.arange(size)
    return model.lm_head(hidden[torch.arange(len(texts))[:, None], take])


def reply_tokens(tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """The tokens [R] with which the assistant acknowledges facts."""
    return torch.tensor(tokenizer(data.REPLY + END)["input_ids"])


def ask(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, pairs: list[tuple[str, str]]
) -> tuple[Tensor, Tensor]:
    """Logits [B, A, vocab] that predict each row's answer, and its tokens [B, A]. All answers have equally many.

    The argmax is the answer's tokens throughout if and only if greedy decoding gives exactly this answer.
    """
    prompts = tokenizer([prompt for prompt, _ in pairs])["input_ids"]
    answers = torch.tensor(tokenizer([answer for _, answer in pairs])["input_ids"])
    rows = [prompt + answer[:-1] for prompt, answer in zip(prompts, answers.tolist(), strict=True)]
    encoded = tokenizer.pad({"input_ids": rows}, padding_side="right", return_tensors="pt")
    hidden = model.model(
        input_ids=encoded.input_ids, attention_mask=encoded.attention_mask, use_cache=False
    ).last_hidden_state
    first = torch.tensor([len(prompt) - 1 for prompt in prompts])
    take = first[:, None] + torch.arange(answers.shape[1])
    return model.lm_head(hidden[torch.arange(len(pairs))[:, None], take]), answers
