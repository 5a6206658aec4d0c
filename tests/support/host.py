"""A worker's host without an engine."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch

from mem_triton.systems.base import WorkerHost


def host(layers: Sequence[int] = (), **more: Any) -> WorkerHost:
    """One rank on the CPU whose losses nobody hears of."""
    plain = {
        "tp_rank": 0,
        "rank": 0,
        "device": torch.device("cpu"),
        "lose": lambda error, everybody: None,
        "exclusive": contextlib.nullcontext,
        "on_stream": contextlib.nullcontext,
        "read_kv": lambda *_: None,
    }
    return WorkerHost(layers=layers, **{**plain, **more})
