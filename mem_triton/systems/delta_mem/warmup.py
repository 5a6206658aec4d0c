"""Launches δ-mem's kernels for a warm-up, on values that are not used, with the strides that serving will have."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mem_triton.ops.delta_rule import DeltaRuleSpec
from mem_triton.systems.delta_mem.folding import columns


def launch(
    spec: DeltaRuleSpec,
    tokens: int,
    dtype: torch.dtype,
    device: torch.device,
    step: Callable[[Tensor, Tensor, Tensor], None],
    prepare: Callable[[Tensor, Tensor, Tensor, Tensor], None],
    width: int | None,
) -> None:
    """Launch what one layer's states launch in a step of ``tokens`` tokens.

    width: columns of q, k and v where one launch prepares them for attention, None where it does not. step: called with
    (projections [tokens, P], gate bias, reads [tokens, H*r] fp32). prepare: with (q | k | v [tokens, width],
    projections, gate bias, reads), as one matmul gives both and as two do.
    """
    reads = torch.empty(tokens, spec.read_width, device=device)
    bias = torch.zeros(spec.bias_width, device=device)
    apart = torch.empty(tokens, spec.projection_width, dtype=dtype, device=device)
    if width is None:
        step(apart, bias, reads)
        return
    whole = torch.empty(tokens, columns(width, spec.projection_width), dtype=dtype, device=device)
    prepare(whole[:, :width], whole[:, width : width + spec.projection_width], bias, reads)
    prepare(torch.empty(tokens, width, dtype=dtype, device=device), apart, bias, reads)
