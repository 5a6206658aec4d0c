"""One softmax over a shared segment, the request's own memory pages and its paged causal context."""

from mem_triton.ops.memory_attention.arguments.types import (
    FOREVER,
    AttentionCall,
    MemoryPages,
    MemoryTable,
    PagedContext,
    SharedSegment,
)
from mem_triton.ops.memory_attention.cascade.memory_only import add_memory, memory_only_attention
from mem_triton.ops.memory_attention.cascade.merge import merge_states
from mem_triton.ops.memory_attention.op import memory_attention
from mem_triton.ops.memory_attention.policy import Policy

__all__ = [
    "FOREVER",
    "AttentionCall",
    "MemoryPages",
    "MemoryTable",
    "PagedContext",
    "Policy",
    "SharedSegment",
    "add_memory",
    "memory_attention",
    "memory_only_attention",
    "merge_states",
]
