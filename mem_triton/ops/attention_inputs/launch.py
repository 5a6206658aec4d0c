"""Launches of ``attention_inputs`` on a GPU: one for decode, the delta rule's own and one more for longer queries."""

from __future__ import annotations

import torch
from torch import Tensor

from mem_triton.ops.attention_inputs.kernels import inputs_kernel
from mem_triton.ops.attention_inputs.types import HeadInputs
from mem_triton.ops.common.kept import kept
from mem_triton.ops.delta_rule import launch as delta_rule_launch
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
    arguments, constants = kernel_arguments(
        qkv, projections, reads, rounded, inputs, batch, spec, block_size, tokens_per_state, counter if step else None
    )
    warps = tuning.warps(constants["PAIR_BLOCK"], constants["ROWS"])
    inputs_kernel[(rows if step else tokens, heads)](**arguments, **constants, num_warps=warps, **OPTIONS)


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
) -> tuple[dict, dict]:
    """The kernel's runtime and compile-time arguments by name; with a counter the kernel advances the states itself."""
    first, heads = inputs.touched()
    pairs = (inputs.rotated or inputs.head_dim // 2 * 2) // 2
    rest = inputs.head_dim - 2 * pairs
    power = lambda n: 1 << (n - 1).bit_length()  # noqa: E731
    arguments = {
        "qkv": qkv,
        "projections": projections,
        "reads": reads,
        "rounded": rounded,
        "delta": inputs.delta,
        "q_norm": inputs.q_norm,
        "k_norm": inputs.k_norm,
        "cos_sin": inputs.cos_sin,
        **batch._asdict(),
        "counter": counter,
        "num_rows": batch.seq_lens.shape[0],
        "eps": inputs.eps,
        "stride_qkv": qkv.stride(0),
        "stride_token": projections.stride(0),
        "stride_read": reads.stride(0),
        "stride_cos_sin": inputs.cos_sin.stride(0) if inputs.cos_sin is not None else 0,
        "stride_block": batch.state_cache.stride(0),
        "stride_cell": batch.state_cache.stride(1),
        "stride_table": batch.block_table.stride(0),
    }
    constants = {
        "Q_HEADS": inputs.heads,
        "KV_HEADS": inputs.kv_heads,
        "HEAD_DIM": inputs.head_dim,
        "FIRST": first,
        "PROGRAMS": heads,
        **{f"CORRECT_{x.upper()}": x in inputs.corrects for x in "qkv"},
        "STEP": counter is not None,
        "PAIRS": pairs,
        "PAIR_BLOCK": power(pairs),
        "REST_BLOCK": power(rest) if rest else 0,
        "INTERLEAVED": inputs.interleaved,
        "ROWS": power(spec.read_width),
        **delta_rule_launch.constants(spec, block_size, tokens_per_state),
    }
    return arguments, constants
