"""Tiny random models and adapters, big enough in their weights that greedy output varies and memory changes it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mem_triton.systems.delta_mem import (
    AttentionDims,
    DeltaMemAdapter,
    DeltaMemConfig,
    adapter_from_tensors,
    tensor_shapes,
)

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


def attention_dims(model_or_config: Any) -> dict[str, AttentionDims]:
    """Attention module name -> widths of a transformers model or config, from its config alone."""
    config = getattr(model_or_config, "config", model_or_config)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    q, kv = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    dims = AttentionDims(config.hidden_size, q, kv, kv, config.hidden_size)
    return {f"model.layers.{i}.self_attn": dims for i in range(config.num_hidden_layers)}


def random_adapter(
    model_or_dims: Any, *, seed: int = 1, strength: float = 0.3, dtype: torch.dtype = torch.float32, **config: Any
) -> DeltaMemAdapter:
    """A random adapter whose memory visibly changes tokens.

    model_or_dims: transformers model or config, or the result of ``attention_dims``. strength: std of the active
    ``delta_*_proj`` (inactive ones are zero, as the official code stores them). config: ``DeltaMemConfig`` keys.
    """
    dims = model_or_dims if isinstance(model_or_dims, Mapping) else attention_dims(model_or_dims)
    cfg = DeltaMemConfig(**config)
    generator = torch.Generator().manual_seed(seed)

    def values(key: str, shape: tuple[int, ...], hidden: int) -> torch.Tensor:
        noise = torch.randn(shape, generator=generator)
        if key.endswith("_bias"):
            return (cfg.beta_bias_init if key == "beta_bias" else -cfg.beta_bias_init) + 0.3 * noise
        if key == "delta_o_rmsnorm_weight":
            return strength * (1 + 0.3 * noise)
        if key == "delta_scale_raw":
            return 0.5 * noise
        if key.startswith("delta_"):
            return strength * noise * (key.split("_")[1] in cfg.delta_heads)
        return noise / hidden**0.5  # memory_*, beta and lambda projections of a normed hidden state

    flat = {
        f"{name}.{key}": values(key, shape, widths.hidden).to(dtype)
        for name, widths in dims.items()
        if cfg.targets(name)
        for key, shape in tensor_shapes(cfg, widths).items()
    }
    return adapter_from_tensors(cfg, flat)
