"""What the tuning tables call a GPU."""

from __future__ import annotations

import functools

import torch


@functools.cache
def architecture(device: torch.device) -> str:
    """The tuning table's key of a device: "sm90", "gfx942", ..."""
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    return f"sm{properties.major}{properties.minor}"
