"""LoRA adapters are loaded before a request that names them is admitted (fault 14), with a stand-in for vLLM's part."""

from __future__ import annotations

import asyncio
import logging
from types import SimpleNamespace

import pytest

from mem_triton.systems.base import FrontendPart, RequestMemory
from tests.vllm_engine.test_weights import call


class Admitting(FrontendPart):
    """Notes who answers."""

    def admit(self, fields, params):
        self.seen.append(params.lora and params.lora.identity)
        return RequestMemory()

    def identity(self, memory, salted):
        return None

    def payload(self, memory):
        return None


@pytest.fixture(params=["AsyncLLM", "LLMEngine"])
def served(request, monkeypatch, tmp_path):
    """An engine, what happens in it, and an adapter's folder."""
    import importlib

    from mem_triton_vllm.front_end import VLLMFrontEnd

    is_async = request.param == "AsyncLLM"
    module = importlib.import_module(f"mem_triton_vllm.{'async_engine' if is_async else 'sync_engine'}")
    stock, happened = getattr(module, request.param), []

    def add_lora(self, lora):
        happened.append(("load", lora.lora_int_id, lora.load_inplace))
        return True

    async def add_lora_async(self, lora):
        await asyncio.sleep(0)
        return add_lora(self, lora)

    def add_request(self, request_id, prompt, params, arrival_time=None, lora_request=None):
        happened.append(("run", lora_request and lora_request.lora_int_id, lora_request and lora_request.load_inplace))

    async def generate(self, prompt, params, request_id, lora_request=None):
        add_request(self, request_id, prompt, params, None, lora_request)
        output = SimpleNamespace(token_ids=[5], finish_reason="stop")
        yield SimpleNamespace(outputs=[output], finished=True, prompt_token_ids=[1])

    monkeypatch.setattr(stock, "add_lora", add_lora_async if is_async else add_lora)
    monkeypatch.setattr(stock, "generate" if is_async else "add_request", generate if is_async else add_request)
    monkeypatch.setattr(stock, "__del__", lambda self: None, raising=False)
    engine = object.__new__(getattr(module, f"{request.param}WithMemory"))
    part = object.__new__(Admitting)
    part.seen = happened
    engine.memory = VLLMFrontEnd({"delta": part}, kept_loras=4)
    engine.start_memory()
    if not is_async:
        engine.output_processor = SimpleNamespace(request_states={})
    (tmp_path / "adapter_config.json").write_text("{}")
    return engine, happened, tmp_path


def ask(engine, lora) -> None:
    from vllm import SamplingParams

    async def read(stream):
        async for _ in stream:
            pass

    if hasattr(engine, "generate"):
        asyncio.run(read(engine.generate([1], SamplingParams(), "r", lora_request=lora)))
    else:
        engine.add_request("r", [1], SamplingParams(), None, lora)


def test_fault14_an_adapter_is_loaded_once_before_the_request_that_first_names_it(served):
    from vllm.lora.request import LoRARequest

    engine, happened, folder = served
    for _ in range(2):
        ask(engine, LoRARequest("poet", 7, str(folder)))
    loaded, admitted, ran, *again = happened
    assert (loaded, ran) == (("load", 7, True), ("run", 7, False)) and admitted.startswith("poet:")
    assert again == [admitted, ran]


def test_fault14_an_adapter_in_place_is_loaded_when_its_files_have_changed_and_not_in_every_step(served):
    from vllm.lora.request import LoRARequest

    engine, happened, folder = served
    for config in ("{}", "{}", '{"r": 1}'):
        if config != (folder / "adapter_config.json").read_text():
            (folder / "adapter_config.json").write_text(config)
        ask(engine, LoRARequest("poet", 7, str(folder), load_inplace=True))
    names = [name for name in happened if isinstance(name, str)]
    events = [event[0] for event in happened if not isinstance(event, str)]
    assert events == ["load", "run", "run", "load", "run"] and names[0] == names[1] != names[2]
    assert all(event in (("load", 7, True), ("run", 7, False)) for event in happened if not isinstance(event, str))


def test_fault14_an_adapter_that_cannot_be_loaded_is_an_error_at_the_call_and_holds_nothing(served, monkeypatch):
    from vllm.lora.request import LoRARequest

    engine, happened, folder = served

    def fails(self, lora):
        raise ValueError("no such adapter")

    monkeypatch.setattr(type(engine).__mro__[1], "add_lora", fails)
    with pytest.raises(ValueError, match="no such adapter"):
        ask(engine, LoRARequest("poet", 7, str(folder)))
    assert happened == [] and not engine.memory.loras.knows(7)


