"""Keeps sessions in safetensors files: whole or absent, checked when they are read, locked by their one writer.

The lock is the kernel's (``flock``), on a file beside the session's: it holds against every process on every machine
that mounts the directory with locks, and a process that ends, however it ends, leaves none behind.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import stat
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from mem_triton.store.files import write_durably
from mem_triton.systems.request import RequestError

FORMAT = "mem_triton.session.v2"
OLD_FORMAT = "mem_triton.session.v1"
"""Files of before digests, LoRA adapters and the served model's numerics were written down: read without them."""

Stamp = tuple[int, int, int, int]
"""inode, size, times of change: another value, another file."""
UNREADABLE: Stamp = (-1, -1, -1, -1)
"""The stamp of no file: what was read under it is read again."""


class SessionWriteError(OSError):
    """A session's next version could not be kept; its last version stays in force. The message names the session."""


@dataclass(frozen=True)
class StateLayout:
    """What a session state must fit: layer names in order, heads, rank, and the identities it was made with.

    served: how the engine computes the model ("dtype", "rope", "quantization", "weights"), as far as it is known. Under
    another dtype a state is read with a warning, as it is fp32 under each; any other difference is refused.
    """

    layers: tuple[str, ...]
    heads: int
    rank: int
    adapter: str  # fingerprint of the δ-mem adapter
    model: str  # fingerprint of the served model's architecture
    served: Mapping[str, str] = field(default_factory=dict)

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
    """One committed version: fp32 bytes [layers, heads, rank, rank]; version 0 is the zero state of a new session.

    tokens: written into the state over all versions. lora: identity of the LoRA adapter that answered, "" for none,
    None where an old file does not say.
    """

    version: int = 0
    data: bytes | None = None
    tokens: int = 0
    lora: str | None = None


class SessionLock:
    """Held by the one lease, of all processes, that may write a session."""

    def __init__(self, path: Path, handle: int) -> None:
        self._path, self._handle = path, handle

    @classmethod
    def acquire(cls, path: Path) -> SessionLock | None:
        """The lock, or None if another lease has it. Raises OSError where files cannot be locked."""
        while True:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.samestat(os.fstat(handle), os.stat(path)):
                    return cls(path, handle)
            except BlockingIOError:
                os.close(handle)
                return None
            except FileNotFoundError:
                pass  # its last holder has removed the name since: try again under a new one
            except BaseException:
                os.close(handle)
                raise
            os.close(handle)

    def release(self) -> None:
        """Let the next writer in, and leave no file behind."""
        with contextlib.suppress(OSError):  # a file that stays locks nobody out
            self._path.unlink()  # while it is held: nobody else has it
        os.close(self._handle)


