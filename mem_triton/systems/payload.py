"""Defines the one message about a request's memory that crosses processes: to schedulers and workers.

It travels with the request, so preemption, tensor parallelism and restarts of a step need nothing else. Keys and values
of a request depend on it, and ``keys_between`` says on which part of it.

Example::

    payload = RequestPayload({"memory": SystemPayload(key="bank", segments=(Segment("alice@3"),))})
    assert decode(encode(payload)) == payload
    keys_between(payload, 0, 16)                 # (("memory", "bank", "alice@3"),)
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import msgspec

from mem_triton.store.pool.plan import FOREVER, Attachment, joined, seen_between

VERSION = 3


class PayloadError(ValueError):
    """A payload that this mem_triton cannot read; the message says what it is and what is known."""


class Segment(msgspec.Struct, frozen=True, array_like=True):
    """Keys and values that the query positions [first, end) attend to. ref: an immutable "id@version"."""

    ref: str
    first: int = 0
    end: int = FOREVER


class StateRef(msgspec.Struct, frozen=True, array_like=True):
    """A recurrent state. handle: names the state that is left behind, None if nobody asks for it.

    data: fp32 bytes to start from, None for zeros. write: whether the request's tokens update it.
    """

    handle: str | None = None
    data: bytes | None = None
    write: bool = True


class CaptureOrder(msgspec.Struct, frozen=True, array_like=True):
    """Copy the keys and values of a request's first ``tokens`` tokens to a file in ``folder``, named by ``handle``."""

    handle: str
    folder: str
    tokens: int


class PageRun(msgspec.Struct, frozen=True, array_like=True):
    """The pages of a reference, in order, and the tokens in them."""

    pages: tuple[int, ...]
    tokens: int


class SystemPayload(msgspec.Struct, frozen=True, omit_defaults=True):
    """One memory system's part. key: what the keys and values of all the request's tokens depend on, besides segments.

    pages: where each segment's reference lies. prompt: tokens of the prompt, for systems that choose by all of them.
    """

    key: str = ""
    state: StateRef | None = None
    segments: tuple[Segment, ...] = ()
    pages: dict[str, PageRun] = {}
    capture: CaptureOrder | None = None
    prompt: int = 0

    @property
    def plan(self) -> tuple[Attachment, ...]:
        """The segments as attachments; neighbouring stretches that see the same reference are one."""
        return joined(Attachment(s.ref, s.first, s.end) for s in self.segments)


class Place(msgspec.Struct, frozen=True, array_like=True):
    """An engine request that is one piece of an answer. answer: names the answer in the engine's scheduler.

    continues: an earlier piece ran before. goes_on: another piece follows, if this one ends because of its length.
    """

    answer: str
    continues: bool
    goes_on: bool


class RequestPayload(msgspec.Struct, frozen=True):
    """What workers, prefix caches and schedulers need of a request. systems: by the memory system's name.

    place: None for an answer in one piece. order: the call that workers carry out before the step that this brings. The
    version is always written: a reader with another default would take a
    missing one for its own.
    """

    systems: dict[str, SystemPayload]
    version: int = VERSION
    place: Place | None = None
    order: str | None = None


def place_of(data: bytes | None) -> Place | None:
    """The place that an encoded payload asks for; None without one, and for what cannot be read."""
    try:
        return decode(data).place if data is not None else None
    except PayloadError:  # said where its memory is entered
        return None


class _Version(msgspec.Struct):
    version: int


def encode(payload: RequestPayload) -> bytes:
    """The payload as msgpack."""
    return msgspec.msgpack.encode(payload)


@lru_cache(maxsize=1024)  # prefix caches ask for every block of a prompt
def decode(data: bytes) -> RequestPayload:
    """What ``encode`` wrote. Raises PayloadError for a newer version, and for anything else."""
    if not isinstance(data, bytes):
        raise PayloadError(f"a request's memory payload is {type(data).__name__}, expected bytes")
    try:
        version = msgspec.msgpack.decode(data, type=_Version).version
        if version != VERSION:
            raise PayloadError(
                f"a request's memory payload has version {version}, this mem_triton reads {VERSION}; "
                "all processes of an engine need the same mem_triton"
            )
        return msgspec.msgpack.decode(data, type=RequestPayload)
    except msgspec.MsgspecError as error:
        raise PayloadError(f"a request's memory payload cannot be read: {error}") from None


def keys_between(payload: RequestPayload, start: int, end: int) -> tuple[tuple[Any, ...], ...]:
    """What the keys and values at positions [start, end) depend on: by system, its key and the segments seen there."""
    return tuple(
        (name, part.key, *seen_between([Attachment(s.ref, s.first, s.end) for s in part.segments], start, end))
        for name, part in sorted(payload.systems.items())
        if part.key or part.segments
    )
