"""A start for the adapter from the frozen model's own activations, in closed form.

The full stop after a value sees the whole fact, and the last word of "It is" sees the whole question. Keys and queries
start as the linear maps under which these two agree best on training facts (canonical correlation), the gates as a
classifier of those full stops, values as random codes of the value word, outputs as the way back from the codes to the
embeddings of the words. Gradients do the rest.
"""

from __future__ import annotations

import random

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from benchmarks.recall import data
from benchmarks.recall.chat import asking, telling
from mem_triton.systems.delta_mem import DeltaMemConfig
from mem_triton_transformers.delta_training.start import agreeing_maps, ridge

GATE_AT_FACTS, GATE_ELSEWHERE = -3.9, -8.0  # before the sigmoid: .02 and .0003; every write also fades the older ones
VALUE_SIZE, SHARED_DIMS = 12.0, 48


@torch.no_grad()
def memory_init(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    config: DeltaMemConfig,
    layer: int,
    seed: int,
    messages: int = 600,
    n: int = 6,
) -> dict[str, Tensor]:
    """Initial tensors of the adapter at ``layer``, by their official names."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    told = [data.draw(rng, n, data.TRAINED, 1 / 3) for _ in range(messages)]
    asked = ["".join(asking(fact, rng.random())) for row in told for fact in row]
    asked = [text[: text.rindex(" ")] for text in asked]  # up to "It is"
    ids, x, valid = inputs_of(model, tokenizer, [telling(row, rng.random()) for row in told], layer)
    words = torch.tensor([tokenizer(f" {word}")["input_ids"][0] for word in data.VALUES])
    at_fact = torch.isin(ids, words).roll(1, 1)  # the full stops after the values; in the order of the facts
    _, y, there = inputs_of(model, tokenizer, asked, layer)
    keys, queries = x[at_fact], y[torch.arange(len(y)), there.sum(1) - 1]  # [facts, d] each
    value = torch.tensor([data.VALUES.index(fact.value) for row in told for fact in row])

    heads, rank, dims = config.num_state_heads, config.rank, x.shape[-1]
    to_key, to_query, strength = agreeing_maps(keys, queries)
    weight = strength[:SHARED_DIMS].sqrt()
    to_key, to_query = to_key[:SHARED_DIMS] * weight[:, None], to_query[:SHARED_DIMS] * weight[:, None]
    mix = [torch.linalg.qr(torch.randn(SHARED_DIMS, rank, generator=generator))[0].T for _ in range(heads)]
    mix = torch.cat(mix)  # [H*r, shared]: every head sees its own projection of what agrees

    code = torch.randn(len(words), heads * rank, generator=generator).sign()
    gates = torch.where(at_fact[valid], GATE_AT_FACTS, GATE_ELSEWHERE) - config.beta_bias_init
    every = torch.where(at_fact[valid], 5.0, 1.0)  # full stops of facts are few
    gate = ridge(x[valid] * every[:, None], (gates * every)[:, None])  # [1, d]
    word = F.normalize(model.lm_head.weight[words] - model.lm_head.weight[words].mean(0), dim=-1)
    read = VALUE_SIZE * torch.sigmoid(torch.tensor(GATE_AT_FACTS)) * 0.6  # size of a code when it is read back
    return {
        "memory_k_proj": 0.8 * mix @ to_key,
        "memory_q_proj": 0.8 * mix @ to_query,
        "memory_v_proj": VALUE_SIZE * ridge(keys, code[value]),
        "beta_proj": gate.expand(heads * rank, dims).clone(),
        "delta_o_proj": 4.0 * word.T @ code / (heads * rank * read),
    }


def inputs_of(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, texts: list[str], layer: int
) -> tuple[Tensor, Tensor, Tensor]:
    """ids [B, T], the attention's input at ``layer`` [B, T, d], and which tokens are valid [B, T]."""
    encoded = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
    found: list[Tensor] = []
    block = model.model.layers[layer].input_layernorm
    handle = block.register_forward_hook(lambda module, args, output: found.append(output))
    for ids, mask in zip(encoded.input_ids.split(128), encoded.attention_mask.split(128), strict=True):
        model.model(input_ids=ids, attention_mask=mask, use_cache=False)
    handle.remove()
    return encoded.input_ids, torch.cat(found), encoded.attention_mask.bool()
