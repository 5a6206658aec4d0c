"""Imported last by the process from which vLLM's engines are forked.

At its start vLLM's platform for CPUs replaces Triton kernels wherever a module holds one: it looks at all attributes of
all modules, which takes as long as the rest of a start, and trips over numba's. vLLM's own modules hold them; forks
look at those alone.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

from vllm.triton_utils import dispatcher

import tests.support.ready_numba  # noqa: F401

_everywhere = dispatcher._rebind_kernels


def _in_vllm(overrides: list[Any]) -> None:
    own = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "vllm"}
    dispatcher.sys = SimpleNamespace(modules=own)
    try:
        _everywhere(overrides)
    finally:
        dispatcher.sys = sys


dispatcher._rebind_kernels = _in_vllm
