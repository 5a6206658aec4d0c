"""Tells memory of a step's rows under Model Runner V2, the default on GPUs, through vLLM's ``ModelState``.

A model may name its ModelState class with ``get_model_state_cls``. We mix into the class that vLLM would have chosen,
so that what other models need (prompt embeddings, multimodal positions) stays as it is.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.utils.torch_utils import set_default_torch_dtype
from vllm.v1.worker.gpu.model_states import resolve_model_state_cls

from mem_triton.config import MemTritonConfig
from mem_triton_vllm.held import give
from mem_triton_vllm.worker import attach_memory


class MemoryModelState:
    """Mixin: passes to the memory which requests enter and leave, and the order of a step's rows."""

    memory_config: MemTritonConfig

    def __init__(self, vllm_config: VllmConfig, model: nn.Module, *args: Any) -> None:
        super().__init__(vllm_config, model, *args)
        with set_default_torch_dtype(vllm_config.model_config.dtype):  # attached here: LoRA has wrapped the layers
            self.memory = attach_memory(vllm_config, model, self.memory_config, self._block_row)
        give(model, self.memory)
        self._row_of: dict[str, int] = {}  # request id -> its row in vLLM's block tables

    def initialize_kv_cache(self, kv_cache_config: Any, block_tables: Any) -> None:
        super().initialize_kv_cache(kv_cache_config, block_tables)
        self._block_tables = block_tables

    def add_request(self, req_index: int, new_req_data: Any) -> None:
        super().add_request(req_index, new_req_data)
        self._row_of[new_req_data.req_id] = req_index
        self.memory.enter(new_req_data.req_id, new_req_data.sampling_params)

    def remove_request(self, req_id: str) -> None:
        super().remove_request(req_id)
        self.memory.leave(req_id)
        self._row_of.pop(req_id, None)

    def prepare_attn(self, input_batch: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        first = input_batch.num_computed_tokens_np
        self.memory.begin_step(input_batch.req_ids, first, first + input_batch.num_scheduled_tokens - 1)
        return super().prepare_attn(input_batch, *args, **kwargs)

    def _block_row(self, req_id: str) -> Tensor:
        return self._block_tables.block_tables[0].gpu[self._row_of[req_id]]


def prepare(vllm_config: VllmConfig, model: nn.Module, config: MemTritonConfig) -> None:
    """Have vLLM build its ModelState for ``model`` with ``MemoryModelState`` as its first base."""
    stock = resolve_model_state_cls(vllm_config, model)
    name = f"Memory{stock.__name__}"
    model.get_model_state_cls = lambda: type(name, (MemoryModelState, stock), {"memory_config": config})
