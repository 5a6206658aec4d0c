"""When ``attention_inputs`` advances the states in its own kernel, and how many warps a head takes.

Chosen from register counts (``tests/ops/test_attention_inputs_aot.py``); not measured on a GPU yet.
"""

from __future__ import annotations

STEP_STATE = 1024  # floats of a state, which every program of a decode step holds
STEP_WIDTH = 32  # H*r: the head's share of the correction is a tile of pairs x H*r


def steps_inside(state_size: int, read_width: int) -> bool:
    """Whether a decode step is one launch; else the delta rule has its own. Both sizes are a ``DeltaRuleSpec``'s."""
    return state_size <= STEP_STATE and read_width <= STEP_WIDTH


def warps(pairs: int, width: int) -> int:
    """Of a program with ``pairs`` pairs of channels and H*r = ``width`` reads, both powers of two."""
    return 1 if pairs * width <= 512 else 4
