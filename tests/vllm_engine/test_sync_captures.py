"""Captures and commits in ``LLM``'s engine, which is stepped by its caller: no vLLM engine runs."""

from __future__ import annotations

import asyncio
import errno
import importlib
import logging
import time
from types import SimpleNamespace

import pytest
from vllm import SamplingParams

from mem_triton.runtime.frontend.memory import Opened
from mem_triton.runtime.incidents import IncidentLog
from mem_triton.store.bank import Bank
from mem_triton.systems.delta_mem.frontend import SessionFrontEnd, SessionMemory
from mem_triton.systems.payload import decode
from tests.runtime.capture_case import PROMPT, Served, make_bank

pytestmark = pytest.mark.engine


class Engine:
    """``LLMEngineWithMemory`` over a worker's real captures; what it submits is in ``submitted``, by request."""

    def __init__(self, served: Served, monkeypatch) -> None:
        module = importlib.import_module("mem_triton_vllm.sync_engine")
        front_end = importlib.import_module("mem_triton_vllm.front_end")
        self.served, self.submitted, self.gone, self.outputs = served, {}, None, []
        self.engine = engine = object.__new__(module.LLMEngineWithMemory)
        engine.memory = front_end.VLLMFrontEnd(served.memory.parts)
        engine.start_memory()
        engine.memory.call, engine.engine_core = self._call, None
        engine.collective_rpc = lambda *_: None  # the barrier
        self.running = module._SteppedRequest
        stock = module.LLMEngine
        monkeypatch.setattr(
            stock, "add_request", lambda _, id, prompt, params, *rest: (self.submitted.update({id: params}), id)[1]
        )
        monkeypatch.setattr(stock, "abort_request", lambda *_: None)
        monkeypatch.setattr(stock, "has_unfinished_requests", lambda _: bool(self.outputs))
        monkeypatch.setattr(stock, "step", lambda _: [self.outputs.pop(0)])

    async def _call(self, system: str, method: str, *args):
        if method == self.gone:
            raise RuntimeError("rank 0 is gone")
        worker = self.served.worker
        if method == "drop_captures":
            return [worker.drop(*args)]
        return [await asyncio.wrap_future(worker.outcome(*args))]

    def steps(self, *outputs) -> list:
        """What the caller sees while the engine gives these outputs, until nothing more happens without others."""
        self.outputs += outputs
        seen, before = [], dict(self.submitted)
        until = time.monotonic() + 20
        while self.engine._running and self.submitted == before and time.monotonic() < until:
            seen += self.engine.step()
        return seen

    def answered(self, finish: str = "length", **fields) -> list:
        """What the caller sees when a request's answer is whole."""
        opened = self.served.open(**fields)
        running = self.running(opened, {"prompt_token_ids": PROMPT}, PROMPT, SamplingParams(), ((), {}))
        self.engine._running["r"] = running
        running.task = self.engine._loop.spawn(self.engine._serve("r", running))
        self.engine._loop.run_until(lambda: bool(self.submitted))
        return self.steps(_output("an answer", [1, 2], finish))

    @property
    def order(self):
        """What the engine request that reads what is kept carries."""
        return decode(list(self.submitted.values())[-1].extra_args["mem_triton"]).systems["memory"].capture

    def read(self) -> list:
        """What the caller sees when what is kept has been read."""
        order, name = self.order, list(self.submitted)[-1]
        self.served.worker.enter("r", order)
        self.served.worker.set_rows(["r"], [order.tokens - 1])
        self.served.worker.leave("r")
        return self.steps(_output("", [3], "length", name))


def _output(text: str, tokens: list[int], finish: str, name: str = "r"):
    from vllm.outputs import CompletionOutput, RequestOutput

    answer = CompletionOutput(0, text, tokens, None, None, finish_reason=finish)
    return RequestOutput(name, None, PROMPT, None, [answer], finished=True)


@pytest.fixture
def engine(tmp_path, monkeypatch) -> Engine:
    return Engine(Served(make_bank(tmp_path / "bank")), monkeypatch)


