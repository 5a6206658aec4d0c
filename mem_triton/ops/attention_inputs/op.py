"""``attention_inputs``: what δ-mem adds between a fused projection and attention, and the model's own norm and RoPE.

For engines: state step, Δq, Δk and Δv, q/k norm and rotary embedding in one launch where the model alone takes one or
two. On a CPU it is the delta rule's own code and the reference.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mem_triton.ops.attention_inputs.reference import attention_inputs_reference
from mem_triton.ops.attention_inputs.types import HeadInputs
from mem_triton.ops.common.checks import FLOATS
from mem_triton.ops.delta_rule.op import check as check_states
from mem_triton.ops.delta_rule.op import delta_rule_paged
from mem_triton.ops.delta_rule.reference import DeltaRuleSpec
from mem_triton.ops.delta_rule.types import StateBatch


def attention_inputs(
    qkv: Tensor,
    projections: Tensor,
    reads: Tensor,
    inputs: HeadInputs,
    batch: StateBatch,
    spec: DeltaRuleSpec,
    *,
    block_size: int,
    tokens_per_state: int,
    max_query_len: int,
    rounded: Tensor | None = None,
    batch_invariant: bool = False,
) -> None:
    """Turn a step's fused projection into what attention takes, in place (δ-mem, arXiv 2605.12357, section 3).

    qkv: [T, >= (Hq + 2 Hkv) * D] fp32, bf16 or fp16, columns q | k | v; further columns are left alone.
    projections: [T, P], as in ``delta_rule_paged``; may be further columns of the tensor that qkv is a part of.
    reads: fp32 [>= T, H*r], written. The states of ``batch`` advance by the step's tokens.
    rounded: [>= T, H*r] in any float dtype, contiguous: the reads once more, for a product with Δo's weight.
    A token's position is its place in its row, from ``seq_lens``. T may exceed the batch's tokens.
    block_size, tokens_per_state, max_query_len, batch_invariant: as in ``delta_rule_paged``.

    Example::

        projected = hidden @ torch.cat([w_qkv, adapter.down]).T                # one matmul for both
        attention_inputs(projected, projected[:, inputs.width :], reads, inputs, batch, spec, block_size=16,
                         tokens_per_state=16, max_query_len=1)
        q, k, v = projected[:, : inputs.width].split(sizes, dim=-1)

    No host sync on a GPU. ValueError names what does not fit.
    """
    check(qkv, projections, reads, rounded, inputs, batch, spec, block_size, tokens_per_state)
    if qkv.device.type != "cpu":
        from mem_triton.ops.attention_inputs import launch  # Triton is there on Linux only

        launch.prepare(
            qkv,
            projections,
            reads,
            inputs,
            batch,
            spec,
            block_size,
            tokens_per_state,
            max_query_len,
            rounded=rounded,
            batch_invariant=batch_invariant,
        )
        return
    delta_rule_paged(
        projections,
        reads,
        batch,
        spec,
        block_size=block_size,
        tokens_per_state=tokens_per_state,
        max_query_len=max_query_len,
        batch_invariant=batch_invariant,
    )
    starts, tokens = batch.query_start_loc.long(), int(batch.query_start_loc[-1])
    lengths = starts.diff()
    offset = torch.repeat_interleave(batch.seq_lens.long() - lengths - starts[:-1], lengths)
    if rounded is not None:
        rounded[:tokens] = reads[:tokens]
    own = qkv[:tokens, : inputs.width]
    own.copy_(attention_inputs_reference(own.float(), reads[:tokens], torch.arange(tokens) + offset, inputs))


def check(
    qkv: Tensor,
    projections: Tensor,
    reads: Tensor,
    rounded: Tensor | None,
    inputs: HeadInputs,
    batch: StateBatch,
    spec: DeltaRuleSpec,
    block_size: int,
    tokens_per_state: int,
) -> None:
    """Raise a ValueError that names the first argument that the op cannot take."""
    check_states(projections, reads, batch, spec, block_size, tokens_per_state)
    if qkv.dim() != 2 or qkv.shape[0] != projections.shape[0] or qkv.shape[1] < inputs.width:
        raise ValueError(
            f"qkv: shape {tuple(qkv.shape)}, expected {projections.shape[0]} tokens x at least {inputs.width} columns"
        )
    if qkv.stride(1) != 1:
        raise ValueError(f"qkv: the columns must be contiguous, their stride is {qkv.stride(1)}")
    if qkv.dtype not in FLOATS:
        raise ValueError(f"qkv: dtype {qkv.dtype}, expected float32, bfloat16 or float16")
    if rounded is not None and (
        len(rounded) < len(qkv) or rounded.shape[1:] != reads.shape[1:] or not rounded.is_contiguous()
    ):
        raise ValueError(
            f"rounded: shape {tuple(rounded.shape)}, expected a contiguous one of at least {len(qkv)} tokens x "
            f"{spec.read_width} columns"
        )
    if set(inputs.corrects) - set("qkv") or inputs.corrects != "".join(sorted(inputs.corrects, key="qkv".index)):
        raise ValueError(f"inputs.corrects: {inputs.corrects!r}, expected letters of 'qkv' in this order")
    rows = sum(inputs.part(letter)[1] for letter in inputs.corrects) * inputs.head_dim
    if inputs.rotated % 2 or inputs.rotated > inputs.head_dim:
        raise ValueError(f"inputs.cos_sin: {inputs.rotated} columns, expected an even number <= {inputs.head_dim}")
    for name, tensor, shape in (
        ("delta", inputs.delta, (rows, spec.read_width) if rows else None),
        ("q_norm", inputs.q_norm, (inputs.head_dim,)),
        ("k_norm", inputs.k_norm, (inputs.head_dim,)),
    ):
        if tensor is None and not (name == "delta" and rows):
            continue
        if tensor is None or shape is None or tensor.shape != shape or not tensor.is_contiguous():
            found = "None" if tensor is None else f"shape {tuple(tensor.shape)}, strides {tensor.stride()}"
            raise ValueError(f"inputs.{name}: {found}, expected a contiguous {shape}")
    for name, tensor in (
        ("qkv", qkv),
        ("rounded", rounded),
        ("inputs.delta", inputs.delta),
        ("inputs.cos_sin", inputs.cos_sin),
    ):
        if tensor is not None and tensor.device != projections.device:
            raise ValueError(f"{name}: on {tensor.device}, projections on {projections.device}")
