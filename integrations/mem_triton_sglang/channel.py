"""The front end calls its workers: SGLang's own messages carry requests, and have no place for a plugin's calls.

Each scheduler process answers on a socket of its own, in a folder that only this user can enter. Messages are msgpack;
bytes travel as they are. A call goes to all ranks at once and gives one answer a rank, in their order.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import errno
import logging
import os
import shutil
import socket
import tempfile
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import zmq
import zmq.asyncio

logger = logging.getLogger("sglang.mem_triton")

VARIABLE = "MEM_TRITON_CHANNEL"
"""Environment variable that tells spawned processes the folder."""
TIMEOUT = 60.0
"""Seconds until a rank that does not answer counts as gone; no handler takes that long."""
_PREFIX = "mem_triton-channel-"


class ChannelError(RuntimeError):
    """A call that failed: which method, which rank, and why."""


def make_folder() -> Path:
    """A fresh folder for one engine; processes spawned from now on serve there. It goes when this process ends.

    An engine that was killed leaves its folder; the next one on the machine takes it away.
    """
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        if _is_left(folder):
            shutil.rmtree(folder, ignore_errors=True)
    folder, owner = Path(tempfile.mkdtemp(prefix=_PREFIX)), os.getpid()  # mkdtemp: mode 0700
    atexit.register(lambda: os.getpid() == owner and shutil.rmtree(folder, ignore_errors=True))
    os.environ[VARIABLE] = str(folder)
    return folder


def _is_left(folder: Path) -> bool:
    """Whether sockets lie there and nobody listens at any; an engine that is about to start has none yet."""
    refused = []
    with contextlib.suppress(OSError):  # another user's
        for path in folder.iterdir():
            with contextlib.closing(socket.socket(socket.AF_UNIX)) as probe:
                refused.append(probe.connect_ex(str(path)) == errno.ECONNREFUSED)
    return bool(refused) and all(refused)


def current_folder() -> Path:
    """The folder of the engine that this process belongs to. Raises ChannelError outside of one."""
    if not (folder := os.environ.get(VARIABLE)):
        raise ChannelError(f"{VARIABLE} is not set: this process was not started by an engine with memory")
    return Path(folder)


def serve(rank: int, handlers: Mapping[str, Callable[..., Any]]) -> threading.Thread:
    """Answer calls to ``rank`` for as long as this process lives, one after the other, in a thread of their own.

    handlers: method -> function; arguments and results are what msgpack carries. What one raises, the caller hears.
    """
    router = zmq.Context().socket(zmq.ROUTER)
    router.bind(_address(current_folder(), rank))
    thread = threading.Thread(target=_answer, args=(router, handlers), name=f"mem_triton-channel-{rank}", daemon=True)
    thread.start()
    return thread


def _answer(router: zmq.Socket, handlers: Mapping[str, Callable[..., Any]]) -> None:
    while True:
        caller, message = router.recv_multipart()
        number, method, args = msgspec.msgpack.decode(message)
        try:
            if method not in handlers:
                raise ChannelError(f"unknown; known are {', '.join(sorted(handlers))}")
            answer = msgspec.msgpack.encode((number, None, handlers[method](*args)))
        except Exception as error:  # also what cannot be encoded
            logger.exception("mem_triton: %s failed", method)
            answer = msgspec.msgpack.encode((number, f"{type(error).__name__}: {error}", None))
        router.send_multipart([caller, answer])


class Client:
    """The front end's end. ranks: how many processes answer; folder: None means this process's engine.

    Example::

        client = Client(ranks=2)
        answers = await client.call("pages_state")     # ChannelError if a rank fails or is gone
    """

    def __init__(self, ranks: int, folder: Path | None = None, timeout: float = TIMEOUT) -> None:
        self.ranks, self.timeout = ranks, timeout
        self._folder = folder or current_folder()
        self._context: zmq.asyncio.Context | None = None  # made in the event loop that calls
        self._dealers: list[zmq.asyncio.Socket] = []  # one a rank
        self._number = 0
        self._lock = asyncio.Lock()

    async def call(self, method: str, *args: Any) -> list[Any]:
        """Call ``method`` on every rank; calls of several tasks take turns. Raises ChannelError."""
        async with self._lock:
            self._connect()
            self._number += 1
            message = msgspec.msgpack.encode((self._number, method, args))
            for dealer in self._dealers:
                await dealer.send(message)
            asked = (self._ask(rank, method) for rank in range(self.ranks))
            answers = await asyncio.gather(*asked, return_exceptions=True)
        if failure := next((answer for answer in answers if isinstance(answer, BaseException)), None):
            raise failure
        return answers

    def close(self) -> None:
        """Hang up."""
        if self._context is not None:
            self._context.destroy(linger=0)
            self._context, self._dealers = None, []

    def _connect(self) -> None:
        if self._context is None:
            self._context = zmq.asyncio.Context()
            self._dealers = [self._context.socket(zmq.DEALER) for _ in range(self.ranks)]
            for rank, dealer in enumerate(self._dealers):
                dealer.connect(_address(self._folder, rank))

    async def _ask(self, rank: int, method: str) -> Any:
        dealer, number = self._dealers[rank], None
        while number != self._number:  # an answer to an earlier call, given up on
            if not await dealer.poll(1000 * self.timeout):
                raise ChannelError(
                    f"{method}: rank {rank} has not answered for {self.timeout:g} seconds; "
                    "its process may be gone, look at its log"
                )
            number, error, answer = msgspec.msgpack.decode(await dealer.recv())
        if error is not None:
            raise ChannelError(f"{method}: rank {rank}: {error}")
        return answer


def _address(folder: Path, rank: int) -> str:
    return f"ipc://{folder}/{rank}"
