"""Test-only: real SGLang on a CPU with plain torch, through SGLang's own entry point for platforms.

SGLang's CPU platform needs a kernel package that no index carries. ``SGLANG_PLATFORM`` chooses one of ours::

    torch_cpu          every layer by its torch implementation, attention by ``torch_native``
    torch_cpu_graph    the same, decoding through SGLang's graph runner with an emulated graph (``graph``)
"""

from __future__ import annotations

import os


def activate() -> str | None:
    """The platform's class, for SGLang to import; None unless asked for by name."""
    return _asked("torch_cpu", "torch_cpu_platform.platform.TorchCpuPlatform")


def activate_graph() -> str | None:
    return _asked("torch_cpu_graph", "torch_cpu_platform.platform.TorchCpuGraphPlatform")


def _asked(name: str, path: str) -> str | None:
    return path if os.environ.get("SGLANG_PLATFORM") == name else None
