"""A structured start for the recall model: two heads that look back, and heads that match what they found.

Models of this size did not learn to match names from random starts within minutes on a CPU. Everything stays trainable,
and the result is an ordinary Qwen3 checkpoint.
"""

from __future__ import annotations

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

CONSTANT, SHARP, MATCH = 0.5, 1.6, 1.3


def recall_config(vocab: int, eos: int) -> Qwen3Config:
    """About 2 million parameters."""
    return Qwen3Config(
        vocab_size=vocab,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        bos_token_id=None,
        eos_token_id=eos,
        pad_token_id=0,
        attention_bias=False,
    )


@torch.no_grad()
def induction_init(model: Qwen3ForCausalLM, seed: int = 0) -> None:
    """Layer 0: kv head i attends i + 1 tokens back and copies the token into a subspace of its own. Layer 1: matches
    the present token with those copies and copies what follows. Embeddings get one constant dimension, which gives
    the bias-free queries and keys of layer 0 a direction of their own."""
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    hidden, head, group = config.hidden_size, config.head_dim, config.num_attention_heads // config.num_key_value_heads
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            std = 0.1 if "embed" in name else 0.02  # embeddings must dominate the residual stream
            parameter.copy_(std * torch.randn(parameter.shape, generator=generator))
    model.model.embed_tokens.weight[:, 0] = CONSTANT
    constant = torch.zeros(hidden)
    constant[0] = 1.0
    basis = torch.linalg.qr(torch.randn(hidden - 1, hidden - 1, generator=generator))[0]
    basis = torch.cat([torch.zeros(hidden - 1, 1), basis], 1)  # orthonormal rows that leave the constant alone
    identity = basis[:head]
    frequency = 1e4 ** (-torch.arange(0, head, 2).float() / head)
    fast = torch.zeros(head)
    fast[: max(3, int((frequency > 0.2).sum()))] = 1.0
    fast /= fast.norm()
    first, second = model.model.layers[0].self_attn, model.model.layers[1].self_attn
    for attention, weight in ((first, SHARP), (second, MATCH)):
        attention.q_norm.weight.fill_(weight)
        attention.k_norm.weight.fill_(weight)
    for i in range(2):
        kv, q = slice(i * head, (i + 1) * head), slice(i * group * head, (i * group + 1) * head)
        copied = basis[head * (i + 1) : head * (i + 2)]
        angle = -(i + 1) * frequency
        cos, sin = torch.cat([angle.cos()] * 2), torch.cat([angle.sin()] * 2)
        back = fast * cos + torch.cat([-fast[head // 2 :], fast[: head // 2]]) * sin
        first.k_proj.weight[kv] = fast[:, None] * constant
        first.q_proj.weight[q] = back[:, None] * constant
        first.v_proj.weight[kv] = identity
        first.o_proj.weight[:, q] = 0.3 * copied.T
        second.k_proj.weight[kv] = copied
        second.q_proj.weight[q] = identity
        second.v_proj.weight[kv] += 0.5 * identity
        second.o_proj.weight[:, q] += 0.3 * identity.T
