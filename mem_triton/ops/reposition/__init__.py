"""RoPE of memory: what a model's config says, keys to and from positions, and the kernel for pages on the device."""

from mem_triton.ops.reposition.reference import move, rotate, unrotate
from mem_triton.ops.reposition.rope import RotaryEmbedding, UnsupportedRopeError, rope_from_config

__all__ = ["RotaryEmbedding", "UnsupportedRopeError", "move", "rope_from_config", "rotate", "unrotate"]
