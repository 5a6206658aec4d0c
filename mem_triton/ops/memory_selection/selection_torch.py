"""Selection in torch, references and heads at once: for a CPU, and for texts that are too long for the kernel."""

from __future__ import annotations

import torch
from torch import Tensor

SCRATCH_BYTES = 64 << 20  # of logits at a time


def log_weights(q: Tensor, k: Tensor, valid: Tensor, scale: float, normalize: bool) -> Tensor:
    """ln of every token's weight, fp32 [B, Hkv, T]; arguments as ``op.selection_weights`` has them.

    Computed in fp64 and rounded to fp32: equal tokens (in a model's first layer, every repetition of a word) get equal
    weights in whatever order the sums run, and a reference the same picks alone, in a batch, and behind padding.
    """
    batch, tokens, heads, _ = q.shape
    kv_heads = k.shape[2]
    out = torch.empty(batch, kv_heads, tokens, dtype=torch.float32, device=q.device)
    cells = max(1, SCRATCH_BYTES // max(1, heads * tokens * 8))  # queries whose logits fit, over references
    step = max(1, cells // max(1, tokens))
    for first in range(0, batch, step):
        some = slice(first, first + step)
        real = valid[some]  # [b, T]
        keys = k[some].double().masked_fill(~real[:, :, None, None], 0).transpose(1, 2)  # [b, Hkv, T, D]
        total = keys.new_full((len(real), kv_heads, tokens), -torch.inf)
        for begin in range(0, tokens, cells):
            looks = real[:, begin : begin + cells, None, None]
            queries = q[some, begin : begin + cells].double().masked_fill(~looks, 0)
            queries = queries.unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4)  # [b, Hkv, group, queries, D]
            logits = queries @ keys[:, :, None].mT
            logits = logits.mul_(scale).masked_fill_(~real[:, None, None, None, :], -torch.inf)
            if normalize:
                logits -= logits.logsumexp(-1, keepdim=True)  # NaN where nobody is seen, masked in the next line
            logits.masked_fill_(~looks.permute(0, 2, 3, 1).unsqueeze(-1), -torch.inf)
            total = torch.logaddexp(total, logits.flatten(2, 3).logsumexp(2))
        out[some] = total.float()
    return out


def top_tokens(weights: Tensor, valid: Tensor, keep: int) -> Tensor:
    """int32 [B, Hkv, keep]: as ``reference.top_tokens``, without a host sync."""
    tokens = weights.shape[-1]
    order = weights.masked_fill(~valid[:, None, :], -torch.inf)
    order = order.sort(dim=-1, descending=True, stable=True).indices[..., :keep]  # stable: ties go to the lower index
    # A valid token may itself weigh -inf; only the number of valid tokens tells how many picks are real.
    order = torch.where(valid[:, None, :].expand_as(weights).gather(-1, order), order, tokens)
    picks = order.sort(dim=-1).values
    picks = torch.where(picks < tokens, picks, -1).int()
    return torch.nn.functional.pad(picks, (0, max(0, keep - tokens)), value=-1)
