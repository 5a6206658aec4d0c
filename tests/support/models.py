"""Tiny random models and adapters, big enough in their weights that greedy output varies and memory changes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from benchmarks.common.random_adapter import attention_dims, random_adapter

__all__ = [
    "FAMILIES",
    "SPECIAL_TOKENS",
    "VOCAB",
    "attention_dims",
    "random_adapter",
    "save_tiny_model",
    "tiny_model",
    "tiny_tokenizer",
]

FAMILIES = ("qwen3", "qwen2", "llama", "mistral", "smollm3")
VOCAB = 512
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_model(
    family: str = "qwen3",
    *,
    layers: int = 2,
    hidden: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 32,
    vocab: int = VOCAB,
    seed: int = 0,
    std: float = 0.12,
    dtype: torch.dtype = torch.float32,
    attn_implementation: str = "eager",
    **config: Any,
) -> torch.nn.Module:
    """A random CausalLM of ``family`` (see FAMILIES) in eval mode; the same seed gives the same weights.

    qwen2 has no head_dim of its own: there it is hidden / heads. SmolLM3 gets one NoPE layer, the last.
    No end-of-sequence token, so that greedy runs always have the asked length.
    """
    import transformers

    names = {"qwen3": "Qwen3", "qwen2": "Qwen2", "llama": "Llama", "mistral": "Mistral", "smollm3": "SmolLM3"}
    if family not in names:
        raise ValueError(f"family={family!r}: expected one of {', '.join(FAMILIES)}")
    if family != "qwen2":
        config.setdefault("head_dim", head_dim)
    if family == "mistral":
        config.setdefault("sliding_window", None)
    if family == "smollm3":
        config.setdefault("no_rope_layers", [1] * (layers - 1) + [0])
    full = getattr(transformers, f"{names[family]}Config")(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        initializer_range=std,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        attn_implementation=attn_implementation,
        **config,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = getattr(transformers, f"{names[family]}ForCausalLM")(full)
        for name, parameter in model.named_parameters():
            if "norm" in name:  # not all ones, so that a norm at the wrong place shows
                parameter.data.uniform_(0.7, 1.3)
            elif name.endswith("bias"):
                parameter.data.normal_(std=std)
    return model.to(dtype).eval()


def save_tiny_model(folder: str | Path, family: str = "qwen3", **options: Any) -> Path:
    """``tiny_model`` and ``tiny_tokenizer`` in a folder that transformers and vLLM can serve."""
    folder = Path(folder)
    tiny_model(family, **options).save_pretrained(folder)
    tiny_tokenizer(options.get("vocab", VOCAB)).save_pretrained(folder)
    return folder


def tiny_tokenizer(vocab: int = VOCAB) -> Any:
    """Byte-level tokenizer with a chat template: 4 special tokens, 256 bytes, then filler tokens up to ``vocab``.

    Bytes that are not UTF-8 by themselves decode to U+FFFD, so compare token ids rather than texts.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if vocab < len(SPECIAL_TOKENS) + len(alphabet):
        raise ValueError(f"vocab={vocab} must be at least {len(SPECIAL_TOKENS) + len(alphabet)}")
    ids = {token: i for i, token in enumerate((*SPECIAL_TOKENS, *alphabet))}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.add_tokens([AddedToken(f"<{i}>", normalized=False) for i in range(len(ids), vocab)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
