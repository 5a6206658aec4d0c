"""Keeps sessions: δ-mem states that outlive their requests.

The store lives in the engine's front end. A request opens a lease, which carries the bytes of the state it starts
from; when it ends normally its final state is committed as the session's next version, otherwise nothing changes.
State goes in and comes out explicitly, so workers keep no session of their own and any of them may serve any request.
Several servers may share one directory: a session has one writer among them all, and what another one has committed is
read anew.

Example::

    store = SessionStore(layout, directory=Path("/var/lib/mem"))
    lease = store.open(SessionRequest(session="alice"))
    ...                                        # run the request from lease.state
    store.commit(lease, final_state, tokens=57)
"""

from __future__ import annotations

import hashlib
import logging
import threading
import uuid
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path

import torch

from mem_triton.systems.delta_mem.request import SessionRequest
from mem_triton.systems.delta_mem.session_files import (
    UNREADABLE,
    CommittedState,
    SessionFiles,
    SessionLock,
    SessionWriteError,
    Stamp,
    StateLayout,
)
from mem_triton.systems.request import RequestError

__all__ = ["CommittedState", "Lease", "SessionStore", "SessionWriteError", "StateLayout", "layer_order"]


def layer_order(name: str) -> tuple[tuple[int, int, str], ...]:
    """Sort key that puts ``model.layers.10`` after ``model.layers.9``."""
    return tuple((0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split("."))


@dataclass(frozen=True)
class Lease:
    """A running request's hold on a session. ``key`` identifies its memory in every cache of KV blocks.

    lora: identity of the LoRA adapter that answers, "" for none.
    """

    id: str
    request: SessionRequest
    start: CommittedState
    key: str
    lora: str = ""


@dataclass
class _Session:
    committed: CommittedState
    stamp: Stamp | None = None  # of the file that ``committed`` was read from or written to
    writer: str | None = None  # id of the lease that may commit the next version
    base: Stamp | None = None  # of the file when the writer began
    lock: SessionLock | None = None  # the writer's, against other processes
    readers: set[str] = field(default_factory=set)

    @property
    def idle(self) -> bool:
        return self.writer is None and not self.readers


class SessionStore:
    """Bounded table of sessions, with one safetensors file a session under ``directory`` if it is given.

    Thread-safe. With a directory, the least recently used idle session leaves memory when more than ``max_sessions``
    are held; without one, a new session beyond the limit is refused, since dropping one would lose it. The files are
    the truth: other servers on the same directory may advance them between two requests.
    """

    def __init__(
        self,
        layout: StateLayout,
        directory: Path | None = None,
        max_sessions: int = 4096,
        logger: logging.Logger | None = None,
    ) -> None:
        self.layout = layout
        self.files = SessionFiles(Path(directory), layout) if directory is not None else None
        self.max_sessions = max_sessions
        self._logger = logger or logging.getLogger("mem_triton.sessions")
        self._sessions: OrderedDict[str, _Session] = OrderedDict()
        self._lock = threading.Lock()

    def open(self, request: SessionRequest, lora: str = "", load: str = "") -> Lease:
        """Start a request. lora: identity of the LoRA adapter that answers it, "" for none. load: which load of it.

        Raises RequestError if its session is being written, here or by another server, was told under another LoRA
        adapter, is unreadable, or beyond the limit.
        """
        lease_id, name = uuid.uuid4().hex, request.session
        if name is None:
            return Lease(lease_id, request, CommittedState(), self._key(request, CommittedState(), lora + load), lora)
        with self._lock:
            held = self._sessions.get(name)
            lock = self._claim(name, held) if request.write else None
            try:
                session = self._find(name, forget=request.reset)
                start = CommittedState(session.committed.version) if request.reset else session.committed
                self._check_lora(name, start, lora)
            except BaseException:
                if lock is not None:
                    lock.release()
                self._forget_if_empty(name)
                raise
            if request.write:
                session.writer, session.lock = lease_id, lock
                session.base = self.files.stamp(name) if self.files is not None else None
            else:
                session.readers.add(lease_id)
            return Lease(lease_id, request, start, self._key(request, start, lora + load), lora)

    def commit(self, lease: Lease, data: bytes, tokens: int) -> int:
        """Make ``data`` the next version of the lease's session and return its number.

        data: fp32 bytes of ``layout.state_bytes``. tokens: tokens that this request wrote.
        The lease stays open; close it afterwards, whatever happened. Raises SessionWriteError, an OSError, if the state
        is not finite, its file cannot be written, or the file is no longer the one that the request started from;
        ValueError if the bytes do not fit. The last committed version stays in force then.
        """
        if len(data) != self.layout.state_bytes:
            raise ValueError(f"state of {len(data)} bytes, expected {self.layout.state_bytes}")
        name = lease.request.session
        if name is None or self._sessions[name].writer != lease.id:
            raise ValueError(f"lease {lease.id} may not write session {name!r}")
        if not bool(torch.isfinite(torch.frombuffer(bytearray(data), dtype=torch.float32)).all()):
            raise SessionWriteError(f'session "{name}": the new state is not finite; its last version stays in force')
        committed = CommittedState(lease.start.version + 1, data, lease.start.tokens + tokens, lease.lora)
        session, stamp = self._sessions[name], None
        if self.files is not None:
            if self.files.stamp(name) != session.base:
                raise SessionWriteError(
                    f'session "{name}": its file was changed or removed by another process while this request ran; '
                    "what lies on the disk stays in force"
                )
            self.files.write(name, committed)
            stamp = self.files.stamp(name)
        with self._lock:
            session.committed, session.stamp, session.base = committed, stamp, stamp
        return committed.version

    def close(self, lease: Lease) -> None:
        """End a lease; closing twice is harmless."""
        with self._lock:
            session = self._sessions.get(lease.request.session or "")
            if session is None:
                return
            session.readers.discard(lease.id)
            if session.writer == lease.id:
                session.writer = None
                if session.lock is not None:
                    session.lock.release()
                    session.lock = None
            self._forget_if_empty(lease.request.session)

    def __len__(self) -> int:
        return len(self._sessions)

    def _key(self, request: SessionRequest, start: CommittedState, lora: str) -> str:
        digest = hashlib.sha256(start.data).hexdigest()[:16] if start.data else "zero"
        where = f"{request.session}@{start.version}:{digest}" if request.session else "-"
        key = f"{self.layout.adapter[:16]}|{where}|write={int(request.write)}"
        return f"{key}|lora={lora}" if lora else key

    def _claim(self, name: str, session: _Session | None) -> SessionLock | None:
        """The session's lock against other processes, None without a directory. Raises RequestError if it is held."""
        lock = None
        free = session is None or session.writer is None
        if free and self.files is not None:
            lock = self.files.lock(name)
            free = lock is not None
        if not free:
            raise RequestError(
                "mem_session",
                f'"{name}" is being written by another request; wait for it, '
                'or send "mem_write": 0 to read the last committed state',
            )
        return lock

    def _find(self, name: str, forget: bool) -> _Session:
        """The session as it is now, in memory or on the disk. forget: its state does not matter, nor any damage."""
        session, stamp = self._sessions.get(name), None
        if self.files is not None:
            stamp = self.files.stamp(name)  # before the file is read: at worst it is read once more
        if session is None or session.stamp != stamp:
            try:
                committed = self._read(name)
            except RequestError:
                if not forget:
                    raise
                known = session.committed.version if session is not None else 0
                committed, stamp = CommittedState(max(self.files.version(name), known)), UNREADABLE
            if session is None:
                self._make_room(name)
                session = self._sessions[name] = _Session(committed)
            session.committed, session.stamp = committed, stamp
        self._sessions.move_to_end(name)
        return session

    def _read(self, name: str) -> CommittedState:
        committed, warnings = self.files.read(name) if self.files is not None else (CommittedState(), ())
        for warning in warnings:
            self._logger.warning("%s: the state is read as it is", warning)
        return committed

    def _check_lora(self, name: str, start: CommittedState, lora: str) -> None:
        if start.data is not None and start.lora is not None and start.lora != lora:
            was, now = (f'LoRA adapter "{which}"' if which else "no LoRA adapter" for which in (start.lora, lora))
            raise RequestError(
                "mem_session",
                f'"{name}" was told under {was}, this request is answered under {now}; a state belongs to one of them: '
                'name another session, or send "mem_reset": 1 to start this one anew',
            )

    def _forget_if_empty(self, name: str) -> None:
        session = self._sessions.get(name)
        if session is not None and session.idle and session.committed.data is None:
            del self._sessions[name]  # never committed: nothing to remember

    def _make_room(self, name: str) -> None:
        while len(self._sessions) >= self.max_sessions:
            idle = next((n for n, s in self._sessions.items() if s.idle), None)
            if self.files is None or idle is None:
                fix = "set session_dir or raise max_sessions" if self.files is None else "raise max_sessions"
                raise RequestError("mem_session", f'no room for "{name}": {self.max_sessions} sessions are held; {fix}')
            del self._sessions[idle]
