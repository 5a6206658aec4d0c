"""Calls an engine's workers from its front end, past the engine: no call waits for a step, and no step for a call.

Each worker process answers on a Unix socket of its own, in a folder that only this user can enter. Messages are
msgpack; bytes travel as they are. A call goes to all ranks at once and gives one answer a rank, in their order. A
handler that returns a future is answered when that is done, so nobody has to ask again; calls overtake each other.

All processes of an engine run on one machine; the folder's path reaches them by an environment variable, as processes
inherit it. A process that ends closes its sockets, whatever ended it: calls that wait for it fail at once.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import errno
import functools
import itertools
import logging
import os
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from multiprocessing import connection
from pathlib import Path
from typing import Any

import msgspec

logger = logging.getLogger("mem_triton")

VARIABLE = "MEM_TRITON_CHANNEL"
"""Environment variable that tells spawned processes the folder."""
CALL = "call"
"""Name of the handler that a worker's memory answers with: (system, method, *args)."""
LEAVE, OUTCOME, FORGET = "leave", "outcome", "forget"
"""Names of the handlers of calls that a step carries out (``runtime.worker.orders``)."""
BACKLOG = 16
PAUSE_SECONDS = 0.01
_PREFIX = "mem_triton-channel-"
_LONGEST = 70
"""Bytes of a temporary directory's path: a socket's address, with the folder and the rank, has 107 (``man 7 unix``)."""


class ChannelError(RuntimeError):
    """A call that failed: which method, which rank, and why."""


def make_folder() -> Path:
    """A fresh folder for one engine; processes spawned from now on serve there. It goes when this process ends.

    An engine that was killed leaves its folder; the next one on the machine takes it away.
    """
    place = tempfile.gettempdir()
    if len(os.fsencode(place)) > _LONGEST:
        place = "/tmp"
    for folder in Path(place).glob(f"{_PREFIX}*"):
        if _is_left(folder):
            shutil.rmtree(folder, ignore_errors=True)
    folder, owner = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=place)), os.getpid()  # mkdtemp: mode 0700
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


class Server:
    """Answers calls to one rank, in threads of its own, until ``close`` or the end of the process.

    handlers: method -> function; arguments and results are what msgpack carries, or a ``concurrent.futures.Future``
    of that. The calls of one client run one after the other in the order in which it made them; none may wait for
    long, or for a step. What one raises, the caller hears.
    """

    def __init__(self, path: Path, handlers: Mapping[str, Callable[..., Any]]) -> None:
        self._path, self._handlers, self._closed = path, handlers, False
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(BACKLOG)
        self._clients: set[connection.Connection] = set()
        self._lock = threading.Lock()
        threading.Thread(target=self._accept, name=f"mem_triton-channel-{path.name}", daemon=True).start()

    def close(self) -> None:
        """Hang up, and take the socket away."""
        with self._lock:
            self._closed, clients = True, list(self._clients)
        for client in clients:
            _hang_up(client)
        self._path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts

    def _accept(self) -> None:
        while not self._closed:
            try:
                client = connection.Connection(self._listener.accept()[0].detach())
            except OSError:  # closed, or no file handle is left
                time.sleep(PAUSE_SECONDS)
                continue
            with self._lock:
                self._clients.add(client)
            threading.Thread(target=self._serve, args=(client,), name="mem_triton-channel", daemon=True).start()
        self._listener.close()

    def _serve(self, client: connection.Connection) -> None:
        reply = functools.partial(_reply, client, threading.Lock())
        try:
            while not self._closed:
                number, method, args = msgspec.msgpack.decode(client.recv_bytes())
                self._answer(reply, number, method, args)
        except (EOFError, OSError):
            pass
        except Exception:
            logger.exception("mem_triton: closed the connection of a caller that sent what no front end sends")
        finally:
            with self._lock:
                self._clients.discard(client)
            client.close()

    def _answer(self, reply: Callable[..., None], number: int, method: str, args: list[Any]) -> None:
        try:
            if method not in self._handlers:
                raise ChannelError(f"unknown; known are {', '.join(sorted(self._handlers))}")
            answer = self._handlers[method](*args)
        except Exception as error:
            logger.exception("mem_triton: %s failed", method)
            reply(number, error, None)
        else:
            if isinstance(answer, Future):
                answer.add_done_callback(functools.partial(_reply_later, reply, number))
            else:
                reply(number, None, answer)


def _reply(
    client: connection.Connection, lock: threading.Lock, number: int, error: BaseException | None, answer: Any
) -> None:
    said = None if error is None else f"{type(error).__name__}: {error}"
    try:
        message = msgspec.msgpack.encode((number, said, answer))
    except Exception as unfit:  # what cannot be encoded
        message = msgspec.msgpack.encode((number, f"{type(unfit).__name__}: {unfit}", None))
    with contextlib.suppress(OSError), lock:  # a caller who has left hears nothing
        client.send_bytes(message)


