"""RoPE of memory: what a model's config says, keys to and from positions, and the op for pages on the device."""

from mem_triton.ops.reposition.given import UnsupportedRopeError
from mem_triton.ops.reposition.op import reposition_pages
from mem_triton.ops.reposition.reference import angles, move, rotate, turn, unrotate
from mem_triton.ops.reposition.rope import RotaryEmbedding, rope_from_config

__all__ = [
    "RotaryEmbedding",
    "UnsupportedRopeError",
    "angles",
    "move",
    "reposition_pages",
    "rope_from_config",
    "rotate",
    "turn",
    "unrotate",
]
