"""The byte-level BPE tokenizer of the recall model, trained on its own language, with Qwen's chat markers."""

from __future__ import annotations

import random

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from benchmarks.recall import data

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def train_tokenizer(seed: int = 0) -> PreTrainedTokenizerFast:
    """Train on told facts until every word of the language is one token."""
    rng = random.Random(seed)
    lines = ["system user assistant"]
    for _ in range(6000):
        told = data.draw(rng, 8, data.TRAINED)
        lines.append(data.fact_message(told, rng.random()))
        lines += [data.question(told[0], rng.random()), data.ANSWER.format(value=told[1].value), data.REPLY]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4000,
        min_frequency=2,
        special_tokens=SPECIAL,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(lines, trainer)
    words = [f" {word}" for word in (*data.FIRST, *data.LAST, *data.ATTRIBUTES, *data.VALUES)]
    split = [word for word in words if len(tokenizer.encode(word).ids) != 1]
    if split:
        raise ValueError(f"not single tokens: {split[:5]}")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=4096,
    )
