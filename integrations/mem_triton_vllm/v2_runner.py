"""Model Runner V2 (the default on GPUs): memory through vLLM's ``ModelState``, its extension point for such things.

A model may name its ModelState class with ``get_model_state_cls``. We mix into the class that vLLM would have chosen,
so that what other models need (prompt embeddings, multimodal positions) stays as it is.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from vllm.config import VllmConfig
from vllm.utils.torch_utils import set_default_torch_dtype
from vllm.v1.worker.gpu.model_states import resolve_model_state_cls

from mem_triton.config import DeltaSection
from mem_triton.runtime.request import carried_by
from mem_triton_vllm.attach import attach


class MemoryModelState:
    """Mixin: tells the state tables who enters, who leaves, and in which order a step's rows stand."""

    memory_section: DeltaSection

    def __init__(self, vllm_config: VllmConfig, model: nn.Module, *args: Any) -> None:
        super().__init__(vllm_config, model, *args)
        with set_default_torch_dtype(vllm_config.model_config.dtype):  # attached here: LoRA has wrapped the layers
            self.slots = model.mem_triton_slots = attach(vllm_config, model, self.memory_section)

    def add_request(self, req_index: int, new_req_data: Any) -> None:
        super().add_request(req_index, new_req_data)
        self.slots.enter(new_req_data.req_id, carried_by(new_req_data.sampling_params))

    def remove_request(self, req_id: str) -> None:
        super().remove_request(req_id)
        self.slots.leave(req_id)

    def prepare_attn(self, input_batch: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        last = input_batch.num_computed_tokens_np + input_batch.num_scheduled_tokens - 1
        self.slots.set_rows(input_batch.req_ids, last)
        return super().prepare_attn(input_batch, *args, **kwargs)


def prepare(vllm_config: VllmConfig, model: nn.Module, section: DeltaSection) -> None:
    """Have vLLM build its ModelState for ``model`` with the mixin in front."""
    stock = resolve_model_state_cls(vllm_config, model)
    name = f"Memory{stock.__name__}"
    model.get_model_state_cls = lambda: type(name, (MemoryModelState, stock), {"memory_section": section})
