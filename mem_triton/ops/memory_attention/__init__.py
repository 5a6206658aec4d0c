"""One softmax over a shared segment, the request's own memory pages and its paged causal context."""

from mem_triton.ops.memory_attention.op import memory_attention
from mem_triton.ops.memory_attention.types import FOREVER, MemoryPages, MemoryTable, PagedContext, SharedSegment

__all__ = ["FOREVER", "MemoryPages", "MemoryTable", "PagedContext", "SharedSegment", "memory_attention"]