def report(output) -> dict:
    return output.kv_transfer_params["mem_triton"]


def test_fault18_an_answer_is_held_until_it_is_kept_and_nothing_stays_behind(engine):
    assert engine.answered() == [] and engine.engine._running
    (output,) = engine.read()
    assert report(output)["capture"] == {"id": "capture:note@1"} and output.outputs[0].text == "an answer"
    assert output.outputs[0].finish_reason == "length" and engine.served.left() == [] and not engine.engine._running


def test_fault17_a_full_disk_costs_llm_no_answer(engine, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    engine.answered()
    with monkeypatch.context() as patch:
        patch.setattr(Bank, "add", full)
        (output,) = engine.read()
    assert (output.outputs[0].text, output.outputs[0].finish_reason) == ("an answer", "error")
    assert "No space left" in report(output)["capture"]["error"] and engine.served.left() == []
    assert engine.answered() == [] and report(engine.read()[0])["capture"] == {"id": "capture:note@1"}


@pytest.mark.parametrize("method", ["captured", "drop_captures"])
def test_fault18_workers_that_are_gone_cost_llm_no_answer_and_leave_no_file(engine, method):
    engine.answered()
    engine.gone = method
    (output,) = engine.read()
    engine.served.worker._writer.submit(int).result(20)
    assert output.outputs[0].text == "an answer" and not engine.served.captures._running
    assert (output.outputs[0].finish_reason == "error") == (method == "captured")


def test_fault18_an_abort_while_it_is_read_leaves_nothing_behind(engine):
    engine.answered()
    engine.served.worker.enter("r", engine.order)
    engine.engine.abort_request(["r"])
    engine.served.worker.set_rows(["r"], [99])
    engine.served.worker.leave("r")
    engine.served.worker._writer.submit(int).result(20)
    assert engine.served.left() == [] and not engine.engine._running


def test_fault18_a_read_that_loses_its_memory_fails_the_capture_and_not_the_answer(engine):
    engine.answered()
    incidents = engine.engine.memory.incidents
    name = list(engine.submitted)[-1]
    IncidentLog(incidents._path).report([f"{name}-0123abcd"], "attention", RuntimeError("lost in a worker"))
    (output,) = engine.steps(_output("", [3], "length", name))
    assert output.outputs[0].text == "an answer" and "lost in a worker" in report(output)["capture"]["error"]
    assert engine.served.left() == []


def test_fault18_an_answer_that_does_not_end_normally_keeps_nothing(engine):
    (output,) = engine.answered("abort")
    assert "did not end normally" in report(output)["capture"]["error"]
    assert list(engine.submitted) == ["r"] and engine.served.left() == []


def test_fault17_a_session_that_cannot_be_committed_is_a_warning_beside_llm_s_answer(engine):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    class Sessions(SessionFrontEnd):
        def __init__(self) -> None:
            self._logger = logging.getLogger()

        writes, take_arguments = (lambda self, lease: True), (lambda self, *_: ("lease", 1, []))

        def payload(self, memory):
            return None

        def identity(self, memory, salted):
            return None

        def commit(self, *_):
            full()

    engine.engine.memory.parts["delta"] = Sessions()
    engine.engine.memory._rpc["delta"] = engine.engine.memory._rpc["memory"]

    async def taken(*_):
        return [{}]

    engine.engine.memory.call = taken
    lease = SimpleNamespace(request=SimpleNamespace(session="alice"))
    opened = Opened({"delta": SessionMemory(lease=lease)})
    running = engine.running(opened, {"prompt_token_ids": PROMPT}, PROMPT, SamplingParams(), ((), {}))
    engine.engine._running["r"] = running
    running.task = engine.engine._loop.spawn(engine.engine._serve("r", running))
    engine.engine._loop.run_until(lambda: bool(engine.submitted))
    (output,) = engine.steps(_output("an answer", [1, 2], "stop"))
    assert output.outputs[0].text == "an answer" and "No space left" in report(output)["warnings"][0]
