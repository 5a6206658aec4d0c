"""What crosses processes: one struct, read back as it was, and refused with a sentence where it cannot be."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mem_triton.runtime.incidents import IncidentLog, Incidents
from mem_triton.runtime.worker.memory import BatchMemory
from mem_triton.systems.payload import (
    VERSION,
    CaptureOrder,
    PageRun,
    PayloadError,
    RequestPayload,
    Segment,
    StateRef,
    SystemPayload,
    decode,
    encode,
    keys_between,
)

positions = st.integers(0, 2**31 - 1)
segments = st.builds(Segment, st.text(max_size=8), positions, positions)
parts = st.builds(
    SystemPayload,
    key=st.text(max_size=8),
    state=st.none()
    | st.builds(StateRef, st.none() | st.text(max_size=8), st.none() | st.binary(max_size=8), st.booleans()),
    segments=st.lists(segments, max_size=3).map(tuple),
    pages=st.dictionaries(
        st.text(max_size=4), st.builds(PageRun, st.lists(st.integers(0, 99), max_size=3).map(tuple), st.integers(0, 99))
    ),
    capture=st.none() | st.builds(CaptureOrder, st.text(max_size=4), st.text(max_size=4), st.integers(0, 99)),
)


@given(st.dictionaries(st.text(max_size=8), parts, max_size=3))
def test_it_is_read_as_it_was_written(systems):
    payload = RequestPayload(systems)
    assert decode(encode(payload)) == payload


def test_the_version_is_written_whatever_it_is():
    """Else a newer front end's payload would be read as one of the reader's own version."""
    written = msgspec.msgpack.decode(encode(RequestPayload({})))
    assert written == {"systems": {}, "version": VERSION, "place": None, "order": None}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (msgspec.msgpack.encode({"systems": {}}), "missing required field `version`"),
        (
            encode(RequestPayload({}, version=VERSION + 1)),
            f"has version {VERSION + 1}, this mem_triton reads {VERSION}",
        ),
        (msgspec.msgpack.encode({"version": 99, "else": [1]}), "has version 99"),
        (b"", "cannot be read"),
        (b"\xc1", "cannot be read"),
        (msgspec.msgpack.encode({"systems": {"memory": {"segments": [["a", "b"]]}}}), "cannot be read"),
        (msgspec.msgpack.encode([1, 2]), "cannot be read"),
        ({"memory": {}}, "is dict, expected bytes"),
    ],
)
def test_what_cannot_be_read_is_an_error_that_says_so(data, message):
    with pytest.raises(PayloadError, match=message):
        decode.__wrapped__(data)


@pytest.mark.parametrize(
    "data", [b"\xc1", encode(RequestPayload({}, version=99)), encode(RequestPayload({"gone": SystemPayload()}))]
)
def test_a_worker_that_cannot_read_it_loses_the_request_s_memory_and_goes_on(data, tmp_path):
    """A newer front end's, damaged bytes, and a system that this worker does not have."""
    path = tmp_path / "incidents.jsonl"
    path.touch()
    memory = BatchMemory({}, IncidentLog(path))
    memory.enter("r", lambda: data)
    memory.begin_step(["r"], [0], [3])
    assert set(Incidents(path).lost()) == {"r"}


def test_keys_say_what_a_stretch_of_tokens_saw_and_of_which_system():
    payload = RequestPayload(
        {
            "toy": SystemPayload(),
            "memory": SystemPayload("bank", segments=(Segment("a@1", 0, 64), Segment("b@1", 64))),
            "delta": SystemPayload(state=StateRef("s")),
        }
    )
    assert keys_between(payload, 0, 16) == (("memory", "bank", "a@1"),)
    assert keys_between(payload, 48, 80) == (("memory", "bank", "a@1[0:16]", "b@1[16:32]"),)
    assert keys_between(payload, 64, 80) != keys_between(payload, 0, 16), "states have their own key"
