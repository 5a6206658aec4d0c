"""Which tokens of a reference its memory keeps (Memory³, arXiv 2407.01178, section 3): the specification.

A KV head keeps the tokens that attract the most attention when every token of the reference looks at all of them, later
ones included, without position encoding:

    w_j = sum over the group's query heads h and tokens i of softmax_j(scale * q_hi . k_j)      mode "softmax"
    w_j = the same sum of exp(scale * q_hi . k_j)                                               mode "exp_sum"

Tokens that are not valid (padding, the prefix in BOS's place) neither look nor are looked at. Weights are kept as
logarithms: exp would overflow, and a maximum taken off would make the small ones equal.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Mode = Literal["softmax", "exp_sum"]
MODES = ("softmax", "exp_sum")


def log_weights(q: Tensor, k: Tensor, valid: Tensor, scale: float, mode: Mode) -> Tensor:
    """ln w_j of one reference, head by head; -inf where a token is not valid.

    q: [T, Hq, D]; k: [T, Hkv, D], of any float dtype, before RoPE; valid: bool [T]. Returns [Hkv, T].
    """
    tokens, kv_heads, _ = k.shape
    group = q.shape[1] // kv_heads
    out = k.new_full((kv_heads, tokens), -torch.inf)
    chosen = valid.nonzero()[:, 0]
    for head in range(kv_heads if len(chosen) else 0):
        terms = []
        for query_head in range(head * group, (head + 1) * group):
            logits = scale * q[chosen, query_head] @ k[chosen, head].T  # [i, j]
            terms.append(logits.log_softmax(-1) if mode == "softmax" else logits)
        out[head, chosen] = torch.cat(terms).logsumexp(0)
    return out


def top_tokens(weights: Tensor, valid: Tensor, keep: int) -> Tensor:
    """The ``keep`` largest valid tokens of each head, ascending, the lower index where weights are equal.

    weights: [Hkv, T]; valid: bool [T]. Returns int32 [Hkv, keep], filled up with -1 behind the last token.
    """
    chosen = valid.nonzero()[:, 0].tolist()
    out = torch.full((len(weights), keep), -1, dtype=torch.int32)
    for head, row in enumerate(weights.tolist()):
        picks = sorted(sorted(chosen, key=lambda j, row=row: (-row[j], j))[:keep])
        out[head, : len(picks)] = torch.tensor(picks, dtype=torch.int32)
    return out