class SessionFiles:
    """The directory of a server's sessions. Raises ValueError if it cannot be written, or its files not be locked."""

    def __init__(self, directory: Path, layout: StateLayout) -> None:
        self.directory, self.layout = Path(directory), layout
        probe = self.directory / f".probe-{os.getpid()}-{time.monotonic_ns()}"
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            lock = SessionLock.acquire(probe)
        except OSError as error:
            with contextlib.suppress(OSError):
                probe.unlink()
            raise ValueError(f"session_dir: cannot write to {self.directory}, or lock files in it: {error}") from None
        if lock is not None:
            lock.release()

    def path(self, name: str) -> Path:
        """The session's file."""
        return self.directory / f"{name}.safetensors"

    def lock(self, name: str) -> SessionLock | None:
        """The session's lock, or None if a lease of this or another process has it. Raises RequestError."""
        try:
            return SessionLock.acquire(self.directory / f".{name}.lock")
        except OSError as error:
            raise RequestError("mem_session", f'"{name}" cannot be locked in session_dir: {error}') from None

    def stamp(self, name: str) -> Stamp | None:
        """Which file is the session's now; None if there is none."""
        try:
            found = os.stat(self.path(name))
        except OSError:
            return None if not os.path.lexists(self.path(name)) else UNREADABLE
        return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns

    def write(self, name: str, committed: CommittedState) -> None:
        """Put a version on the disk, durably. Raises SessionWriteError; the file of before is there still then."""
        shape = (self.layout.heads, self.layout.rank, self.layout.rank)
        states = torch.frombuffer(bytearray(committed.data), dtype=torch.float32).view(-1, *shape)
        header = {
            "format": FORMAT,
            "session": name,
            "version": str(committed.version),
            "tokens": str(committed.tokens),
            "lora": committed.lora or "",
            "adapter": self.layout.adapter,
            "model": self.layout.model,
            "served": json.dumps(dict(self.layout.served), sort_keys=True),
        }
        header["digest"] = _digest(header, committed.data)
        tensors = {layer: states[i].clone() for i, layer in enumerate(self.layout.layers)}

        def save(temporary: Path) -> None:
            temporary.touch(0o600)
            save_file(tensors, temporary, metadata=header)

        path = self.path(name)
        try:
            if path.is_dir() and not path.is_symlink():  # what a reset repairs may be anything
                path.rename(path.with_name(f".damaged-{path.name}-{time.time_ns()}"))
            write_durably(path, save)
        except (OSError, SafetensorError) as error:  # safetensors' own error is neither OSError nor ValueError
            raise SessionWriteError(
                f'session "{name}" could not be written to {path}: {error}; its last version stays in force'
            ) from None

    def read(self, name: str) -> tuple[CommittedState, list[str]]:
        """The session's file, and the served model's differences that a warning suffices for; the zero state if there
        is no file. Raises RequestError for a file that is damaged or was made with another model or adapter."""
        path = self.path(name)
        if not os.path.lexists(path):
            return CommittedState(), []
        try:
            header, state = self._load(path)
        except RequestError:
            raise
        except Exception as error:  # whatever a damaged file makes a parser raise
            problem = f"{type(error).__name__}: {error}" if not isinstance(error, (OSError, ValueError)) else error
            raise RequestError(
                "mem_session",
                f'cannot read {path}: {problem}; restore the file, or send "mem_reset": 1 to start the session anew',
            ) from None
        return state, self._check_served(path, header)

    def version(self, name: str) -> int:
        """The version that the session's file says it has, 0 if it does not say."""
        try:
            if not stat.S_ISREG(os.stat(self.path(name)).st_mode):
                return 0
            with safe_open(self.path(name), framework="pt") as file:
                return max(0, int((file.metadata() or {}).get("version", 0)))
        except Exception:  # a reset repairs any damage
            return 0

    def _load(self, path: Path) -> tuple[dict[str, str], CommittedState]:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ValueError("it is no regular file")
        want = (self.layout.heads, self.layout.rank, self.layout.rank)
        with safe_open(path, framework="pt") as file:
            header = dict(file.metadata() or {})
            self._check_header(path, header)
            tensors = {layer: file.get_tensor(layer) for layer in self.layout.layers}
            if extra := set(file.keys()) - set(tensors):
                raise ValueError(f"it holds a tensor {min(extra)!r}, which is none of the adapter's layers")
        for layer, tensor in tensors.items():
            if tuple(tensor.shape) != want or tensor.dtype != torch.float32:
                raise ValueError(f"{layer} is {tuple(tensor.shape)} {tensor.dtype}, expected {want} torch.float32")
        states = torch.stack([tensors[layer] for layer in self.layout.layers])
        data, digest = states.numpy().tobytes(), header.pop("digest", None)
        if header["format"] == FORMAT and digest != _digest(header, data):
            raise ValueError("its bytes are not those that were written (their digest differs)")
        if not bool(torch.isfinite(states).all()):
            raise ValueError("its state is not finite")
        version, tokens = int(header["version"]), int(header["tokens"])
        if version < 1 or tokens < 0:
            raise ValueError(f"it says version {version} and {tokens} tokens")
        return header, CommittedState(version, data, tokens, header.get("lora"))

    def _check_header(self, path: Path, header: Mapping[str, str]) -> None:
        known = header.get("format") in (FORMAT, OLD_FORMAT)
        for name, want in (("format", FORMAT), ("adapter", self.layout.adapter), ("model", self.layout.model)):
            if header.get(name) != want and not (name == "format" and known):
                self._refuse(path, name, header.get(name), want)

    def _check_served(self, path: Path, header: Mapping[str, str]) -> list[str]:
        was, now = json.loads(header.get("served", "{}")), self.layout.served
        differences = [name for name in sorted(was.keys() & now.keys()) if was[name] != now[name]]
        for name in differences:
            if name != "dtype":
                self._refuse(path, name, was[name], now[name])
        return [
            f"{path} was made under {name} {was[name]}, this server computes in {now[name]}" for name in differences
        ]

    def _refuse(self, path: Path, name: str, found: str | None, want: str) -> None:
        raise RequestError(
            "mem_session",
            f"{path} was made with another {name} ({found}, this server has {want}); "
            'send "mem_reset": 1 to start the session anew, or point session_dir elsewhere',
        )


def _digest(header: Mapping[str, str], data: bytes) -> str:
    """sha256 over everything that a file says."""
    digest = hashlib.sha256(json.dumps(dict(header), sort_keys=True).encode())
    digest.update(data)
    return digest.hexdigest()
