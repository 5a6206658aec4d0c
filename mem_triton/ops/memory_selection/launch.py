"""Launches the selection kernel: grid and static configuration. Works on whatever the tensors lie on."""

from __future__ import annotations

import torch
from torch import Tensor

from mem_triton.ops.memory_selection.kernels import selection_weights_kernel

MAX_TOKENS = 512
"""Longest text whose logits fit a program's registers; the references of Memory³ have 128 tokens."""
QUERIES = 16  # the smallest tile a tensor core takes
OPTIONS = {"num_stages": 2, "enable_fp_fusion": True}


def warps(tokens: int) -> int:
    """Warps of a program: 4 up to 128 tokens, then as many as keep a thread's part of the logits."""
    return 4 if tokens <= 128 else 8


def constants(tokens: int, group: int, head_dim: int, normalize: bool, item_bytes: int) -> dict[str, int]:
    """The kernel's compile-time arguments. item_bytes: of an element of q and k."""
    return {
        "GROUP": group,
        "HEAD_DIM": head_dim,
        "NORMALIZE": normalize,
        "TOKENS": max(16, 1 << (tokens - 1).bit_length()),
        "QUERIES": QUERIES,
        "CHANNELS": 64 // item_bytes,  # fp32 dots run in registers, which are then full
    }


def log_weights(q: Tensor, k: Tensor, valid: Tensor | None, scale: float, normalize: bool) -> Tensor:
    """As ``selection_torch.log_weights``, one program a reference and KV head, one launch, no host sync."""
    batch, tokens, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    out = torch.empty(batch, kv_heads, tokens, dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out
    flags = None if valid is None else valid.contiguous().view(torch.int8)
    fixed = constants(tokens, heads // kv_heads, head_dim, normalize, q.element_size())
    selection_weights_kernel[(batch, kv_heads)](
        q,
        k,
        flags,
        out,
        scale,
        tokens,
        *q.stride()[:3],
        *k.stride()[:3],
        tokens,
        **fixed,
        num_warps=warps(tokens),
        **OPTIONS,
    )
    return out