def test_fault14_a_client_who_leaves_while_it_loads_leaves_nothing_untold(served):
    """Workers have read the files by then."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    engine, happened, folder = served
    if not hasattr(engine, "generate"):
        pytest.skip("nobody leaves LLMEngine's call")

    async def main():
        stream = engine.generate([1], SamplingParams(), "r", lora_request=LoRARequest("poet", 7, str(folder)))
        reading = asyncio.ensure_future(anext(stream))
        while not engine._loads:
            await asyncio.sleep(0)
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        while engine._loads:
            await asyncio.sleep(0.001)

    asyncio.run(main())
    assert [event[0] for event in happened] == ["load"] and engine.memory.loras.has_read(7, str(folder))


def test_fault14_after_a_load_that_failed_nobody_says_which_adapter_it_is(served, monkeypatch):
    from vllm.lora.request import LoRARequest

    engine, happened, folder = served
    ask(engine, LoRARequest("poet", 7, str(folder)))

    def fails(self, lora):
        raise ValueError("half of the workers")

    with monkeypatch.context() as patch:
        patch.setattr(type(engine).__mro__[1], "add_lora", fails)
        with pytest.raises(ValueError, match="half"):
            call(engine.add_lora, LoRARequest("poet", 7, str(folder), load_inplace=True))
    ask(engine, LoRARequest("poet", 7, str(folder)))
    first, second = (event for event in happened if isinstance(event, str))
    assert first != second


def test_fault14_two_who_name_it_at_once_have_it_loaded_once(served):
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    engine, happened, folder = served
    if not hasattr(engine, "generate"):
        pytest.skip("LLMEngine takes one request at a time")

    async def read(i):
        async for _ in engine.generate([1], SamplingParams(), str(i), lora_request=LoRARequest("poet", 7, str(folder))):
            pass

    async def both():
        await asyncio.gather(read(1), read(2))

    asyncio.run(both())
    assert [event[0] for event in happened if not isinstance(event, str)] == ["load", "run", "run"]


def test_fault14_a_request_in_flight_keeps_its_adapter_and_those_behind_it_get_the_new_one(served):
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    engine, happened, folder = served
    if not hasattr(engine, "generate"):
        pytest.skip("LLMEngine refuses, see below")
    lora = LoRARequest("poet", 7, str(folder))

    async def read(stream):
        async for _ in stream:
            pass

    async def main():
        await read(engine.generate([1], SamplingParams(), "a", lora_request=lora))
        inside = engine.generate([1], SamplingParams(), "b", lora_request=lora)
        await anext(inside)
        (folder / "adapter_config.json").write_text('{"r": 1}')
        loading = asyncio.ensure_future(engine.add_lora(LoRARequest("poet", 7, str(folder), load_inplace=True)))
        await asyncio.sleep(0.01)
        behind = asyncio.ensure_future(read(engine.generate([1], SamplingParams(), "c", lora_request=lora)))
        other = asyncio.ensure_future(read(engine.generate([1], SamplingParams(), "d")))
        await asyncio.sleep(0.05)
        assert other.done() and not loading.done() and not behind.done()
        happened.append("ends")
        await inside.aclose()
        await asyncio.gather(loading, behind)

    asyncio.run(main())
    events = [event if isinstance(event, str) else event[0] for event in happened if event is not None]
    first, ends = events[1], events.index("ends")
    assert events[ends:][:2] == ["ends", "load"] and events[ends + 2] != first and events.count("load") == 2


def test_fault14_a_load_waits_for_nobody_without_end(served):
    """Its error names the adapter; nothing was loaded, and the request goes on."""
    from vllm import SamplingParams
    from vllm.exceptions import RetryableRequestError
    from vllm.lora.request import LoRARequest

    engine, happened, folder = served
    if not hasattr(engine, "generate"):
        pytest.skip("LLMEngine refuses at once, see below")
    engine._users.longest_wait = 0.05
    lora = LoRARequest("poet", 7, str(folder))

    async def main():
        inside = engine.generate([1], SamplingParams(), "b", lora_request=lora)
        await anext(inside)
        with pytest.raises(RetryableRequestError, match="'poet' answers 1 requests, which keep it"):
            await engine.add_lora(LoRARequest("poet", 7, str(folder), load_inplace=True))
        with pytest.raises(RetryableRequestError, match="keep it"):
            await engine.remove_lora(7)
        await inside.aclose()
        await engine.add_lora(LoRARequest("poet", 7, str(folder), load_inplace=True))
        unread = engine.generate([1], SamplingParams(), "e", lora_request=lora)
        del unread
        await engine.add_lora(LoRARequest("poet", 7, str(folder), load_inplace=True))

    asyncio.run(main())
    assert [event[0] for event in happened if isinstance(event, tuple)] == ["load", "run", "load", "load"]


@pytest.mark.parametrize("kind", ["installed", "control: stock"])
def test_fault14_a_load_that_has_waited_too_long_is_http_503_with_its_reason(served, monkeypatch, kind):
    """By vLLM's own route and handler, which make an HTTP 500 of it (negative control)."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    engine, happened, folder = served
    if not hasattr(engine, "generate"):
        pytest.skip("LLMEngine has no routes")
    if kind != "installed":
        handler = handler_class()
        monkeypatch.setattr(handler, "load_lora_adapter", handler.load_lora_adapter.__wrapped__)
    engine._users.longest_wait = 0.05
    body = {"lora_name": "poet", "lora_path": str(folder), "load_inplace": True}

    async def main():
        async with client_of(engine) as client:
            assert (await client.post("/v1/load_lora_adapter", json=body)).status_code == 200
            inside = engine.generate([1], SamplingParams(), "b", lora_request=LoRARequest("poet", 1, str(folder)))
            await anext(inside)
            refused = await client.post("/v1/load_lora_adapter", json=body)
            missing = await client.post("/v1/load_lora_adapter", json={**body, "lora_name": ""})
            await inside.aclose()
            return refused, missing, await client.post("/v1/load_lora_adapter", json=body)

    refused, missing, again = asyncio.run(main())
    error = refused.json()["error"]
    assert "'poet' answers 1 requests, which keep it; nothing was loaded" in error["message"]
    assert (refused.status_code, error["code"]) == ((503, 503) if kind == "installed" else (500, 500))
    assert (missing.status_code, again.status_code) == (400, 200), "stock answers stay"
    assert [event[0] for event in happened if isinstance(event, tuple)] == ["load", "run", "load"]


