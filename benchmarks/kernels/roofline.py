"""How fast a case could be: bytes that must move, operations that must be done, and a GPU's two speeds."""

from __future__ import annotations

from typing import NamedTuple


class Work(NamedTuple):
    """What a way to compute a case cannot avoid. bytes: each input read once, each output written once.

    flops: multiplications and additions of its products; exponentials and the like are not counted.
    """

    bytes: int
    flops: int


class Device(NamedTuple):
    """bandwidth: bytes a second that a copy reaches. matrix: 16-bit operations a second that a product reaches."""

    bandwidth: float
    matrix: float


DEVICES = {
    "NVIDIA H200": Device(4.3e12, 790e12),
    "NVIDIA H100 80GB HBM3": Device(3.0e12, 798e12),
}
"""Measured speeds, by torch's name of the GPU. A floor is given for these only, never guessed."""


def floor_seconds(work: Work, device: str) -> float | None:
    """The slower of the two; None for a device that is not in ``DEVICES``.

    A floor, not a forecast: a launch in a CUDA graph costs about 2 us more, and work in fp32, which has no matrix unit
    of its own, cannot come near ``matrix``.
    """
    if device not in DEVICES:
        return None
    speed = DEVICES[device]
    return max(work.bytes / speed.bandwidth, work.flops / speed.matrix)
