"""Makes what a request says an entry of the bank: ``mem_capture`` in a front end.

What is kept is text: the prompt, without an open turn and without a system prompt where it is a chat, and with the
answer if the request asks for it. It is read once more, by an engine request of its own that nothing else takes part
in: no other memory, no session, no adapter. So the entry is what ``mem-triton write`` would have made of the same
tokens, whatever the request itself was answered with, and most of it lies in the engine's prefix cache.

Example::

    capture = captures.check(request, params)                 # RequestError, before anything runs
    captures.begin(capture, prompt_ids)                       # RequestError
    ids = captures.tokens(capture, prompt_ids, answer_ids)    # after the answer
    ...                                                       # the engine reads ids, with ``payload(capture, ids)``
    captures.keep(capture, ids, answers)                      # CaptureError
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import sqlite3
import threading
import uuid
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from http import HTTPStatus
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError

from mem_triton import metrics
from mem_triton.schema import ConfigError
from mem_triton.store.bank import Bank, BankError, BankLockedError, NewEntry
from mem_triton.store.bank.captured import SOURCE, captured_id, owner_of
from mem_triton.store.bank.maintenance import INCOMING
from mem_triton.systems.base import Failure
from mem_triton.systems.explicit.chat import ChatFrame
from mem_triton.systems.explicit.layout import Layout, join_captured
from mem_triton.systems.explicit.request import ReadingRequest
from mem_triton.systems.params import RequestParams
from mem_triton.systems.payload import CaptureOrder, SystemPayload
from mem_triton.systems.request import RequestError

WRITER_WAIT = 10.0
"""Seconds that a capture waits for another process that writes the bank."""
LONGEST_ID = 128
"""Characters of an id that a request can name."""
_FULL = (errno.ENOSPC, errno.EDQUOT)


class CaptureError(Failure):
    """What a request said could not be kept, although it was answered. status: of the HTTP answer."""

    def __init__(self, name: str, reason: str, status: HTTPStatus = HTTPStatus.INTERNAL_SERVER_ERROR) -> None:
        super().__init__(f'mem_capture: "{name}" was not kept: {reason[:500]}', status)


@dataclass
class Capture:
    """One request's capture, from its fields to its entry. id: of the entry; lease: names its files among the workers'.

    chat: the prompt is known to be a chat. ref, error: what became of it, None before.
    """

    request: ReadingRequest
    id: str
    chat: bool = False
    lease: str = field(default_factory=lambda: uuid.uuid4().hex)
    ref: str | None = None
    error: CaptureError | None = None

    def report(self) -> dict[str, str]:
        """What the answer says about it."""
        if self.ref is not None:
            return {"id": self.ref}
        return {"error": str(self.error or "nothing was kept: the request did not end normally")}


class Captures:
    """Checks, reads and keeps; one per front end.

    mode: ``memory.capture``. decode: token ids to text, None without a tokenizer. frame: how its chats look, None if
    that is unknown. Raises ConfigError if the bank cannot be written.
    """

    def __init__(
        self,
        bank: Bank,
        layout: Layout,
        mode: Literal["off", "own", "tenant"],
        max_model_len: int,
        decode: Callable[[list[int]], str] | None,
        frame: Callable[[], ChatFrame | None],
        logger: logging.Logger,
    ) -> None:
        self.bank, self.layout, self.mode, self.max_model_len = bank, layout, mode, max_model_len
        self.decode, self.frame, self._logger = decode, frame, logger
        self.folder = bank.path / INCOMING
        self._running: dict[str, str] = {}  # entry's id -> lease of the request that captures it
        self._lock = threading.Lock()
        self._writing = threading.Lock()  # captures that end together are kept one after the other
        if mode != "off" and bank.spec.kind == "prefix":
            weakref.finalize(self, os.close, _hold(self.folder))

    # Before anything runs.

    def check(self, request: ReadingRequest, params: RequestParams) -> Capture:
        """A request's capture; its id is the request's alone until ``release``. Raises RequestError."""
        spec, id = self.bank.spec, captured_id(request.capture, request.tenant)
        if self.mode == "off":
            raise RequestError("mem_capture", 'this server keeps nothing: its mem_triton.memory.capture is "off"')
        if spec.kind != "prefix":
            raise RequestError(
                "mem_capture",
                f'keeps whole prompts, and this bank is of kind "{spec.kind}"; use one of kind "prefix"',
            )
        if self.mode == "tenant" and not request.tenant:
            raise RequestError("mem_capture", "this server keeps only what belongs to a tenant; say mem_tenant")
        if params.lora:
            raise RequestError("mem_capture", "a prompt read through a LoRA adapter would not fit the plain model")
        if params.answers != 1:
            raise RequestError("mem_capture", f"keeps one request's prompt: set n to 1, got {params.answers}")
        if len(id) > LONGEST_ID:
            raise RequestError("mem_capture", f'"{id}" would have {len(id)} characters, an id has at most {LONGEST_ID}')
        capture = Capture(request, id, params.chat)
        with self._lock:
            if id in self._running:
                raise RequestError("mem_capture", f'"{id}" is being captured by another request; wait for it')
            self._may_write(capture, self.bank)
            self._running[id] = capture.lease
        return capture

    def _may_write(self, capture: Capture, bank: Bank) -> bool:
        """Whether there is an entry to supersede. Raises RequestError if it must not be."""
        try:
            there = bank.resolve(capture.id, tenant=owner_of(capture.request.tenant))
        except BankError:
            return False
        if there.source != SOURCE:
            raise RequestError("mem_capture", f'"{capture.id}" was not captured; choose another name')
        if not capture.request.replace:
            raise RequestError("mem_capture", f'"{capture.id}" is there; say "mem_replace": 1, or choose another name')
        return True

    def begin(self, capture: Capture, prompt_ids: Sequence[int]) -> None:
        """Check what is kept of the prompt. Raises RequestError if it is nothing, or could never be read."""
        frame = self.frame()
        if capture.chat and (frame is None or not frame.is_chat(prompt_ids)):
            raise RequestError(
                "mem_capture",
                "this chat is not rendered by the tokenizer's own template, or its turns do not begin with special "
                "tokens, so where they end is unknown; send what is to be kept as a completion's prompt",
            )
        self.tokens(capture, prompt_ids, ())

    def tokens(self, capture: Capture, prompt_ids: Sequence[int], answer: Sequence[int]) -> list[int]:
        """The tokens that are kept. Raises RequestError if there are none, or too many."""
        answer = answer if capture.request.capture_answer else None
        frame = self.frame()
        ids = frame.kept(prompt_ids, answer) if frame is not None else [*prompt_ids, *(answer or ())]
        if not ids:
            raise RequestError("mem_capture", "the prompt has no tokens to keep")
        pages = -(-len(ids) // self.layout.page_tokens)
        if pages > self.layout.max_pages or len(ids) >= self.max_model_len:
            raise RequestError(
                "mem_capture",
                f"{len(ids)} tokens could never be read: they need {pages} memory pages, a request may use "
                f"{self.layout.max_pages}, and the context has room for {self.max_model_len - 1}",
            )
        return ids

    # After the answer.

    def payload(self, capture: Capture, ids: Sequence[int]) -> SystemPayload:
        """What the workers need of the engine request that reads what is kept."""
        return SystemPayload(capture=CaptureOrder(capture.lease, str(self.folder), len(ids)))

    def keep(self, capture: Capture, ids: Sequence[int], answers: Sequence[dict[str, Any]]) -> None:
        """Make an entry of what the ranks captured. Raises CaptureError, OSError, ValueError, SafetensorError."""
        if errors := [answer["error"] for answer in answers if "error" in answer]:
            full = any(os.strerror(number) in errors[0] for number in _FULL)
            raise OSError(errno.ENOSPC if full else errno.EIO, errors[0])
        block, dtype = join_captured(self.bank.spec, [answer["file"] for answer in answers]), self.bank.spec.torch_dtype
        block = replace(block, keys=block.keys.to(dtype), values=block.values.to(dtype))  # the engine may have another
        text = self.decode(list(ids)) if self.decode else f"({len(ids)} tokens)"
        entry = NewEntry(
            id=capture.id,
            text=text,
            block=block,
            source=SOURCE,
            tenant=owner_of(capture.request.tenant),
            token_ids=list(ids),
            content_key=SOURCE,
        )
        with self._writing, Bank.open(self.bank.path, writable=True, wait=WRITER_WAIT) as bank:
            known = self._may_write(capture, bank)
            capture.ref = bank.update(capture.id, entry) if known else bank.add([entry])[0]
        metrics.CAPTURES.inc()

    def failed(self, capture: Capture, error: BaseException) -> None:
        """Note why nothing was kept."""
        status = HTTPStatus.INTERNAL_SERVER_ERROR
        if isinstance(error, RequestError):
            status = HTTPStatus.CONFLICT
        elif isinstance(error, BankLockedError):
            status = HTTPStatus.SERVICE_UNAVAILABLE
        elif _is_full(error):
            status = HTTPStatus.INSUFFICIENT_STORAGE
        capture.error = CaptureError(capture.request.capture, _reason(error), status)
        metrics.CAPTURE_FAILURES.inc()
        self._logger.error("%s", capture.error)

    def discard(self, capture: Capture) -> None:
        """Remove what workers wrote, and let the next request capture under this id."""
        with contextlib.suppress(OSError):
            for file in self.folder.glob(f"{capture.lease}.*"):
                file.unlink(missing_ok=True)
        self.release(capture)

    def release(self, capture: Capture) -> None:
        """Let the next request capture under this id; harmless when it may already."""
        with self._lock:
            if self._running.get(capture.id) == capture.lease:
                del self._running[capture.id]


def _hold(folder: Path) -> int:
    """Remove what captures of servers that have ended left, and mark this server as running for others.

    Every server holds a shared lock on the folder for as long as it lives, so nothing of a living one is removed.
    Returns the handle that holds it. Raises ConfigError.
    """
    try:
        folder.mkdir(exist_ok=True)
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pass  # another server lives
        else:
            for file in folder.iterdir():
                file.unlink()
        fcntl.flock(handle, fcntl.LOCK_SH)
        (probe := folder / f".{uuid.uuid4().hex}").touch()
        probe.unlink()
    except OSError as error:
        raise ConfigError(
            f'mem_triton.memory.capture: {folder} cannot be written ({error}); let it be, or set capture to "off"'
        ) from None
    return handle


def _is_full(error: BaseException) -> bool:
    return (
        getattr(error, "errno", None) in _FULL
        or any(os.strerror(number) in str(error) for number in _FULL)
        or (isinstance(error, sqlite3.OperationalError) and "full" in str(error))
    )


def _reason(error: BaseException) -> str:
    if isinstance(error, RequestError):
        return str(error).removeprefix(f"{error.field}: ")
    known = isinstance(error, (OSError, ValueError, SafetensorError, sqlite3.Error))
    text = str(error.strerror if isinstance(error, OSError) and error.strerror else error)
    return text if known else f"{type(error).__name__}: {text}"
