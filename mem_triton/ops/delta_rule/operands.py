"""What the delta rule's kernels take, in groups: Triton takes tuples apart when it compiles a kernel.

A field that is None, 1 or a ``tl.constexpr`` (in capitals) is a constant of the compiled kernel, and of other integers
it knows whether 16 divides them, as of arguments that stand alone. ``do_not_specialize`` does not reach into tuples: so
what changes from step to step stands alone.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

from mem_triton.ops.common.constants import constants
from mem_triton.ops.delta_rule.reference import MODES, DeltaRuleSpec
from mem_triton.ops.delta_rule.types import StateBatch


class Batch(NamedTuple):
    """``StateBatch`` and strides of its cache; the block table's stands alone."""

    gate_bias: Any
    state_cache: Any
    block_table: Any
    query_start_loc: Any
    seq_lens: Any
    initial_states: Any
    initial_slot: Any
    write_enabled: Any
    last_states: Any
    stride_block: Any
    stride_cell: Any


class Rule(NamedTuple):
    """What an adapter and a cache layout fix."""

    RANK: Any
    HEADS: Any
    WIDTH: Any  # state rows: HEADS * RANK
    RANKWISE: Any
    COUPLED: Any
    MODE: Any  # see ``reference.MODES``
    NORMALIZE: Any
    BLOCK_SIZE: Any
    TOKENS_PER_STATE: Any


def batch_of(batch: StateBatch) -> Batch:
    return Batch(*batch, *batch.state_cache.stride()[:2])


@functools.lru_cache(maxsize=256)
def rule_of(spec: DeltaRuleSpec, block_size: int, tokens_per_state: int) -> Rule:
    numbers = (
        spec.rank,
        spec.heads,
        spec.read_width,
        spec.rankwise_gates,
        spec.couple_lambda,
        MODES[spec.update_mode],
        spec.normalize_qk,
        block_size,
        tokens_per_state,
    )
    return constants(Rule, *numbers)
