"""mem_triton for vLLM: ``vllm serve MODEL --load-format mem_triton --additional-config '{"mem_triton": {...}}'``.

Installed as a ``vllm.general_plugins`` entry point. Without the flags nothing changes: the plugin registers a load
format, and two constructors look whether the configuration asks for memory.
"""

from __future__ import annotations


def register() -> None:
    """Called by vLLM in each of its processes; calling it again is harmless."""
    from mem_triton_vllm import front_end, loader

    loader.register()
    front_end.install()
