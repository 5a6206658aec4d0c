"""mem_triton for SGLang: ``MEM_TRITON_CONFIG=mem.yaml python -m sglang.launch_server --attention-backend mem_triton``.

Installed as a ``sglang.srt.plugins`` entry point. Without the environment variable SGLang stays as it is: no hook is
registered, and only the backend's name is known, to say what it needs.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, NoReturn

from mem_triton_sglang.names import BACKEND, VARIABLE

logger = logging.getLogger("sglang.mem_triton")


def register() -> None:
    """Called by SGLang in each of its processes, before it reads its arguments; calling it again is harmless.

    Raises nothing but KeyboardInterrupt. Where anything fails, the engine is the stock one and the backend, if it can
    be registered at all, is refused with the cause.
    """
    try:
        _register()
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # an engine without memory must run whatever becomes of ours, a SystemExit included
        logger.error("mem_triton is off, --attention-backend %s cannot be used: %s", BACKEND, _said(error))


def _register() -> None:
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS, register_attention_backend
    from sglang.srt.server_args import (
        add_attention_backend_choices,
        add_deterministic_attention_backend_choices,
    )

    if BACKEND in ATTENTION_BACKENDS:
        return
    register_attention_backend(BACKEND)(_factory())
    add_attention_backend_choices([BACKEND])
    add_deterministic_attention_backend_choices([BACKEND])


def _factory() -> Callable[[Any], Any]:
    """What makes the backend; in an SGLang that lacks what the integration builds on, or without a configuration, what
    says so."""
    if not os.environ.get(VARIABLE):
        return _refusal(
            "configuration",
            f"--attention-backend {BACKEND} needs a configuration: set {VARIABLE} to a YAML file, for example with "
            '"delta: {adapter: PATH_OR_HUGGING_FACE_ID}" or "memory: {bank: FOLDER}"',
        )
    try:
        _install()
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        logger.error("mem_triton is off: %s", _said(error))
        logger.debug("mem_triton is off", exc_info=True)
        return _refusal("version", f"lacks what mem_triton builds on: {_said(error)}")

    def create(runner: Any) -> Any:
        from mem_triton_sglang.backend import create

        return create(runner)

    return create


def _install() -> None:
    """Hand SGLang our hooks and checks of its arguments; where one cannot be had, none is handed over."""
    from mem_triton_sglang.configuration import register_resolution
    from mem_triton_sglang.hooks import register_hooks

    with ExitStack() as undo:
        register_hooks(undo)
        register_resolution(undo)
        undo.pop_all()


def _refusal(kind: str, what: str) -> Callable[[Any], NoReturn]:
    """A factory that raises ConfigError (kind "configuration") or UnsupportedVersionError, imported only then."""

    def refuse(runner: Any) -> NoReturn:
        from mem_triton.compat import TESTED_VERSIONS, UnsupportedVersionError, installed_version
        from mem_triton.config import ConfigError

        if kind == "configuration":
            raise ConfigError(what)
        raise UnsupportedVersionError(
            f"SGLang {installed_version('sglang')} {what}. Supported: sglang{TESTED_VERSIONS['sglang']}"
        )

    return refuse


def _said(error: BaseException) -> str:
    """An exception as one line: what it says, and its type where that is not plain from it."""
    text = " ".join(str(error).split())
    return text if isinstance(error, ImportError) and text else f"{type(error).__name__}: {text}".rstrip(": ")
