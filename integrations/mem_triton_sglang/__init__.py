"""mem_triton for SGLang: ``MEM_TRITON_CONFIG=mem.yaml python -m sglang.launch_server --attention-backend mem_triton``.

Installed as a ``sglang.srt.plugins`` entry point. Without the environment variable SGLang stays as it is.
"""

from __future__ import annotations


def register() -> None:
    """Called by SGLang in each of its processes, before it reads its arguments."""
