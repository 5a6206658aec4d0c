"""Device buffers that are made once and kept, as captured graphs hold their addresses."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch

_KEPT: dict[Hashable, Any] = {}


def kept(device: torch.device, key: Hashable, make: Callable[[], Any]) -> Any:
    """Return what ``make`` gave for this key on the device's current stream, whose launches run one after the other.

    Nothing is ever given back. A capture on a stream that has none yet, as nothing ran there before, gets one of its
    own, whose zeros are part of the graph. On a CPU ``make`` is called each time.
    """
    if device.type != "cuda":
        return make()
    place = device, torch.cuda.current_stream(device).cuda_stream, key
    if place in _KEPT:
        return _KEPT[place]
    buffers = make()
    if not torch.cuda.is_current_stream_capturing():
        _KEPT[place] = buffers
    return buffers
