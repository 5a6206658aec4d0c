"""Softmax over gathered keys in torch, and what it takes to gather them: the parts of ``paged_torch``."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

GATHER_LIMIT = 1 << 22  # floats of gathered keys at a time


def buckets(sizes: np.ndarray, width: int) -> list[np.ndarray]:
    """Indices of ``sizes`` in groups of alike ones, so that padding to a group's largest costs little."""

    def fits(count: int, largest: int, total: int) -> bool:
        return count == 1 or (count * largest <= 1.5 * total + 512 and count * largest * width <= GATHER_LIMIT)

    if fits(len(sizes), int(sizes.max()), int(sizes.sum())):
        return [np.arange(len(sizes))]
    order = np.argsort(sizes, kind="stable")
    cuts, count, total = [], 0, 0
    for place, size in enumerate(sizes[order].tolist()):
        count, total = count + 1, total + size
        if not fits(count, size, total):
            cuts.append(place)
            count, total = 1, size
    return np.split(order, cuts)


def gather(cache: Tensor, picked: Tensor) -> Tensor:
    """Blocks ``picked`` of [blocks, Hkv, ...] as [Hkv, picked, ...] in fp32, a copy.

    By indexing: index_select would first copy a cache with strides as a whole.
    """
    return cache.transpose(0, 1)[:, picked].float().contiguous()


def dequantise(
    keys: Tensor, values: Tensor, key_scale: Tensor | None, value_scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    if key_scale is None:
        return keys.float(), values.float()
    return keys.float() * key_scale.unsqueeze(-2), values.float() * value_scale.unsqueeze(-1)


def clear(keys: Tensor, values: Tensor, dead: np.ndarray) -> None:
    """Zero tokens that no query may see, as they may hold NaN. keys, values: [Hkv, n, L, D]; dead: [n, L]."""
    row, token = map(torch.from_numpy, np.nonzero(dead))
    for x in (keys, values):
        x[:, row, token] = 0


def softmax(
    q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float, soft_cap: float, causal: bool = False
) -> tuple[Tensor, Tensor]:
    """Output and LSE of queries [Hkv, n, G, T, D] over keys and values [Hkv, n, L, D].

    mask: added to the logits, [n, T or 1, L]. causal: T = L and query t sees keys 0..t.
    """
    heads, rows, group, queries, size = q.shape
    shape = (heads * rows, 1, group, size) if queries == 1 else (heads * rows, group, queries, size)
    flat = q.reshape(shape)
    keys, values = (x.reshape(heads * rows, 1, -1, size).expand(-1, shape[1], -1, -1) for x in (keys, values))
    if mask is not None:
        mask = mask.expand(heads, -1, -1, -1).reshape(heads * rows, 1, -1, mask.shape[-1])
    if soft_cap > 0:
        logits = soft_cap * torch.tanh(flat @ keys.mT * (scale / soft_cap))
        if causal:
            mask = torch.full((queries, queries), -math.inf).triu_(1)
        logits = logits if mask is None else logits + mask
        log_sum = torch.logsumexp(logits, -1)
        value = torch.exp(logits - log_sum.nan_to_num(neginf=0.0).unsqueeze(-1)) @ values
    else:
        value, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            flat, keys, values, is_causal=causal, attn_mask=mask, scale=scale
        )
        if mask is not None:  # it says 0 for a query that sees nothing
            log_sum = log_sum.masked_fill(mask.amax(-1) == -math.inf, -math.inf)
    return value.reshape(q.shape), log_sum.reshape(q.shape[:-1])


def merge(state: tuple[Tensor, Tensor], pick: np.ndarray, value: Tensor, log_sum: Tensor) -> None:
    """Put the softmax over more keys of the rows ``pick`` into theirs, in place."""
    rows = slice(None) if len(pick) == state[1].shape[1] else torch.from_numpy(pick)
    old = state[1][:, rows]
    total = torch.logaddexp(old, log_sum)
    state[0][:, rows] = state[0][:, rows] * torch.exp(old - total).unsqueeze(-1) + value * torch.exp(
        log_sum - total
    ).unsqueeze(-1)
    state[1][:, rows] = total
