"""Refuses fields that SGLang's HTTP server would drop."""

from __future__ import annotations

import sys

from mem_triton.runtime.frontend.http_fields import FieldPlaces, RefuseMisplacedFields

PLACES = FieldPlaces(
    {
        "/generate": "sampling_params.custom_params",
        "/v1/completions": "custom_params",
        "/v1/chat/completions": "custom_params",
        "/invocations": "custom_params",
        "/vertex_generate": "parameters.sampling_params.custom_params",
    }
)
"""Where SGLang's routes take what reaches ``sampling_params["custom_params"]``."""


def install() -> None:
    """Refuse such fields in this process's HTTP server, if it has one; ``Engine`` has none."""
    server = sys.modules.get("sglang.srt.entrypoints.http_server")
    if server is None:
        return
    from starlette.middleware import Middleware

    middleware = server.app.user_middleware
    if not any(one.cls is RefuseMisplacedFields for one in middleware):
        middleware.append(Middleware(RefuseMisplacedFields, places=PLACES))  # innermost: behind authentication
