"""mem_triton for vLLM: ``vllm serve MODEL --load-format mem_triton --additional-config '{"mem_triton": {...}}'``.

Installed as a ``vllm.general_plugins`` entry point. Without the flags nothing changes: the plugin registers a load
format, two constructors look whether the configuration asks for memory, and block hashes whether a request has any.
"""

from __future__ import annotations

import logging
from contextlib import ExitStack
from typing import Any

from mem_triton_vllm.names import LOAD_FORMAT

logger = logging.getLogger("vllm.mem_triton")


def register() -> None:
    """Called by vLLM in each of its processes; calling it again is harmless.

    Raises nothing but KeyboardInterrupt, as vLLM would end with it. Where anything fails, the engine is the stock one
    and the load format, if it can be registered at all, is refused with the cause.
    """
    try:
        _register()
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # an engine without memory must run whatever becomes of ours, a SystemExit included
        logger.error("mem_triton is off, --load-format %s cannot be used: %s", LOAD_FORMAT, _said(error))


def _register() -> None:
    from vllm.model_executor.model_loader import _LOAD_FORMAT_TO_MODEL_LOADER, register_model_loader

    if LOAD_FORMAT in _LOAD_FORMAT_TO_MODEL_LOADER:
        return
    try:
        loader = _installed()
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        logger.debug("mem_triton is off", exc_info=True)
        loader = _refusal(error)
    register_model_loader(LOAD_FORMAT)(loader)


def _installed() -> type:
    """The loader, with every patch in place; where one fails, none is."""
    from mem_triton_vllm import block_keys, engines, loader, places

    with ExitStack() as undo:
        engines.install(undo)
        block_keys.install(undo)
        places.install(undo)
        undo.pop_all()
    return loader.MemTritonLoader


def _refusal(error: BaseException) -> type:
    """A loader that says why memory is off, and which vLLM is needed."""
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    cause = _said(error)

    def __init__(self: Any, load_config: Any) -> None:
        from mem_triton.compat import TESTED_VERSIONS, UnsupportedVersionError, installed_version

        raise UnsupportedVersionError(
            f"vLLM {installed_version('vllm')} lacks what mem_triton builds on: {cause}. "
            f"Supported: vllm{TESTED_VERSIONS['vllm']}"
        )

    abstract = {name: (lambda self, *a, **k: None) for name in BaseModelLoader.__abstractmethods__}
    return type("MemTritonRefusal", (BaseModelLoader,), {**abstract, "__init__": __init__})


def _said(error: BaseException) -> str:
    """An exception as one line: what it says, and its type where that is not plain from it."""
    text = " ".join(str(error).split())
    return text if isinstance(error, ImportError) and text else f"{type(error).__name__}: {text}".rstrip(": ")
