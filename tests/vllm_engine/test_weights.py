"""A running server's weights do not change under its banks and sessions (fault 14)."""

from __future__ import annotations

import asyncio
import importlib
import inspect
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from mem_triton.runtime.frontend.gate import Gate
from mem_triton.runtime.frontend.stepped import SteppedLoop
from tests.support.memory_scenarios import PROMPTS
from tests.support.server import ids
from tests.vllm_engine.server import Server, memory_flags

LOOKS = {
    "compute_weight_checksums",
    "get_weight_version",
    "set_weight_version",
    "shutdown_weight_transfer_engine",
    "supports_draft_weight_updates",
    "update_weight_version",
}
"""Methods about weights that leave them as they are."""


def engine(name: str, monkeypatch):
    """An engine with memory whose stock part notes its calls."""
    module = importlib.import_module(f"mem_triton_vllm.{'async_engine' if name == 'AsyncLLM' else 'sync_engine'}")
    stock, with_memory, called = getattr(module, name), getattr(module, f"{name}WithMemory"), []

    def note(self, method, *args, **kwargs):
        called.append(method)

    async def note_async(self, method, *args, **kwargs):
        called.append(method)

    for method in ("collective_rpc", "sleep"):
        monkeypatch.setattr(stock, method, note_async if name == "AsyncLLM" else note)
    made = object.__new__(type(name, (with_memory,), {"__del__": lambda self: None}))
    made.memory, made._loop = SimpleNamespace(gate=Gate()), SteppedLoop()
    made.asleep = True

    def woken(self, *args):
        called.append("wake_up")

    async def woken_async(self, *args):
        called.append("wake_up")

    async def is_sleeping_async(self):
        return made.asleep

    monkeypatch.setattr(stock, "wake_up", woken_async if name == "AsyncLLM" else woken)
    sleeping = is_sleeping_async if name == "AsyncLLM" else lambda self: made.asleep
    monkeypatch.setattr(stock, "is_sleeping", sleeping)
    return made, called


@pytest.mark.parametrize("name", ["AsyncLLM", "LLMEngine"])
def test_workers_are_not_called_while_an_engine_sleeps_nor_when_it_is_half_awake(name, monkeypatch):
    made, called = engine(name, monkeypatch)
    call(made.sleep)
    assert made.memory.gate._is_shut
    call(made.wake_up, ["weights"])
    assert made.memory.gate._is_shut, "its KV cache is not there yet"
    made.asleep = False
    call(made.wake_up)
    assert not made.memory.gate._is_shut and called == [1, "wake_up", "wake_up"]


@pytest.mark.parametrize("name", ["AsyncLLM", "LLMEngine"])
def test_an_engine_that_did_not_fall_asleep_is_called_again(name, monkeypatch):
    made, _ = engine(name, monkeypatch)

    def fails(self, *args, **kwargs):
        raise RuntimeError("no memory allocator")

    module = importlib.import_module(f"mem_triton_vllm.{'async_engine' if name == 'AsyncLLM' else 'sync_engine'}")
    monkeypatch.setattr(getattr(module, name), "sleep", fails)
    with pytest.raises(RuntimeError):
        call(made.sleep)
    assert not made.memory.gate._is_shut


def call(method, *args, **kwargs):
    result = method(*args, **kwargs)
    return asyncio.run(result) if inspect.isawaitable(result) else result


@pytest.mark.parametrize("name", ["AsyncLLM", "LLMEngine"])
def test_fault14_worker_methods_that_change_weights_are_refused_by_name(name, monkeypatch):
    from vllm.exceptions import VLLMValidationError

    from mem_triton_vllm.weights import CHANGES

    made, called = engine(name, monkeypatch)
    assert "reload_weights" in CHANGES and "update_weights" in CHANGES
    for method in CHANGES:
        with pytest.raises(VLLMValidationError, match=f"mem_triton: {method} is refused.*restart it with the new"):
            call(made.collective_rpc, method, kwargs={"update_info": {}})
    for arguments in ({"args": (2,)}, {"kwargs": {"level": "2"}}):
        with pytest.raises(VLLMValidationError, match="sleep level 2"):
            call(made.collective_rpc, "sleep", **arguments)
    with pytest.raises(VLLMValidationError, match=r"sleep level 2 is refused.*use level 1"):
        call(made.sleep, 2, "abort")
    assert called == []
    call(made.sleep)
    call(made.sleep, level=1, mode="wait")
    call(made.collective_rpc, "sleep", args=(1,))
    call(made.collective_rpc, "compute_weight_checksums", timeout=None)
    call(made.collective_rpc, print)
    assert called == [1, 1, "sleep", "compute_weight_checksums", print]


def test_fault14_every_method_of_vllm_s_that_speaks_of_weights_is_refused_or_known_to_look():
    from mem_triton_vllm.weights import CHANGES

    named = {
        name
        for place in ("vllm.v1.worker.gpu_worker:Worker", "vllm.v1.engine.async_llm:AsyncLLM", "vllm:LLM")
        for name in dir(getattr(importlib.import_module(place.partition(":")[0]), place.partition(":")[2]))
        if "weight" in name and not name.startswith("_")
    }
    assert {"reload_weights", "reset_weights", "update_weights"} <= named
    assert named - LOOKS <= CHANGES


@pytest.fixture(scope="module")
def server(memory_bench, tmp_path_factory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("server") / "server.log"
    section = memory_flags(memory_bench.section())
    server = Server(str(memory_bench.model), str(log), section, VLLM_SERVER_DEV_MODE="1")
    try:
        yield server.wait()
    finally:
        server.stop()


@pytest.mark.engine
def test_fault14_a_server_keeps_its_weights_and_says_why(server, memory_bench):
    before = server.tokens(PROMPTS[0], fields=ids("alpha"))
    for path, body in (
        ("/collective_rpc", {"method": "reload_weights"}),
        ("/collective_rpc", {"method": "reset_weights"}),
        ("/sleep?level=2", None),
    ):
        response = server.http.post(path, json=body)
        assert response.status_code == 400 and "is refused" in response.text, response.text
    assert server.http.post("/collective_rpc", json={"method": "get_model_inspection"}).status_code == 200
    assert server.tokens(PROMPTS[0], fields=ids("alpha")) == before == memory_bench.after(PROMPTS[0], "alpha")
