"""Which tokens of a reference each KV head keeps (Memory³'s sparsification)."""

from mem_triton.ops.memory_selection.op import select_tokens, selection_weights

__all__ = ["select_tokens", "selection_weights"]
