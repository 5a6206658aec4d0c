"""Captures and commits in ``LLM``'s engine, which is stepped by its caller: no vLLM engine runs."""

from __future__ import annotations

import errno
import importlib
from types import SimpleNamespace

import pytest

from mem_triton.runtime.frontend.memory import Opened
from mem_triton.store.bank import Bank
from tests.runtime.capture_case import PROMPT, Served, make_bank

pytestmark = pytest.mark.engine


class Engine:
    """``LLMEngineWithMemory`` over a worker's real captures; what it submits is in ``submitted``."""

    def __init__(self, served: Served, monkeypatch) -> None:
        module = importlib.import_module("mem_triton_vllm.sync_engine")
        front_end = importlib.import_module("mem_triton_vllm.front_end")
        self.served, self.submitted, self.gone = served, [], None
        self.engine = engine = object.__new__(module.LLMEngineWithMemory)
        engine.memory = front_end.VLLMFrontEnd(None, served.memory.explicit)
        engine.start_memory()
        engine.collective_rpc = self._call
        self.running = module._Running
        monkeypatch.setattr(module.LLMEngine, "add_request", lambda _, id, *rest: (self.submitted.append(rest), id)[1])
        monkeypatch.setattr(module.LLMEngine, "abort_request", lambda *_: None)

    def _call(self, method: str, args: tuple = ()):
        method = method.removeprefix("mem_triton_")
        if method == self.gone:
            raise RuntimeError("rank 0 is gone")
        worker = self.served.worker
        if method == "drop_captures":
            return [worker.drop(*args)]
        return [worker.state(*args)]

    def answered(self, finish: str = "length", **words) -> list:
        """What the caller sees when a request's answer is whole."""
        opened = self.served.open(**words)
        prompt = {"prompt_token_ids": PROMPT}
        params = SimpleNamespace(output_kind=None)
        running = self.running(opened, prompt, params, ((), {}))
        self.engine._running["r"] = running
        return self.engine._advance(_output("an answer", [1, 2], finish), running)

    def read(self) -> list:
        """What the caller sees when what is kept has been read."""
        carried = self.submitted[-1][1].extra_args["mem_triton"]
        self.served.worker.enter("r", carried)
        self.served.worker.set_rows(["r"], [carried["capture"]["tokens"] - 1])
        self.served.worker.leave("r")
        return self.engine._advance(_output("", [3], "length"), self.engine._running["r"])


def _output(text: str, tokens: list[int], finish: str):
    from vllm.outputs import CompletionOutput, RequestOutput

    answer = CompletionOutput(0, text, tokens, None, None, finish_reason=finish)
    return RequestOutput("r", None, PROMPT, None, [answer], finished=True)


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


@pytest.mark.parametrize("method", ["capture_state", "drop_captures"])
def test_fault18_workers_that_are_gone_cost_llm_no_answer_and_leave_no_file(engine, method):
    engine.answered()
    engine.gone = method
    (output,) = engine.read()
    engine.served.worker._writer.submit(int).result(20)
    assert output.outputs[0].text == "an answer" and not engine.served.captures._running
    assert (output.outputs[0].finish_reason == "error") == (method == "capture_state")


def test_fault18_an_abort_while_it_is_read_leaves_nothing_behind(engine):
    engine.answered()
    carried = engine.submitted[-1][1].extra_args["mem_triton"]
    engine.served.worker.enter("r", carried)
    engine.engine.abort_request(["r"])
    engine.served.worker.set_rows(["r"], [99])
    engine.served.worker.leave("r")
    engine.served.worker._writer.submit(int).result(20)
    assert engine.served.left() == [] and not engine.engine._running


def test_fault18_a_read_that_loses_its_memory_fails_the_capture_and_not_the_answer(engine):
    engine.answered()
    output = engine.engine._fail("r", "lost in a worker")
    assert output.outputs[0].text == "an answer" and "lost in a worker" in report(output)["capture"]["error"]
    assert engine.served.left() == []


def test_fault18_an_answer_that_does_not_end_normally_keeps_nothing(engine):
    (output,) = engine.answered("abort")
    assert "did not end normally" in report(output)["capture"]["error"]
    assert engine.submitted == [] and engine.served.left() == []


def test_fault17_a_session_that_cannot_be_committed_is_a_warning_beside_llm_s_answer(engine):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    engine.engine.memory.sessions = SimpleNamespace(
        writes=lambda lease: True, take_arguments=lambda *_: ("lease", 1, []), commit=full, abort=lambda lease: None,
        not_committed=lambda lease, error: f"not committed: {error}",
    )  # fmt: skip
    engine.engine.collective_rpc = lambda *_, **__: [{}]
    running = engine.running(Opened(lease=object()), {}, SimpleNamespace(output_kind=None), ((), {}))
    engine.engine._running["r"] = running
    (output,) = engine.engine._advance(_output("an answer", [1, 2], "stop"), running)
    assert output.outputs[0].text == "an answer" and "No space left" in report(output)["warnings"][0]
