"""One attention module with memory: hooks that read, correct and write around its projections.

The module itself stays as it is. Its input feeds the delta rule; the outputs of q_proj, k_proj and v_proj are
corrected before the module's own q_norm, k_norm and RoPE, and that of o_proj after it. A projection whose head the
adapter leaves alone gets no hook.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mem_triton.ops.delta_rule.reference import DeltaRuleInputs, activate
from mem_triton.ops.delta_rule.stepwise import scan
from mem_triton.systems.delta_mem import DeltaMemConfig, DeltaMemLayerWeights
from mem_triton_transformers.call import ModelCall


class DeltaLayer:
    """State and hooks of one attention module.

    name: the module's name in the adapter. packed: gives the packed weights; called on every forward if trainable,
    else once per device and dtype. state: [B, H, r, r] in fp32 (fp64 in an fp64 model), None = zeros.
    """

    def __init__(
        self,
        name: str,
        config: DeltaMemConfig,
        packed: Callable[[], DeltaMemLayerWeights],
        call: ModelCall,
        trainable: bool = False,
    ) -> None:
        self.name = name
        self.config = config
        self.packed = packed
        self.trainable = trainable
        self.call = call
        self.state: Tensor | None = None
        self._placed: dict[tuple[torch.device, torch.dtype], DeltaMemLayerWeights] = {}
        self._weights: DeltaMemLayerWeights | None = None  # during one forward
        self._reads: Tensor | None = None  # [B, T, H*r] during one forward

    def attach(self, attention: nn.Module) -> list[Any]:
        """Register the hooks; returns their handles."""
        handles = [
            attention.register_forward_pre_hook(self._before, with_kwargs=True),
            attention.register_forward_hook(self._after, always_call=True),
        ]
        hooks = {"q": self._correct_q, "k": self._correct_k, "v": self._correct_v, "o": self._correct_o}
        for head in self.config.delta_heads:
            handles.append(getattr(attention, f"{head}_proj").register_forward_hook(hooks[head]))
        return handles

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]  # [B, T, hidden]
        self.call.check_active(self.name)
        self._weights = self._weights_for(hidden)
        self._reads = self._step(hidden, self._weights)

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._weights = self._reads = None

    def _correct_q(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return output if self._reads is None else output + F.linear(self._reads, self._weights.delta_q)

    def _correct_k(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return output if self._reads is None else output + F.linear(self._reads, self._weights.delta_k)

    def _correct_v(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return output if self._reads is None else output + F.linear(self._reads, self._weights.delta_v)

    def _correct_o(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return output if self._reads is None else output + self._weights.correct_output(self._reads)

    def _weights_for(self, hidden: Tensor) -> DeltaMemLayerWeights:
        if self.trainable:
            return self.packed().to(hidden.device, hidden.dtype)
        key = (hidden.device, hidden.dtype)
        if key not in self._placed:
            self._placed[key] = self.packed().to(*key)
        return self._placed[key]

    def _step(self, hidden: Tensor, weights: DeltaMemLayerWeights) -> Tensor | None:
        """Reads [B, T, H*r] in the model's dtype, None for nothing but zeros; the new state goes to the call."""
        batch, tokens = hidden.shape[:2]
        exact = torch.promote_types(hidden.dtype, torch.float32)
        mask = self.call.token_mask(batch, tokens, hidden.device)
        state = self._incoming(batch, hidden.device, exact)
        if not self.call.write_enabled and state is None:
            return None
        inputs = self._activate(hidden, weights, mask)
        means = self._segment_means(hidden, mask) if self.call.write_enabled else None
        if self.call.write_enabled and means is None:
            reads, final = scan(inputs, state)
            self.call.stage(self.name, final)
            return reads.flatten(-2).to(hidden.dtype)
        # Frozen, or one write per segment: every token reads the state from before this call.
        if means is not None:
            segments, present = means
            writes = self._activate(segments.to(hidden.dtype), weights, present)
            _, final = scan(writes, state)
            self.call.stage(self.name, final)
        if state is None:
            return None
        return torch.einsum("bhij,bthj->bthi", state, inputs.q).flatten(-2).to(hidden.dtype)

    def _activate(self, hidden: Tensor, weights: DeltaMemLayerWeights, mask: Tensor | None) -> DeltaRuleInputs:
        exact = torch.promote_types(hidden.dtype, torch.float32)
        projections = F.linear(hidden, weights.down).to(exact)  # [B, T, P]
        if mask is not None:  # a padded token's hidden state may be anything, NaN included
            projections = projections.masked_fill(~mask.unsqueeze(-1), 0)
        return activate(projections, weights.gate_bias, self.config.spec, mask)

    def _incoming(self, batch: int, device: torch.device, dtype: torch.dtype) -> Tensor | None:
        if self.state is None:
            return None
        if self.state.shape[0] != batch:
            raise ValueError(
                f"{self.name} holds the memory of {self.state.shape[0]} sequence(s), but this call has batch size "
                f"{batch}: call reset_memory(model) to start afresh, or choose the rows with get_memory and set_memory"
            )
        state = self.state.to(device, dtype)
        if state.is_inference() and not torch.is_inference_mode_enabled():
            state = state.clone()  # autograd refuses tensors that were made in inference mode
        return state

    def _segment_means(self, hidden: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor] | None:
        """Mean hidden state per segment [B, S, hidden] in ascending id order, and which rows have it [B, S].

        None if this call writes token by token: granularity "token", no ids set, or no active id (as the official
        code does then).
        """
        ids = self.call.segment_ids(self.config.memory_write_granularity, hidden.shape[:2], hidden.device)
        if ids is None:
            return None
        if mask is not None:
            ids = ids.masked_fill(~mask, -1)
        present_ids = ids[ids >= 0].unique()  # sorted
        if not len(present_ids):
            return None
        members = ids.unsqueeze(-1) == present_ids  # [B, T, S]
        counts = members.sum(1)  # [B, S]
        clean = hidden if mask is None else hidden.masked_fill(~mask.unsqueeze(-1), 0)
        exact = torch.promote_types(hidden.dtype, torch.float32)
        sums = members.to(exact).mT @ clean.to(exact)  # [B, S, hidden]
        return sums / counts.clamp_min(1).unsqueeze(-1), counts > 0
