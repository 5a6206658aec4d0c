"""Keeps δ-mem's states beside SGLang's KV cache: an fp32 state a KV page and layer, as long as the page's tokens.

The state of a page is the one after its last processed token. Whatever SGLang does with pages, sharing a prefix,
retracting a request, evicting, it does with their states; no bookkeeping of ours can go wrong. SGLang's own pool for
recurrent states (Mamba) keeps few snapshots, forbids pages or overlap scheduling with some settings, and asks for a
model class of its own; a state of 256 bytes a head is small enough to be kept everywhere.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mem_triton.ops.attention_inputs import HeadInputs, attention_inputs
from mem_triton.ops.delta_rule import DeltaRuleSpec, StateBatch, delta_rule_paged
from mem_triton.systems.delta_mem.slots import StateSlots
from mem_triton_sglang.step import Step


class DeltaStates:
    """cells: fp32 [layers, pages, 1, H*r*r], there once the KV cache is; page 0 is SGLang's padding and holds none.

    slots: what running requests start from and leave behind.
    """

    def __init__(self, spec: DeltaRuleSpec, slots: StateSlots, layers: int, page_size: int) -> None:
        self.spec, self.slots, self.layers, self.page_size = spec, slots, layers, page_size
        self.cells: Tensor | None = None
        self.inputs: dict[int, HeadInputs] = {}  # layers whose corrections are added in the launch that steps

    def prepare_layer(self, layer: int, inputs: HeadInputs) -> None:
        """From now on the launch that steps a layer's states also does this to its heads (``prepare``)."""
        self.inputs[layer] = inputs

    @property
    def bytes_per_token(self) -> int:
        """Share of the states in a token's memory, rounded up."""
        return -(-self.layers * self.spec.state_size * 4 // self.page_size)

    def allocate(self, kv_slots: int, device: torch.device) -> None:
        """Make room for the states of ``kv_slots`` tokens, SGLang's padding page included."""
        pages = -(-kv_slots // self.page_size)
        self.cells = torch.zeros(self.layers, pages, 1, self.spec.state_size, dtype=torch.float32, device=device)

    def advance(self, layer: int, projections: Tensor, gate_bias: Tensor, reads: Tensor, step: Step | None) -> None:
        """Read and update one layer's states. projections: [tokens, P]; reads: fp32 [>= tokens, H*r], written."""
        batch, layout = self._batch(layer, gate_bias, step)
        delta_rule_paged(projections, reads, batch, self.spec, **layout)

    def prepare(
        self,
        layer: int,
        qkv: Tensor,
        projections: Tensor,
        gate_bias: Tensor,
        reads: Tensor,
        rounded: Tensor | None,
        step: Step | None,
    ) -> None:
        """``advance``, and the corrections of q | k | v, [tokens, q + k + v], in place. rounded: reads for Δo."""
        batch, layout = self._batch(layer, gate_bias, step)
        attention_inputs(qkv, projections, reads, self.inputs[layer], batch, self.spec, rounded=rounded, **layout)

    def _batch(self, layer: int, gate_bias: Tensor, step: Step | None) -> tuple[StateBatch, dict[str, int]]:
        """A layer's states in this step, and how they lie."""
        if self.cells is None or step is None:
            raise RuntimeError("δ-mem: a forward pass came before the KV cache or without mem_triton's backend")
        rows, slots = step.seq_lens.shape[0], self.slots
        batch = StateBatch(
            gate_bias,
            self.cells[layer],
            step.block_table,
            step.query_start_loc,
            step.seq_lens,
            slots.initial[layer],
            slots.row_slot[:rows],
            slots.row_write[:rows],
            slots.last[layer],
        )
        layout = {"block_size": self.page_size, "tokens_per_state": self.page_size}
        return batch, {**layout, "max_query_len": step.max_query_len, "batch_invariant": slots.batch_invariant}
