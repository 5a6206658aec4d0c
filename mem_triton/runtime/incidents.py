"""Tells the front end which requests lost their memory in a worker, because our own code raised there.

An exception of ours never ends an engine. The worker goes on without the memory of the requests concerned and writes
their ids into a file; the front end looks at it before it hands out an answer, fails those requests with the reason,
and from then on salts all cache keys anew, so that nothing computed without its memory is found again. All processes of
an engine run on one machine; the file's path reaches them by an environment variable, as processes inherit it.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import json
import logging
import os
import shutil
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

VARIABLE = "MEM_TRITON_INCIDENTS"
LOOK_SECONDS = 0.05
"""How often the front end looks while an answer is under way; before it ends it always does."""
KEPT = 4096
"""Requests remembered on either side."""
_PREFIX = "mem_triton-incidents-"

logger = logging.getLogger("mem_triton")


def make_file() -> Path:
    """The path of a new engine's file, in the environment from now on; it goes when this process ends.

    Those of engines that were killed are taken away.
    """
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        pid = folder.name.removeprefix(_PREFIX).partition("-")[0]
        if pid.isdecimal() and not _is_alive(int(pid)):
            shutil.rmtree(folder, ignore_errors=True)
    owner = os.getpid()
    folder = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{owner}-"))  # mode 0700: nobody else writes there
    atexit.register(lambda: os.getpid() == owner and shutil.rmtree(folder, ignore_errors=True))
    os.environ[VARIABLE] = str(folder / "incidents.jsonl")
    return folder / "incidents.jsonl"


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True


class IncidentLog:
    """A worker's end. path: None takes the environment's; without one, incidents are only logged.

    Example::

        log.report(["request-7"], "attention", error)
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path or (Path(os.environ[VARIABLE]) if os.environ.get(VARIABLE) else None)
        self._told: OrderedDict[str, None] = OrderedDict()
        self._logged: set[tuple[str, str]] = set()

    def report(self, request_ids: Iterable[str], where: str, error: BaseException) -> None:
        """These requests have lost their memory. where: the part of ours that raised ``error``. Never raises."""
        kind = type(error).__name__
        if (where, kind) not in self._logged:  # the first of its kind with its stack
            self._logged.add((where, kind))
            logger.error("mem_triton: %s failed in a worker", where, exc_info=error)
        fresh = [id for id in dict.fromkeys(request_ids) if id not in self._told]
        self._told |= dict.fromkeys(fresh)
        while len(self._told) > KEPT:
            self._told.popitem(last=False)
        reason = f"{where}: {kind}: {error}"[:300]
        logger.error("mem_triton: requests lose their memory (%s): %s", reason, ", ".join(fresh) or "none is new")
        if self._path is None or not fresh:
            return
        lines = "".join(json.dumps({"request": id, "where": where, "reason": reason}) + "\n" for id in fresh)
        try:
            self._path.parent.mkdir(mode=0o700, exist_ok=True)  # a cleaner of temporary files may have taken it
            with open(self._path, "a", encoding="utf-8") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                file.write(lines)
                file.flush()
        except OSError as failure:
            logger.error("mem_triton: the front end does not hear of it: %s", failure)


class Incidents:
    """The front end's end. epoch: how often something was lost; part of every cache key.

    name: the front end's name of a request, from the worker's.

    Example::

        if reason := incidents.of("request-7", final=True):
            ...                                   # fail it
    """

    def __init__(self, path: Path, name: Callable[[str], str] = str) -> None:
        self._path, self._name, self.epoch = path, name, 0
        self._lost: OrderedDict[str, str] = OrderedDict()
        self._looked, self._lock = 0.0, threading.Lock()

    def of(self, request_id: str, final: bool = False) -> str | None:
        """Why a request has lost its memory; None if it has not. final: its answer is about to be handed out."""
        self.look(final)
        return self._lost.get(request_id)

    def forget(self, request_id: str) -> None:
        """Forget the incidents of a name whose request begins or was answered; the next one may have the same."""
        self.look(final=True)
        self._lost.pop(request_id, None)

    def lost(self) -> dict[str, str]:
        """All requests that have lost their memory lately, with the reasons."""
        self.look(final=True)
        return dict(self._lost)

    def look(self, final: bool = False) -> None:
        """Read what the workers have written since the last time."""
        now = time.monotonic()
        if not final and now - self._looked < LOOK_SECONDS:
            return
        self._looked = now
        try:
            if not os.stat(self._path).st_size:
                return
            with self._lock, open(self._path, "r+", encoding="utf-8") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                lines = file.read().splitlines()
                file.truncate(0)
        except FileNotFoundError:
            return
        from mem_triton import metrics  # not with this module: SGLang says where counts are kept only later

        for incident in _parsed(lines):
            self._lost[self._name(incident["request"])] = incident["reason"]
            metrics.INCIDENTS.labels(incident["where"]).inc()
        while len(self._lost) > KEPT:
            self._lost.popitem(last=False)
        self.epoch += bool(lines)


def _parsed(lines: Iterable[str]) -> Iterator[dict[str, str]]:
    """The incidents; a line that a worker was killed over says nothing."""
    for line in lines:
        with contextlib.suppress(ValueError):
            yield json.loads(line)