def handler_class():
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels

    return OpenAIServingModels


def client_of(engine):
    """A client of vLLM's own routes for adapters, before this engine. Those raise the level of the root logger
    and its handlers, pytest's among them."""
    import httpx
    from fastapi import FastAPI
    from vllm.entrypoints.openai.models.protocol import BaseModelPath
    from vllm.entrypoints.serve.lora.api_router import _attach_router

    engine.model_config = engine.renderer = engine.input_processor = None
    app = FastAPI()
    levels = [(one, one.level) for one in (logging.root, *logging.root.handlers)]
    _attach_router(app)
    for one, level in levels:
        one.setLevel(level)
    app.state.openai_serving_models = handler_class()(engine, [BaseModelPath("m", "m")])
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server")


def test_fault14_the_stepped_engine_replaces_no_adapter_under_a_request(served):
    from vllm.exceptions import VLLMValidationError
    from vllm.lora.request import LoRARequest

    engine, happened, folder = served
    if hasattr(engine, "generate"):
        pytest.skip("AsyncLLM waits")
    lora = LoRARequest("poet", 7, str(folder))
    ask(engine, lora)
    engine.output_processor.request_states["r"] = SimpleNamespace(lora_request=lora)
    for change in (
        lambda: engine.add_lora(LoRARequest("poet", 7, str(folder), load_inplace=True)),
        lambda: engine.remove_lora(7),
    ):
        with pytest.raises(VLLMValidationError, match="answers 1 requests, which keep it"):
            change()
    engine.output_processor.request_states.clear()
    engine.add_lora(LoRARequest("poet", 7, str(folder), load_inplace=True))
    assert [event[0] for event in happened if isinstance(event, tuple)] == ["load", "run", "load"]


def test_fault14_workers_load_no_adapter_that_the_engine_did_not_tell_of(served):
    from vllm.exceptions import VLLMValidationError

    engine, happened, _ = served
    for method in ("add_lora", "remove_lora"):
        with pytest.raises(VLLMValidationError, match=f"mem_triton: {method} of the workers is refused.*the engine's"):
            call(engine.collective_rpc, method, args=(None,))
    assert happened == []
