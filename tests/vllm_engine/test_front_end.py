"""The front end's leases, without an engine: a stream that nobody reads, and one that goes while it commits."""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
from types import SimpleNamespace

import pytest

from mem_triton.systems.delta_mem.frontend import SessionFrontEnd
from mem_triton.systems.delta_mem.request import SessionRequest
from mem_triton.systems.delta_mem.sessions import SessionStore, StateLayout


@pytest.fixture
def engine(monkeypatch):
    """An AsyncLLM with memory whose stock part answers one token and has no engine behind it."""
    from vllm.v1.engine.async_llm import AsyncLLM

    from mem_triton_vllm.async_engine import AsyncLLMWithMemory
    from mem_triton_vllm.front_end import VLLMFrontEnd

    output = SimpleNamespace(
        outputs=[SimpleNamespace(token_ids=[5], finish_reason="stop")], finished=True, prompt_token_ids=[1, 2]
    )

    async def generate(self, *args, **kwargs):
        yield output

    async def call(system, method, *args):
        return [{"position": 1, "states": {"0": bytes(64)}}]

    monkeypatch.setattr(AsyncLLM, "generate", generate)
    monkeypatch.setattr(AsyncLLM, "__del__", lambda self: None)
    sessions = object.__new__(SessionFrontEnd)
    sessions.store = SessionStore(StateLayout(("l",), heads=1, rank=4, adapter="a", model="m"))
    sessions.obstacle, sessions._aborted, sessions._logger = None, [], logging.getLogger()
    engine = object.__new__(AsyncLLMWithMemory)
    engine.memory = VLLMFrontEnd({"delta": sessions})
    engine.memory.call = call
    return engine


def alice():
    from vllm import SamplingParams

    return SamplingParams(extra_args={"mem_session": "alice"})


def is_free(engine) -> bool:
    return (
        "alice" not in engine.memory.parts["delta"].store._sessions
        or engine.memory.parts["delta"].store._sessions["alice"].writer is None
    )


def test_a_stream_that_is_never_read_gives_its_session_back(engine):
    stream = engine.generate("hi", alice(), "r")
    assert not is_free(engine)
    del stream
    gc.collect()
    assert is_free(engine)


def test_a_read_stream_commits(engine):
    async def read() -> None:
        async for _ in engine.generate("hi", alice(), "r"):
            assert is_free(engine), "the session is free before the answer is out"

    asyncio.run(read())
    lease = engine.memory.parts["delta"].store.open(SessionRequest("alice"))
    assert (lease.start.version, lease.start.tokens) == (1, 2)


def test_a_client_that_leaves_during_the_commit_does_not_free_the_session_early(engine, monkeypatch):
    entered, go = threading.Event(), threading.Event()
    stock = engine.memory.parts["delta"].store.commit

    def commit(*args, **kwargs):
        entered.set()
        go.wait(10)
        return stock(*args, **kwargs)

    monkeypatch.setattr(engine.memory.parts["delta"].store, "commit", commit)

    async def leave() -> None:
        async def read() -> None:
            async for _ in engine.generate("hi", alice(), "r"):
                pass

        task = asyncio.create_task(read())
        await asyncio.to_thread(entered.wait, 10)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        del task
        gc.collect()
        assert not is_free(engine), "another writer now would start from the old version and undo this commit"
        go.set()

    asyncio.run(leave())
    assert is_free(engine) and engine.memory.parts["delta"].store.open(SessionRequest("alice")).start.version == 1


def test_a_request_that_vllm_refuses_after_its_pages_were_filled_holds_nothing(monkeypatch):
    """``LLMEngine`` submits it in a step, long after ``add_request``."""
    from vllm import SamplingParams
    from vllm.v1.engine.llm_engine import LLMEngine

    from mem_triton.systems.base import FrontendPart, RequestMemory
    from mem_triton_vllm.front_end import VLLMFrontEnd
    from mem_triton_vllm.sync_engine import LLMEngineWithMemory

    def refuse(self, *_, **__):
        raise ValueError("too long")

    class Part(FrontendPart):
        filled, closed = False, []

        def admit(self, fields, params):
            return RequestMemory(waits=True)

        async def ready(self, memory, alive, rpc):
            while not self.filled:
                await asyncio.sleep(0)

        def close(self, memory):
            self.closed.append(memory)

    monkeypatch.setattr(LLMEngine, "add_request", refuse)
    monkeypatch.setattr(LLMEngine, "abort_request", lambda *_: None)
    monkeypatch.setattr(LLMEngine, "has_unfinished_requests", lambda _: False)
    monkeypatch.setattr(LLMEngineWithMemory, "__del__", lambda self: None, raising=False)
    engine, part = object.__new__(LLMEngineWithMemory), Part()
    engine.engine_core = None
    engine.memory = VLLMFrontEnd({"memory": part})
    engine.start_memory()
    engine.add_request("r", {"prompt_token_ids": [1, 2]}, SamplingParams())
    assert engine.step() == [] and engine._running and not part.closed
    part.filled = True
    with pytest.raises(ValueError, match="too long"):
        engine.step()
    assert part.closed and not engine._running and not engine._streams and engine.step() == []


def test_fault16_a_client_s_salt_cannot_pass_for_a_memory():
    """Requests that no state corrects have no salt of ours; one that says a session's must not find its prefix."""
    from vllm.v1.engine import EngineCoreRequest

    from mem_triton_vllm.front_end import _salt

    forged = _salt([1, 2], "a session's key")["cache_salt"]
    keys = [forged]
    for own in (None, "tenant", forged, _salt({"cache_salt": forged}, None)["cache_salt"]):
        prompt = {"prompt_token_ids": [1, 2], "cache_salt": own}
        keys.append(_salt(prompt, None)["cache_salt"])
        rendered = EngineCoreRequest(**{**dict.fromkeys(EngineCoreRequest.__struct_fields__), "cache_salt": own})
        assert _salt(rendered, None).cache_salt == keys[-1] and rendered.cache_salt == own
    assert keys[1:3] == [None, "tenant"] and len(set(keys)) == 5
    assert _salt([1, 2], None) == [1, 2] and _salt("text", None) == "text"


def test_fault16_streams_of_inputs_cannot_choose_their_scope():
    """They have no salt, so prefixes of both kinds would be shared."""
    from vllm.exceptions import VLLMValidationError
    from vllm.sampling_params import SamplingParams

    from mem_triton_vllm.front_end import VLLMFrontEnd

    async def stream():
        yield {"prompt_token_ids": [1]}

    for field in ("mem_read", "mem_write"):
        with pytest.raises(VLLMValidationError, match=f"{field}: streaming inputs"):
            VLLMFrontEnd({}).open_request(stream(), SamplingParams(extra_args={field: 0}))


def test_warnings_are_said_where_vllm_s_routes_have_raised_the_root_s_level(monkeypatch):
    """Routes for adapters do so in vLLM's server (model_hosting_container_standards). Control: without a front end."""
    from mem_triton_vllm.front_end import VLLMFrontEnd

    monkeypatch.setattr(logging.root, "level", logging.ERROR)
    monkeypatch.setattr(logging.getLogger("mem_triton"), "level", logging.NOTSET)
    logging.root.manager._clear_cache()
    try:
        assert not logging.getLogger("mem_triton.systems").isEnabledFor(logging.WARNING)
        VLLMFrontEnd({})
        assert logging.getLogger("mem_triton.systems").isEnabledFor(logging.WARNING)
    finally:
        monkeypatch.undo()
        logging.root.manager._clear_cache()
