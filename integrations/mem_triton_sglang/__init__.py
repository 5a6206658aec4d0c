"""mem_triton for SGLang: ``MEM_TRITON_CONFIG=mem.yaml python -m sglang.launch_server --attention-backend mem_triton``.

Installed as a ``sglang.srt.plugins`` entry point. Without the environment variable SGLang stays as it is: no hook is
registered, and only the backend's name is known, to say what it needs.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any, NoReturn

BACKEND = "mem_triton"
VARIABLE = "MEM_TRITON_CONFIG"

logger = logging.getLogger("sglang.mem_triton")


def register() -> None:
    """Called by SGLang in each of its processes, before it reads its arguments; calling it again is harmless."""
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS, register_attention_backend
    from sglang.srt.server_args import (
        add_attention_backend_choices,
        add_deterministic_attention_backend_choices,
    )

    if BACKEND in ATTENTION_BACKENDS:
        return
    add_attention_backend_choices([BACKEND])
    add_deterministic_attention_backend_choices([BACKEND])
    register_attention_backend(BACKEND)(_factory())


def _factory() -> Callable[[Any], Any]:
    """What makes the backend; in an SGLang that lacks what the integration builds on, or without a configuration, what
    says so."""
    if not os.environ.get(VARIABLE):
        from mem_triton.config import ConfigError

        return _refusal(
            ConfigError(
                f"--attention-backend {BACKEND} needs a configuration: set {VARIABLE} to a YAML file, for example with "
                '"delta: {adapter: PATH_OR_HUGGING_FACE_ID}" or "memory: {bank: FOLDER}"'
            )
        )
    try:
        from mem_triton_sglang.configuration import register_resolution
        from mem_triton_sglang.hooks import register_hooks

        register_resolution()
        register_hooks()
    except ImportError as error:
        from mem_triton.compat import TESTED_VERSIONS, UnsupportedVersionError, installed_version

        logger.error("mem_triton is off: %s", error)
        return _refusal(
            UnsupportedVersionError(
                f"SGLang {installed_version('sglang')} lacks what mem_triton builds on: {error}. "
                f"Supported: sglang{TESTED_VERSIONS['sglang']}"
            )
        )

    def create(runner: Any) -> Any:
        from mem_triton_sglang.backend import create

        return create(runner)

    return create


def _refusal(error: Exception) -> Callable[[Any], NoReturn]:
    def refuse(runner: Any) -> NoReturn:
        raise error

    return refuse
