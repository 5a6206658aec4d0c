"""mem_triton for vLLM: ``vllm serve MODEL --load-format mem_triton --additional-config '{"mem_triton": {...}}'``.

Installed as a ``vllm.general_plugins`` entry point. Without the flags nothing changes: the plugin registers a load
format, two constructors look whether the configuration asks for memory, and block hashes whether a request has any.
"""

from __future__ import annotations

from typing import Any

LOAD_FORMAT = "mem_triton"


def register() -> None:
    """Called by vLLM in each of its processes; calling it again is harmless.

    In a vLLM that lacks what the integration builds on, the engine keeps working and only the load format is refused.
    """
    from vllm.model_executor.model_loader import _LOAD_FORMAT_TO_MODEL_LOADER, register_model_loader
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    if LOAD_FORMAT in _LOAD_FORMAT_TO_MODEL_LOADER:
        return
    try:
        from mem_triton_vllm import block_keys, front_end, loader
    except ImportError as error:
        register_model_loader(LOAD_FORMAT)(_refusal(BaseModelLoader, error))
        return
    register_model_loader(LOAD_FORMAT)(loader.MemTritonLoader)
    front_end.install()
    block_keys.install()


def _refusal(base: type, error: ImportError) -> type:
    """A loader that says which vLLM is needed."""

    def __init__(self: Any, load_config: Any) -> None:
        from mem_triton.compat import TESTED_VERSIONS, UnsupportedVersionError, require

        version = require("vllm")
        raise UnsupportedVersionError(
            f"vLLM {version} lacks what mem_triton builds on: {error}. Supported: vllm{TESTED_VERSIONS['vllm']}"
        )

    abstract = {name: (lambda self, *a, **k: None) for name in base.__abstractmethods__}
    return type("MemTritonRefusal", (base,), {**abstract, "__init__": __init__})
