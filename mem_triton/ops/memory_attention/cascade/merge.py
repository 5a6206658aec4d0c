"""The merge of two partial softmaxes: attention over two sets of keys from attention over each, by log-sum-exp.

With o_i the output and l_i the log-sum-exp over set i, the output over both is
(e^l_a o_a + e^l_b o_b) / (e^l_a + e^l_b) and its log-sum-exp log(e^l_a + e^l_b): exact, commutative, associative; a
set without keys (-inf) changes nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor


def merge_states(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, out: Tensor, lse: Tensor | None = None
) -> None:
    """Merge attention over two sets of keys into ``out`` and, if given, ``lse``.

    out_a, out_b, out: [T, Hq, D] in fp32, bf16 or fp16 (fp64 on a CPU), any strides but the last; lse_*: fp32 [T, Hq]
    (fp64 on a CPU), natural logarithms, any strides. ``out`` and ``lse`` may be those of a or of b. Where a side's
    log-sum-exp is -inf its output is not looked at, and the other's is taken bit by bit; +inf, FlashAttention 2's word
    for no keys, counts as -inf. Both -inf: 0 and -inf. ValueError names the tensor that does not fit. Example::

        merge_states(context_out, context_lse, memory_out, memory_lse, context_out)
    """
    for name, tensor, shape in (
        ("out_a", out_a, out.shape),
        ("out_b", out_b, out.shape),
        ("lse_a", lse_a, out.shape[:2]),
        ("lse_b", lse_b, out.shape[:2]),
        ("lse", lse, out.shape[:2]),
    ):
        if tensor is not None and (tensor.shape != shape or tensor.device != out.device):
            raise ValueError(
                f"{name}: {tuple(tensor.shape)} on {tensor.device}, expected {tuple(shape)} on {out.device}"
            )
        if tensor is not None and tensor.dim() == 3 and tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            raise ValueError(f"{name}: the last dimension must be contiguous, its stride is {tensor.stride(-1)}")
    if out.device.type == "cpu":
        _merge_in_torch(out_a, lse_a, out_b, lse_b, out, lse)
    else:
        from mem_triton.ops.memory_attention.cascade import launch as cascade_launch  # Triton is there on Linux only

        cascade_launch.merge(out_a, lse_a, out_b, lse_b, out, lse)


def _merge_in_torch(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, out: Tensor, lse: Tensor | None
) -> None:
    exact = torch.promote_types(torch.promote_types(out_a.dtype, lse_a.dtype), torch.float32)
    a, b = (x.to(exact).masked_fill(x == torch.inf, -torch.inf) for x in (lse_a, lse_b))
    top = torch.maximum(a, b)
    none = top == -torch.inf
    anchor = top.masked_fill(none, 0)
    weights = [torch.exp(x - anchor) for x in (a, b)]
    total = (weights[0] + weights[1]).masked_fill(none, 1)
    shares = [(w / total).unsqueeze(-1) for w in weights]
    blind_a, blind_b = ((x == -torch.inf) for x in (a, b))
    x, y = (o.to(exact).masked_fill(blind.unsqueeze(-1), 0) for o, blind in ((out_a, blind_a), (out_b, blind_b)))
    out.copy_(_pick(blind_a.unsqueeze(-1), blind_b.unsqueeze(-1), x, y, x * shares[0] + y * shares[1]))
    if lse is not None:
        lse.copy_(_pick(blind_a, blind_b, a, b, anchor + torch.log(total)))


def _pick(blind_a: Tensor, blind_b: Tensor, a: Tensor, b: Tensor, both: Tensor) -> Tensor:
    return torch.where(blind_b, a, torch.where(blind_a, b, both))
