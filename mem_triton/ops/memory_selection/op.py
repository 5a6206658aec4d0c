"""``select_tokens``, and ``mem_triton::selection_weights`` beneath it, the part with a Triton kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from mem_triton.ops.memory_selection import selection_torch
from mem_triton.ops.memory_selection.reference import MODES, Mode

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_SCHEMA = "selection_weights(Tensor q, Tensor k, Tensor? valid, *, float scale, bool normalize) -> Tensor"


def select_tokens(
    q: Tensor,
    k: Tensor,
    *,
    keep: int = 8,
    valid: Tensor | None = None,
    mode: Mode = "softmax",
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Select the tokens that each KV head of each reference keeps: the most attended (Memory³, arXiv 2407.01178).

    q: [B, T, Hq, D], k: [B, T, Hkv, D], of one float dtype, **before RoPE** (after q/k norms), any strides but the
    last. Query heads h * Hq // Hkv ... share KV head h; their weights are added. keep: tokens to keep.
    valid: bool [B, T]; False = padding, or the prefix in BOS's place: never kept and not asked. None = all.
    mode: "softmax" as in the paper's definition, "exp_sum" as it ships, without the normaliser.
    scale: of the logits; None = D**-0.5.

    Returns indices int32 [B, Hkv, keep], ascending, -1 behind a short reference's last token; and int32 [B], how many
    there are: min(keep, valid tokens), the same in all heads. Equal weights: the lower index. No host sync on a GPU.
    ValueError names the argument that does not fit. Example::

        indices, count = select_tokens(q, k, keep=8, valid=mask)
    """
    check(q, k, valid, keep, mode)
    if valid is None:
        valid = torch.ones(q.shape[:2], dtype=torch.bool, device=q.device)
    weights = selection_weights(q, k, valid, scale=scale, mode=mode)
    return selection_torch.top_tokens(weights, valid, keep), valid.sum(1).clamp(max=keep).int()


def selection_weights(
    q: Tensor, k: Tensor, valid: Tensor | None = None, *, scale: float | None = None, mode: Mode = "softmax"
) -> Tensor:
    """Return ln of each token's weight, fp32 [B, Hkv, T], -inf where not valid. Arguments as for ``select_tokens``."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    # The op boundary is for tracers (torch.compile, fake tensors) only.
    traced = torch.compiler.is_compiling() or type(q) is not Tensor
    run = torch.ops.mem_triton.selection_weights if traced else _run
    return run(q, k, valid, scale=scale, normalize=mode == "softmax")


def _run(q: Tensor, k: Tensor, valid: Tensor | None, *, scale: float, normalize: bool) -> Tensor:
    check(q, k, valid)
    if q.device.type != "cpu" and q.dtype != torch.float64:
        from mem_triton.ops.memory_selection import launch  # Triton is there on Linux only

        if q.shape[1] <= launch.MAX_TOKENS:
            return launch.log_weights(q, k, valid, scale, normalize)
    if valid is None:
        valid = torch.ones(q.shape[:2], dtype=torch.bool, device=q.device)
    return selection_torch.log_weights(q, k, valid, scale, normalize)


def check(q: Tensor, k: Tensor, valid: Tensor | None, keep: int = 1, mode: str = "softmax") -> None:
    """Raise a ValueError that names the first argument that the op cannot take."""
    if q.dim() != 4 or q.dtype not in FLOATS:
        raise ValueError(f"q: {q.dtype} {tuple(q.shape)}, expected floats [B, T, Hq, D]")
    if k.dim() != 4 or k.shape[:2] != q.shape[:2] or k.shape[3] != q.shape[3]:
        raise ValueError(f"k: shape {tuple(k.shape)}, expected [B, T, Hkv, D] to go with q {tuple(q.shape)}")
    if k.shape[2] == 0 or q.shape[2] % k.shape[2]:
        raise ValueError(f"q: {q.shape[2]} heads are not a multiple of the {k.shape[2]} KV heads")
    if k.dtype != q.dtype:
        raise ValueError(f"k: dtype {k.dtype}, q has {q.dtype}")
    for name, tensor in (("q", q), ("k", k)):
        if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise ValueError(f"{name}: the last dimension must be contiguous, its stride is {tensor.stride(-1)}")
    for name, tensor in (("k", k), ("valid", valid)):
        if tensor is not None and tensor.device != q.device:
            raise ValueError(f"{name}: on {tensor.device}, q on {q.device}")
    if valid is not None and (valid.dtype != torch.bool or valid.shape != q.shape[:2]):
        raise ValueError(f"valid: {valid.dtype} {tuple(valid.shape)}, expected bool {tuple(q.shape[:2])}")
    if keep < 1:
        raise ValueError(f"keep={keep}: must be at least 1")
    if mode not in MODES:
        raise ValueError(f"mode={mode!r}: expected one of {MODES}")


_LIBRARY = torch.library.Library("mem_triton", "FRAGMENT")
_LIBRARY.define(_SCHEMA)
for _device in ("CPU", "CUDA"):
    _LIBRARY.impl("selection_weights", _run, _device)


@torch.library.register_fake("mem_triton::selection_weights", lib=_LIBRARY)
def _fake(q, k, valid, *, scale, normalize):
    return q.new_empty(q.shape[0], k.shape[2], q.shape[1], dtype=torch.float32)
