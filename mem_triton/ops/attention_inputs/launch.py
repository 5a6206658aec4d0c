"""Launches of ``attention_inputs`` on a GPU: one for decode, the delta rule's own and one more for longer queries."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from mem_triton.ops.attention_inputs.kernels import inputs_kernel
from mem_triton.ops.attention_inputs.types import HeadInputs
from mem_triton.ops.common.constants import constants
from mem_triton.ops.common.kept import kept
from mem_triton.ops.delta_rule import launch as delta_rule_launch
from mem_triton.ops.delta_rule.operands import batch_of, rule_of
from mem_triton.ops.delta_rule.reference import DeltaRuleSpec
from mem_triton.ops.delta_rule.types import StateBatch
from mem_triton.ops.tuning import attention_inputs as tuning
from mem_triton.ops.tuning.delta_rule import DeltaRuleConfig

MAX_ROWS = 1 << 16  # of a batch; the counters of one stream take 256 KiB
OPTIONS = delta_rule_launch.OPTIONS


def prepare(
    qkv: Tensor,
    projections: Tensor,
    reads: Tensor,
    inputs: HeadInputs,
    batch: StateBatch,
    spec: DeltaRuleSpec,
    block_size: int,
    tokens_per_state: int,
    max_query_len: int,
    rounded: Tensor | None = None,
    counter: Tensor | None = None,
    config: DeltaRuleConfig | None = None,
    batch_invariant: bool = False,
) -> None:
    """Arguments as in ``op.attention_inputs``, already checked. counter: int32 zeros, one a row; None = this stream's.
    config: of the delta rule's own kernels."""
    tokens, rows, heads = qkv.shape[0], batch.seq_lens.shape[0], inputs.touched()[1]
    if tokens == 0 or rows == 0:
        return
    # Batch-invariant: the delta rule's kernel for every row, as the one launch can only take batches of single tokens.
    step = max_query_len == 1 and heads > 0 and tuning.steps_inside(spec.state_size, spec.read_width)
    step = step and not batch_invariant
    if not step:
        longest = 1 if batch_invariant else max_query_len
        delta_rule_launch.step_rows(projections, reads, batch, spec, block_size, tokens_per_state, longest, config)
    if not heads:
        if rounded is not None:
            rounded[:tokens].copy_(reads[:tokens])
        return
    if step and counter is None:
        counter = counter_for(qkv.device, rows)
    arguments = kernel_arguments(
        qkv, projections, reads, rounded, inputs, batch, spec, block_size, tokens_per_state, counter if step else None
    )
    layer = arguments["LAYER"]
    warps = tuning.warps(layer.PAIR_BLOCK.value, layer.ROWS.value)
    inputs_kernel[(rows if step else tokens, heads)](**arguments, num_warps=warps, **OPTIONS)


def counter_for(device: torch.device, rows: int) -> Tensor:
    """Zeros that launches of the current stream count in and leave as zeros."""
    if rows > MAX_ROWS:
        raise ValueError(f"seq_lens: {rows} rows, at most {MAX_ROWS}")
    return kept(device, "attention_inputs", lambda: torch.zeros(MAX_ROWS, dtype=torch.int32, device=device))


def kernel_arguments(
    qkv: Tensor,
    projections: Tensor,
    reads: Tensor,
    rounded: Tensor | None,
    inputs: HeadInputs,
    batch: StateBatch,
    spec: DeltaRuleSpec,
    block_size: int,
    tokens_per_state: int,
    counter: Tensor | None,
) -> dict[str, Any]:
    """The kernel's arguments by name; with a counter the kernel advances the states itself."""
    stride_cos_sin = inputs.cos_sin.stride(0) if inputs.cos_sin is not None else 0
    return {
        "qkv": qkv,
        "projections": projections,
        "reads": reads,
        "rounded": rounded,
        "inputs": Inputs(inputs.delta, inputs.q_norm, inputs.k_norm, inputs.cos_sin, inputs.eps, stride_cos_sin),
        "batch": batch_of(batch),
        "counter": counter,
        "num_rows": batch.seq_lens.shape[0],
        "stride_qkv": qkv.stride(0),
        "stride_token": projections.stride(0),
        "stride_read": reads.stride(0),
        "stride_table": batch.block_table.stride(0),
        "LAYER": layer_of(inputs, spec.read_width, counter is not None),
        "RULE": rule_of(spec, block_size, tokens_per_state),
    }


class Inputs(NamedTuple):
    """Tensors of ``HeadInputs``, each of which may be None."""

    delta: Any
    q_norm: Any
    k_norm: Any
    cos_sin: Any
    eps: Any
    stride_cos_sin: Any


class Layer(NamedTuple):
    """Compile-time numbers of a layer."""

    Q_HEADS: Any
    KV_HEADS: Any
    HEAD_DIM: Any
    FIRST: Any  # head that anything happens to
    PROGRAMS: Any  # heads from there on
    CORRECT_Q: Any
    CORRECT_K: Any
    CORRECT_V: Any
    STEP: Any
    PAIRS: Any  # of channels
    PAIR_BLOCK: Any
    REST_BLOCK: Any
    INTERLEAVED: Any
    ROWS: Any


def layer_of(inputs: HeadInputs, read_width: int, step: bool) -> Layer:
    pairs = (inputs.rotated or inputs.head_dim // 2 * 2) // 2
    rest = inputs.head_dim - 2 * pairs
    power = lambda n: 1 << (n - 1).bit_length()  # noqa: E731
    numbers = (
        inputs.heads,
        inputs.kv_heads,
        inputs.head_dim,
        *inputs.touched(),
        *(x in inputs.corrects for x in "qkv"),
        step,
        pairs,
        power(pairs),
        power(rest) if rest else 0,
        inputs.interleaved,
        power(read_width),
    )
    return constants(Layer, *numbers)
