"""Arguments of ``delta_rule_paged`` that belong together."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class StateBatch(NamedTuple):
    """One step of N rows (requests) and where their states are; read and updated in place.

    gate_bias: fp32 [bias_width].
    state_cache: fp32 [blocks, cells, H*r*r]; cell (b, i) holds the state after the last processed token among the
    ``tokens_per_state`` tokens i of block b. block_table: int32 [N, max_blocks]; block 0 holds no state, takes none.
    query_start_loc: int32 [N + 1]; row n has tokens [n] ... [n + 1] - 1, none = the row is padding and is not touched.
    seq_lens: int32 [N], each row's length after this step. A row that has no tokens behind it starts from
    ``initial_states[initial_slot]`` (fp32 [S, H*r*r], int32 [N]; -1 = zeros), any other from its last token's cell.
    write_enabled: int32 [N]; 0 = the row's state stays as it is: it is read, and carried from cell to cell unchanged.
    last_states: fp32 [S, 2, H*r*r]; a row with a slot leaves the state after its last token at [slot, (len - 1) % 2].
    """

    gate_bias: Tensor
    state_cache: Tensor
    block_table: Tensor
    query_start_loc: Tensor
    seq_lens: Tensor
    initial_states: Tensor | None = None
    initial_slot: Tensor | None = None
    write_enabled: Tensor | None = None
    last_states: Tensor | None = None
