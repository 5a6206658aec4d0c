"""Calls that a step carries out: once, in the step that brings them, and answered with what they give or raise."""

from __future__ import annotations

from concurrent.futures import Future

import pytest

from mem_triton.runtime.worker.orders import Orders, order_of
from mem_triton.systems.payload import PayloadError, RequestPayload, encode


class Memory:
    """What carries calls out."""

    def __init__(self) -> None:
        self.told: list[tuple] = []

    def call(self, *call):
        self.told.append(call)
        if call[1] == "break":
            raise RuntimeError("broken")
        return sum(call[2:])


def test_a_call_is_carried_out_by_the_step_that_brings_it_and_once():
    memory = Memory()
    orders = Orders(memory.call)
    orders.leave("a", "toy", "add", 1, 2)
    outcome = orders.outcome("a")
    assert isinstance(outcome, Future) and not outcome.done() and memory.told == []
    orders.run("a")
    orders.run("a")  # a request that was preempted comes again
    assert outcome.result(0) == 3 and memory.told == [("toy", "add", 1, 2)]


def test_what_a_call_raises_is_its_answer():
    memory = Memory()
    orders = Orders(memory.call)
    orders.leave("a", "toy", "break")
    orders.run("a")
    with pytest.raises(RuntimeError, match="broken"):
        orders.outcome("a").result(0)


def test_a_call_that_nobody_wants_any_more_is_not_carried_out():
    memory = Memory()
    orders = Orders(memory.call)
    orders.leave("a", "toy", "add", 1)
    orders.forget("a")
    orders.run("a")
    orders.run("never left")
    assert memory.told == []
    with pytest.raises(LookupError):
        orders.outcome("a")
    orders.forget("a")


def test_a_request_names_the_call_that_it_brings():
    assert order_of(encode(RequestPayload({}, order="a"))) == "a"
    assert order_of(encode(RequestPayload({}))) is None and order_of(None) is None
    with pytest.raises(PayloadError):
        order_of(b"\xc1")
