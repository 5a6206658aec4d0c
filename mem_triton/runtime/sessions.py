"""Sessions: δ-mem states that outlive their requests.

The store lives in the engine's front end. A request opens a lease, which carries the bytes of the state it starts
from; when it ends normally its final state is committed as the session's next version, otherwise nothing changes.
State goes in and comes out explicitly, so workers keep no session of their own and any of them may serve any request.

Example::

    store = SessionStore(layout, directory=Path("/var/lib/mem"))
    lease = store.open(MemoryRequest(session="alice"))
    ...                                        # run the request from lease.state
    store.commit(lease, final_state, tokens=57)
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import threading
import uuid
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from mem_triton.runtime.request import MemoryRequest, RequestError

FORMAT = "mem_triton.session.v1"


def layer_order(name: str) -> tuple[tuple[int, int, str], ...]:
    """Sort key that puts ``model.layers.10`` after ``model.layers.9``."""
    return tuple((0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split("."))


@dataclass(frozen=True)
class StateLayout:
    """What a session state must fit: layer names in order, heads, rank, and the identities it was made with."""

    layers: tuple[str, ...]
    heads: int
    rank: int
    adapter: str  # fingerprint of the δ-mem adapter
    model: str  # fingerprint of the served model's architecture

    @property
    def layer_bytes(self) -> int:
        """Bytes of one layer's fp32 state."""
        return 4 * self.heads * self.rank**2

    @property
    def state_bytes(self) -> int:
        """Bytes of all layers' fp32 states, layer after layer."""
        return len(self.layers) * self.layer_bytes


@dataclass(frozen=True)
class CommittedState:
    """One committed version: fp32 bytes [layers, heads, rank, rank]; version 0 is the zero state of a new session."""

    version: int = 0
    data: bytes | None = None
    tokens: int = 0  # tokens written into the state over all versions


@dataclass(frozen=True)
class Lease:
    """A running request's hold on a session. ``key`` identifies its memory in every cache of KV blocks."""

    id: str
    request: MemoryRequest
    start: CommittedState
    key: str


@dataclass
class _Session:
    committed: CommittedState
    writer: str | None = None  # id of the lease that may commit the next version
    readers: set[str] = field(default_factory=set)

    @property
    def idle(self) -> bool:
        return self.writer is None and not self.readers


