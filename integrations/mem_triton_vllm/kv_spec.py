"""Describes the states' KV cache, and manages its blocks so that no step reads states which that same step writes.

vLLM may give a request blocks of a prefix that another request computes in the very same step: attention writes its KV
before it reads any, so that is right for KV. A recurrent state is not there until the step is over. vLLM's own Mamba
manager puts such a request off to the next step; this one does the same, through vLLM's registry of spec classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry, register_kv_cache_spec
from vllm.v1.request import Request


class StatefulFullAttentionManager(FullAttentionManager):
    """Full attention whose blocks carry a recurrent state: a block is a prefix hit from the next step on."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._cached_this_step: set[Any] = set()

    def get_num_blocks_to_allocate(
        self, request_id: str, num_tokens: int, new_computed_blocks: Sequence[KVCacheBlock], *args: Any, **kwargs: Any
    ) -> int:
        if any(block.block_hash in self._cached_this_step for block in new_computed_blocks[-1:]):
            return self.block_pool.num_gpu_blocks + 1  # more than there are: the scheduler tries again next step
        return super().get_num_blocks_to_allocate(request_id, num_tokens, new_computed_blocks, *args, **kwargs)

    def cache_blocks(self, request: Request, num_tokens: int, *args: Any, **kwargs: Any) -> None:
        before = self.num_cached_block.get(request.request_id, 0)
        super().cache_blocks(request, num_tokens, *args, **kwargs)
        after = self.num_cached_block.get(request.request_id, 0)
        for block in self.req_to_blocks[request.request_id][before:after]:
            if block.block_hash is not None:
                self._cached_this_step.add(block.block_hash)

    def new_step_starts(self) -> None:
        super().new_step_starts()
        self._cached_this_step.clear()


KVCacheSpecRegistry._ensure_registered()  # vLLM registers its own specs only while the registry is empty


@register_kv_cache_spec(manager_class=StatefulFullAttentionManager, uniform_type_base_spec=FullAttentionSpec)
@dataclass(frozen=True, kw_only=True)
class DeltaStateSpec(FullAttentionSpec):
    """Spec of a layer's states: grouped with full attention, so that one block table serves both."""