def _reply_later(reply: Callable[..., None], number: int, future: Future[Any]) -> None:
    if future.cancelled():
        reply(number, ChannelError("it was given up"), None)
    elif (error := future.exception()) is not None:
        reply(number, error, None)
    else:
        reply(number, None, future.result())


def serve(rank: int, handlers: Mapping[str, Callable[..., Any]]) -> Server:
    """Answer calls to ``rank`` of this process's engine. Raises ChannelError outside of one, OSError."""
    return Server(current_folder() / str(rank), handlers)


def _hang_up(line: connection.Connection) -> None:
    """End a connection whose other thread is reading."""
    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(line.fileno())) as handle:
        handle.shutdown(socket.SHUT_RDWR)


class Client:
    """The front end's end. ranks: how many processes answer; folder: None means this process's engine.

    Its answers arrive in threads of its own and are handed to the event loop of whoever called. A call has no deadline:
    it ends with its answers, with the end of a rank's process, or when its task is cancelled.

    Example::

        client = Client(ranks=2)
        answers = await client.call("load_page", ...)     # ChannelError if a rank fails or is gone
    """

    def __init__(self, ranks: int, folder: Path | None = None) -> None:
        self.ranks, self._folder = ranks, folder or current_folder()
        self._lines: dict[int, connection.Connection] = {}
        self._waiting: dict[tuple[int, int], tuple[str, asyncio.Future[Any]]] = {}  # (rank, number of the call)
        self._numbers = itertools.count(1)
        self._lock, self._sending = threading.Lock(), threading.Lock()

    async def call(self, method: str, *args: Any) -> list[Any]:
        """Call ``method`` on every rank. Raises ChannelError, once all ranks have answered or are gone."""
        number = next(self._numbers)
        message = msgspec.msgpack.encode((number, method, args))
        asked = [self._ask(rank, number, method, message) for rank in range(self.ranks)]
        answers = await asyncio.gather(*asked, return_exceptions=True)
        if failure := next((answer for answer in answers if isinstance(answer, BaseException)), None):
            raise failure
        return answers

    def connect(self) -> None:
        """Reach every rank now. Raises ChannelError naming one that does not listen."""
        for rank in range(self.ranks):
            self._line(rank)

    def close(self) -> None:
        """Hang up; calls that wait fail."""
        with self._lock:
            lines = list(self._lines.values())
        for line in lines:
            _hang_up(line)

    def _ask(self, rank: int, number: int, method: str, message: bytes) -> asyncio.Future[Any]:
        answer = asyncio.get_running_loop().create_future()
        try:
            line = self._line(rank)
            with self._lock:
                self._waiting[rank, number] = method, answer
            with self._sending:
                line.send_bytes(message)
        except ChannelError as error:
            answer.set_exception(ChannelError(f"{method}: {error}"))
        except OSError:  # it ends just now; the thread that reads may have said so, too
            self._waiting.pop((rank, number), None)
            _hand_over(answer, ChannelError(_gone(method, rank)))
        return answer

    def _line(self, rank: int) -> connection.Connection:
        with self._lock:
            if rank not in self._lines:
                try:
                    line = connection.Client(str(self._folder / str(rank)), "AF_UNIX")
                except OSError as error:
                    raise ChannelError(
                        f"rank {rank} does not listen ({error.strerror}): its process is gone, look at its log, or it "
                        "runs on another machine, which memory does not support"
                    ) from None
                self._lines[rank] = line
                reader = threading.Thread(target=self._read, args=(rank, line), daemon=True)
                reader.name = f"mem_triton-answers-{rank}"
                reader.start()
            return self._lines[rank]

    def _read(self, rank: int, line: connection.Connection) -> None:
        try:
            while True:
                number, error, answer = msgspec.msgpack.decode(line.recv_bytes())
                with self._lock:
                    waiting = self._waiting.pop((rank, number), None)
                if waiting is not None:
                    method, future = waiting
                    failure = None if error is None else ChannelError(f"{method}: rank {rank}: {error}")
                    _hand_over(future, failure, answer)
        except (EOFError, OSError):
            pass
        finally:
            with self._lock:
                del self._lines[rank]
                left = [key for key in self._waiting if key[0] == rank]
                lost = [self._waiting.pop(key) for key in left]
            line.close()
            for method, future in lost:
                _hand_over(future, ChannelError(_gone(method, rank)))


def _gone(method: str, rank: int) -> str:
    return f"{method}: rank {rank} is gone: its process has ended, look at its log"


def _hand_over(future: asyncio.Future[Any], error: BaseException | None, answer: Any = None) -> None:
    """Settle a future in its own event loop; nothing if its task was cancelled, or the loop has ended."""

    def settle() -> None:
        if not future.done():
            future.set_result(answer) if error is None else future.set_exception(error)

    with contextlib.suppress(RuntimeError):
        future.get_loop().call_soon_threadsafe(settle)