class SessionStore:
    """Bounded table of sessions, with one safetensors file a session under ``directory`` if it is given.

    Thread-safe. With a directory, the least recently used idle session leaves memory when more than ``max_sessions``
    are held; without one, a new session beyond the limit is refused, since dropping one would lose it.
    """

    def __init__(self, layout: StateLayout, directory: Path | None = None, max_sessions: int = 4096) -> None:
        self.layout = layout
        self.directory = Path(directory) if directory is not None else None
        self.max_sessions = max_sessions
        self._sessions: OrderedDict[str, _Session] = OrderedDict()
        self._lock = threading.Lock()
        if self.directory is not None:
            try:
                self.directory.mkdir(parents=True, exist_ok=True)
                tempfile.TemporaryFile(dir=self.directory).close()
            except OSError as error:
                raise ValueError(f"session_dir: cannot write to {self.directory}: {error}") from None

    def open(self, request: MemoryRequest) -> Lease:
        """Start a request. Raises RequestError if its session is being written, unreadable, or beyond the limit."""
        lease_id = uuid.uuid4().hex
        if request.session is None:
            return Lease(lease_id, request, CommittedState(), self._key(request, CommittedState()))
        with self._lock:
            session = self._find(request.session, forget=request.reset)
            if request.write:
                if session.writer is not None:
                    raise RequestError(
                        "mem_session",
                        f'"{request.session}" is being written by another request; wait for it, '
                        'or send "mem_write": 0 to read the last committed state',
                    )
                session.writer = lease_id
            else:
                session.readers.add(lease_id)
            start = CommittedState(version=session.committed.version) if request.reset else session.committed
            return Lease(lease_id, request, start, self._key(request, start))

    def commit(self, lease: Lease, data: bytes, tokens: int) -> int:
        """Make ``data`` the next version of the lease's session and return its number.

        data: fp32 bytes of ``layout.state_bytes``. tokens: tokens that this request wrote.
        The lease stays open; close it afterwards, whatever happened. Raises OSError if the file cannot be written,
        ValueError if the bytes do not fit; the last committed version stays in force then.
        """
        if len(data) != self.layout.state_bytes:
            raise ValueError(f"state of {len(data)} bytes, expected {self.layout.state_bytes}")
        name = lease.request.session
        committed = CommittedState(lease.start.version + 1, data, lease.start.tokens + tokens)
        if name is None or self._sessions[name].writer != lease.id:
            raise ValueError(f"lease {lease.id} may not write session {name!r}")
        if self.directory is not None:
            self._write_file(name, committed)
        with self._lock:
            self._sessions[name].committed = committed
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
            if session.idle and session.committed.data is None:
                del self._sessions[lease.request.session]  # never committed: nothing to remember

    def __len__(self) -> int:
        return len(self._sessions)

    def _key(self, request: MemoryRequest, start: CommittedState) -> str:
        digest = hashlib.sha256(start.data).hexdigest()[:16] if start.data else "zero"
        where = f"{request.session}@{start.version}:{digest}" if request.session else "-"
        return f"{self.layout.adapter[:16]}|{where}|write={int(request.write)}"

    def _find(self, name: str, forget: bool) -> _Session:
        session = self._sessions.get(name)
        if session is None:
            committed = self._read_file(name, forget)
            self._make_room(name)
            session = self._sessions[name] = _Session(committed)
        self._sessions.move_to_end(name)
        return session

    def _make_room(self, name: str) -> None:
        while len(self._sessions) >= self.max_sessions:
            idle = next((n for n, s in self._sessions.items() if s.idle), None)
            if self.directory is None or idle is None:
                fix = "set session_dir or raise max_sessions" if self.directory is None else "raise max_sessions"
                raise RequestError("mem_session", f'no room for "{name}": {self.max_sessions} sessions are held; {fix}')
            del self._sessions[idle]

    def _path(self, name: str) -> Path:
        return self.directory / f"{name}.safetensors"

    def _write_file(self, name: str, committed: CommittedState) -> None:
        shape = (len(self.layout.layers), self.layout.heads, self.layout.rank, self.layout.rank)
        states = torch.frombuffer(bytearray(committed.data), dtype=torch.float32).view(shape)
        header = {
            "format": FORMAT,
            "session": name,
            "version": str(committed.version),
            "tokens": str(committed.tokens),
            "adapter": self.layout.adapter,
            "model": self.layout.model,
        }
        handle, temporary = tempfile.mkstemp(dir=self.directory, prefix=".writing-")
        os.close(handle)
        try:
            tensors = {layer: states[i].clone() for i, layer in enumerate(self.layout.layers)}
            save_file(tensors, temporary, metadata=header)
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, self._path(name))  # readers see the old version or the new one, never half
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise

    def _read_file(self, name: str, forget: bool) -> CommittedState:
        """The session's file, or the zero state if there is none. With ``forget`` only its version matters."""
        if self.directory is None or not self._path(name).exists():
            return CommittedState()
        path = self._path(name)
        try:
            with safe_open(path, framework="pt") as file:
                header = file.metadata() or {}
                version, tokens = int(header.get("version", -1)), int(header.get("tokens", 0))
                if forget and version > 0:
                    return CommittedState(version)
                self._check_header(path, header)
                tensors = [file.get_tensor(layer) for layer in self.layout.layers]
        except (SafetensorError, OSError, ValueError) as error:
            if isinstance(error, RequestError):
                raise
            raise RequestError("mem_session", f"cannot read {path}: {error}; restore or remove the file") from None
        want = (self.layout.heads, self.layout.rank, self.layout.rank)
        for layer, tensor in zip(self.layout.layers, tensors, strict=True):
            if tuple(tensor.shape) != want or tensor.dtype != torch.float32:
                found = f"{tuple(tensor.shape)} {tensor.dtype}"
                raise RequestError("mem_session", f"{path}: {layer} is {found}, expected {want} torch.float32")
        return CommittedState(version, torch.stack(tensors).numpy().tobytes(), tokens)

    def _check_header(self, path: Path, header: dict[str, str]) -> None:
        for name, want in (("format", FORMAT), ("adapter", self.layout.adapter), ("model", self.layout.model)):
            if header.get(name) != want:
                raise RequestError(
                    "mem_session",
                    f"{path} was made with another {name} ({header.get(name)}, this server has {want}); "
                    'send "mem_reset": 1 to start the session anew, or point session_dir elsewhere',
                )
