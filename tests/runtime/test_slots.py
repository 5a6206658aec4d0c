"""Worker tables: who starts from which state, whose state is kept, and which position it belongs to."""

from __future__ import annotations

import pytest
import torch

from mem_triton.systems.delta_mem.slots import StateSlots
from mem_triton.systems.payload import StateRef

SIZE, ALL_LAYERS = 4, 6


def carried(lease: str, value: float | None = None, write: int = 1) -> StateRef:
    data = None
    if value is not None:
        data = (torch.arange(ALL_LAYERS * SIZE, dtype=torch.float32) + value).numpy().tobytes()
    return StateRef(lease, data, bool(write))


@pytest.fixture
def slots() -> StateSlots:
    return StateSlots([1, 4], SIZE, 3, torch.device("cpu"))  # a pipeline stage that holds layers 1 and 4


def test_rows_follow_the_batch(slots):
    slots.enter("a", carried("la", 100.0))
    slots.enter("plain", None)
    slots.enter("frozen", StateRef(write=False))
    slots.set_rows(["plain", "a", "frozen"], [3, 4, 5])
    slot = int(slots.row_slot[1])
    assert slots.row_slot.tolist() == [-1, slot, -1] and slot >= 0
    assert slots.row_write.tolist() == [1, 1, 0]
    assert slots.initial[0, slot].tolist() == [104.0, 105.0, 106.0, 107.0], "this stage's own layers, 1 and 4"
    assert slots.initial[1, slot].tolist() == [116.0, 117.0, 118.0, 119.0]
    slots.leave("a"), slots.leave("frozen")
    slots.set_rows(["plain"], [4])
    assert slots.row_slot.tolist() == [-1] * 3 and slots.row_write.tolist() == [1] * 3


def test_fault16_rows_of_requests_that_say_nothing_stay_at_zeros(tmp_path):
    """As warm-ups, failed steps and rows beside sessions do; a request that only reads a bank says nothing, too."""
    slots = StateSlots([1, 4], SIZE, 5, torch.device("cpu"), writes=False)
    assert slots.row_write.tolist() == [0] * 5, "before any request"
    slots.enter("a", carried("la", 100.0))
    slots.enter("bank", None)
    slots.enter("own", StateRef(write=True))
    slots.set_rows(["plain", "a", "bank", "own"], [3, 4, 5, 6])
    slot = int(slots.row_slot[1])
    assert slots.row_slot.tolist() == [-1, slot, -1, -1, -1] and slot >= 0
    assert slots.row_write.tolist() == [0, 1, 0, 1, 0]
    slots.forget_rows()
    assert slots.row_write.tolist() == [0] * 5 and slots.row_slot.tolist() == [-1] * 5
    slots.set_rows(["own"], [7])
    for request in ("a", "bank", "own"):
        slots.leave(request)
    slots.set_rows(["plain"], [4])
    assert slots.row_write.tolist() == [0] * 5


def test_a_new_session_starts_from_zeros_in_a_used_slot(slots):
    for lease in ("x", "y", "z"):
        slots.enter(lease, carried(lease, 5.0))
    for lease in ("x", "y", "z"):
        slots.leave(lease)
    slots.enter("new", carried("ln"))
    slots.set_rows(["new"], [0])
    assert not slots.initial[:, int(slots.row_slot[0])].any()


def fill_last(slots: StateSlots, row: int, value: float, position: int) -> None:
    slots.last[:, int(slots.row_slot[row]), position % 2] = value


@pytest.mark.parametrize("left", [False, True])
def test_take_finds_the_state_of_a_position(slots, left):
    slots.enter("a", carried("la"))
    for position in (10, 11):  # the engine ran one step past the end, as async scheduling does
        slots.set_rows(["a"], [position])
        fill_last(slots, 0, float(position), position)
    if left:
        slots.leave("a")
        slots.enter("b", carried("lb"))  # takes the slot over
        slots.set_rows(["b"], [0])
        slots.last.fill_(-1)
    reached, data = slots.take("la", 10)
    assert reached == 10 and torch.frombuffer(bytearray(data), dtype=torch.float32).tolist() == [10.0] * (2 * SIZE)


def test_take_reports_that_the_engine_ran_too_far(slots):
    slots.enter("a", carried("la"))
    for position in (10, 11, 12):
        slots.set_rows(["a"], [position])
        fill_last(slots, 0, float(position), position)
    reached, data = slots.take("la", 9)
    assert reached == 11 and torch.frombuffer(bytearray(data), dtype=torch.float32)[0] == 11.0


def test_preempted_and_resumed_requests_start_over(slots):
    slots.enter("a", carried("la", 3.0))
    slots.set_rows(["a"], [10])
    slots.leave("a")
    slots.enter("a", carried("la", 3.0))
    slots.set_rows(["a"], [2])
    fill_last(slots, 0, 2.0, 2)
    reached, data = slots.take("la", 2)
    assert reached == 2 and torch.frombuffer(bytearray(data), dtype=torch.float32)[0] == 2.0


def test_frozen_readers_and_unknown_leases_have_no_state(slots):
    slots.enter("r", carried("lr", 1.0, write=0))
    slots.set_rows(["r"], [3])
    slots.leave("r")
    for lease in ("lr", "nobody"):
        with pytest.raises(KeyError, match="no state is held"):
            slots.take(lease, 3)


def test_dropped_states_are_forgotten_and_abandoned_ones_are_bounded(slots):
    for i in range(40):
        slots.enter(f"r{i}", carried(f"l{i}"))
        slots.set_rows([f"r{i}"], [0])
        slots.leave(f"r{i}")
    assert len(slots._left) == slots._left_limit
    slots.drop(["l39"])
    with pytest.raises(KeyError):
        slots.take("l39", 0)
    slots.take("l38", 0)


def test_fault29_a_state_that_was_taken_is_not_kept_again(slots):
    slots.enter("a", carried("la"))
    slots.set_rows(["a"], [1])
    slots.take("la", 1)
    slots.leave("a")
    assert not slots._left


def test_fault29_after_a_failure_no_row_is_frozen_by_who_was_there_before(slots):
    slots.enter("r", carried("lr", 1.0, write=0))
    slots.set_rows(["r"], [3])
    assert slots.row_write.tolist() == [0, 1, 1]
    slots.forget_rows()
    assert slots.row_slot.tolist() == [-1] * 3 and slots.row_write.tolist() == [1] * 3
