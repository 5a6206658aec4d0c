"""Writes a bank's entry out of an engine request's own prompt: ``mem_capture`` in a worker.

The prompt's keys and values lie in the request's KV blocks until somebody else's step writes there. A worker copies
them when it hears that the request left the batch, takes the rotation off the keys, and writes its layers and heads to
a file; the front end puts the ranks' files together as one entry.
"""

from __future__ import annotations

import contextlib
import functools
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from mem_triton.ops.reposition import RotaryEmbedding, unrotate
from mem_triton.systems.payload import CaptureOrder

ReadContext = Callable[[str, int, int], tuple[Tensor, Tensor]]
"""(request id, layer's index in the model, tokens) -> copies of its first tokens' keys, with their rotation, and
values; each [Hkv, tokens, D]."""

KEPT_ANSWERS = 256
"""Captures that a worker can still answer for; a path each."""


@dataclass
class _Capturing:
    lease: str
    file: Path
    prompt_tokens: int
    last_position: int = -1


class WorkerCaptures:
    """The worker's prompts to keep. ropes: this rank's memory layers, by their index in the model.

    first_head: this rank's first KV head. rank: among all workers, for the file's name.
    """

    def __init__(
        self, ropes: Mapping[int, RotaryEmbedding], first_head: int, rank: int, read_context: ReadContext
    ) -> None:
        self.ropes, self.first_head, self.rank, self.read_context = ropes, first_head, rank, read_context
        self._requests: dict[str, _Capturing] = {}  # request id -> what to keep of it
        self._files: dict[str, Future[str]] = {}  # lease -> file being written
        self._asked: dict[str, Future[dict[str, str]]] = {}  # lease -> who wants to know of its file
        self._dropped: OrderedDict[str, None] = OrderedDict()  # leases that nobody asks for any more
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="mem_triton-capture")

    def enter(self, request_id: str, order: CaptureOrder | None) -> None:
        """Register a request whose prompt is captured; nothing without an order."""
        if order is not None and request_id not in self._requests and order.handle not in self._dropped:
            file = Path(order.folder) / f"{order.handle}.{self.rank}.safetensors"
            self._requests[request_id] = _Capturing(order.handle, file, order.tokens)

    def set_rows(self, request_ids: Sequence[str], last: Sequence[int]) -> None:
        """The positions that the coming step reaches."""
        for request_id, position in zip(request_ids, last, strict=True) if self._requests else ():
            if request_id in self._requests:
                self._requests[request_id].last_position = int(position)

    def leave(self, request_id: str) -> None:
        """Copy the prompt of a request that leaves the batch, unless it was preempted before its prompt was done."""
        running = self._requests.pop(request_id, None)
        if running is not None and running.last_position >= running.prompt_tokens - 1:
            self._copy(request_id, running)
            if (asked := self._asked.pop(running.lease, None)) is not None:
                self._files[running.lease].add_done_callback(functools.partial(_tell, asked))

    def drop_request(self, request_id: str) -> None:
        """Forget a request that is not to be kept any more."""
        if (running := self._requests.pop(request_id, None)) is not None:
            self._refuse(running.lease)

    def drop(self, leases: Sequence[str]) -> None:
        """Forget captures, whatever has become of them: their files go, and requests that still run keep nothing."""
        for lease in leases:
            self._dropped[lease] = None
            self._refuse(lease)
            self._requests = {i: r for i, r in self._requests.items() if r.lease != lease}
            if (future := self._files.pop(lease, None)) is not None:
                future.add_done_callback(_remove)
        while len(self._dropped) > KEPT_ANSWERS:
            self._dropped.popitem(last=False)

    def outcome(self, lease: str) -> Future[dict[str, str]]:
        """What becomes of a prompt: {"file": path} once it is written, or {"error": reason}."""
        answer: Future[dict[str, str]] = Future()
        if lease in self._files:
            self._files[lease].add_done_callback(functools.partial(_tell, answer))
            return answer
        self._asked[lease] = answer
        if all(running.lease != lease for running in self._requests.values()):
            self._refuse(lease)  # else it has ended, and the worker will be told
        return answer

    def _refuse(self, lease: str) -> None:
        if (asked := self._asked.pop(lease, None)) is not None:
            asked.set_result({"error": f"no prompt is held for lease {lease}"})

    def _copy(self, request_id: str, running: _Capturing) -> None:
        try:
            copies = [
                (index, *self.read_context(request_id, index, running.prompt_tokens), rope)
                for index, rope in self.ropes.items()
            ]
        except torch.OutOfMemoryError as error:  # the device has no room for the copy: no reason to end the engine
            self._files[running.lease] = future = Future()
            future.set_exception(error)
        else:
            self._files[running.lease] = self._writer.submit(
                _write, running.file, copies, self.first_head, _mark(copies)
            )
        while len(self._files) > KEPT_ANSWERS:
            self._files.pop(next(iter(self._files)))


def _tell(asked: Future[dict[str, str]], written: Future[str]) -> None:
    error = written.exception()
    asked.set_result({"file": written.result()} if error is None else {"error": str(error)})


def _remove(written: Future[str]) -> None:
    if not written.cancelled() and written.exception() is None:
        with contextlib.suppress(OSError):
            Path(written.result()).unlink()


def _mark(copies: Sequence[tuple[int, Tensor, Tensor, RotaryEmbedding]]) -> Any:
    """What the writer has to wait for: copies on a GPU are queued on the engine's stream, which is not the writer's."""
    device = next((keys.device for _, keys, _, _ in copies), None)
    if device is None or device.type != "cuda":
        return None
    mark = torch.cuda.Event(blocking=True)  # the thread sleeps, and gives the interpreter to others
    mark.record(torch.cuda.current_stream(device))
    return mark


def _write(
    file: Path, copies: Sequence[tuple[int, Tensor, Tensor, RotaryEmbedding]], first_head: int, mark: Any
) -> str:
    if mark is not None:
        mark.synchronize()
    tensors = {}
    for index, keys, values, rope in copies:
        keys = unrotate(keys.cpu(), torch.arange(keys.shape[1]), rope)
        tensors |= {f"{index}.keys": keys.contiguous(), f"{index}.values": values.cpu().contiguous()}
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        save_file(tensors, file, metadata={"first_head": str(first_head)})
    except BaseException:  # a full disk: what was written of it takes room
        file.unlink(missing_ok=True)
        raise
    return str(file)
