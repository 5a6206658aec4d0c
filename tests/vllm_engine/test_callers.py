"""The headers of an HTTP request, where the engine is called on its behalf: in vLLM's own application, no engine."""

from __future__ import annotations

import importlib
from argparse import Namespace

import pytest

from mem_triton.config import ConfigError

pytestmark = pytest.mark.engine
KEYS = ("one", "two")


@pytest.fixture
def callers(monkeypatch):
    callers = importlib.import_module("mem_triton_vllm.callers")
    app = importlib.import_module(callers.APP)
    monkeypatch.setattr(app, callers.ADDS_MIDDLEWARE, getattr(app, callers.ADDS_MIDDLEWARE))
    return callers


def served(callers):
    """A client of an application with vLLM's middleware, whose handler says what the engine would see."""
    import asyncio

    from fastapi import FastAPI
    from fastapi.responses import StreamingResponse
    from starlette.testclient import TestClient

    app = FastAPI()

    @app.get("/v1/plain")
    async def plain() -> str:
        return callers.headers().get("authorization", "")

    @app.get("/v1/task")
    async def task() -> str:
        return await asyncio.create_task(plain())

    @app.get("/v1/stream")
    async def stream() -> StreamingResponse:
        async def parts():
            yield callers.headers().get("authorization", "")

        return StreamingResponse(parts())

    args = Namespace(
        allowed_origins=["*"],
        allow_credentials=False,
        allowed_methods=["*"],
        allowed_headers=["*"],
        api_key=list(KEYS),
        enable_request_id_headers=True,
        middleware=[],
    )
    adds = getattr(importlib.import_module(callers.APP), callers.ADDS_MIDDLEWARE)
    adds(args, app, ("generate",))
    return TestClient(app)


def test_fault08_handlers_and_their_streams_and_tasks_know_the_key_of_their_own_request(callers):
    callers.install()
    callers.install()  # harmless
    client = served(callers)
    for key in KEYS:
        for path in ("/v1/plain", "/v1/task", "/v1/stream"):
            answer = client.get(path, headers={"Authorization": f"Bearer {key}"})
            assert answer.status_code == 200 and f"Bearer {key}" in answer.text
    assert client.get("/v1/plain", headers={"Authorization": "Bearer three"}).status_code == 401
    assert callers.headers() == {}, "outside of a request there is nobody"


def test_fault08_control_without_the_middleware_nobody_is_known(callers):
    assert served(callers).get("/v1/plain", headers={"Authorization": "Bearer one"}).json() == ""


def test_fault08_a_vllm_without_the_place_is_refused_by_name(callers, monkeypatch):
    monkeypatch.delattr(importlib.import_module(callers.APP), callers.ADDS_MIDDLEWARE)
    with pytest.raises(ConfigError, match=r"mem_triton\.tenants: this vLLM has no .*init_entrypoints_middleware"):
        callers.install()
