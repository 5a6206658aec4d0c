"""``mem_capture``: a bank's entry out of an ordinary request's own prompt.

The prompt's keys and values lie in the request's KV blocks until somebody else's step writes there. A worker copies
them when it hears that the request left the batch, or when the front end asks first, takes the rotation off the keys,
and writes its layers and heads to a file; the front end puts the ranks' files together as one entry.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from mem_triton.ops.reposition import RotaryEmbedding, unrotate

BlockRow = Callable[[str], Tensor]
"""A request id's row of the engine's block table."""

KEPT_ANSWERS = 256
"""Captures that a worker can still answer for; a path each."""


@dataclass
class _Resident:
    lease: str
    file: Path
    prompt_tokens: int
    last_position: int = -1


class Captures:
    """The worker's prompts to keep. layers: (index in the model, vLLM's ``Attention``, RoPE) of this rank's layers.

    first_head: this rank's first KV head. block_row: where a request's KV lies.
    """

    def __init__(
        self, layers: Sequence[tuple[int, Any, RotaryEmbedding]], first_head: int, rank: int, block_row: BlockRow
    ) -> None:
        self.layers, self.first_head, self.rank, self.block_row = list(layers), first_head, rank, block_row
        self._residents: dict[str, _Resident] = {}  # request id -> what to keep of it
        self._files: dict[str, Future[str]] = {}  # lease -> file being written
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="mem_triton-capture")

    def enter(self, request_id: str, carried: Mapping[str, Any] | None) -> None:
        """Register a request that asks to be kept."""
        capture = (carried or {}).get("capture")
        if capture and request_id not in self._residents:
            file = Path(capture["folder"]) / f"{capture['lease']}.{self.rank}.safetensors"
            self._residents[request_id] = _Resident(capture["lease"], file, capture["tokens"])

    def set_rows(self, request_ids: Sequence[str], last: Sequence[int]) -> None:
        """The positions that the coming step reaches."""
        for request_id, position in zip(request_ids, last, strict=True) if self._residents else ():
            if request_id in self._residents:
                self._residents[request_id].last_position = int(position)

    def leave(self, request_id: str) -> None:
        """Copy the prompt of a request that leaves the batch, unless it was preempted before its prompt was done."""
        resident = self._residents.pop(request_id, None)
        if resident is not None and resident.last_position >= resident.prompt_tokens - 1:
            self._copy(request_id, resident)

    def state(self, lease: str) -> dict[str, Any]:
        """{"file": path} once written, {"error": reason}, or {} while it is under way. Raises KeyError if unknown."""
        if lease not in self._files:  # finished, but no step has told the worker yet
            request_id = next((i for i, r in self._residents.items() if r.lease == lease), None)
            if request_id is None:
                raise KeyError(f"no prompt is held for lease {lease}")
            self._copy(request_id, self._residents.pop(request_id))
        future = self._files[lease]  # stays: the front end asks again while another rank is still writing
        if not future.done():
            return {}
        return {"error": str(future.exception())} if future.exception() else {"file": future.result()}

    def _copy(self, request_id: str, resident: _Resident) -> None:
        tokens = resident.prompt_tokens
        row = self.block_row(request_id)
        copies = []
        for index, attention, rope in self.layers:
            cache = attention.kv_cache  # [blocks, Hkv, N, 2D]
            blocks = row[: -(-tokens // cache.shape[2])].to(cache.device, torch.int64)
            kept = cache[blocks].transpose(0, 1).flatten(1, 2)[:, :tokens]  # [Hkv, tokens, 2D]
            copies.append((index, kept.clone(), rope))
        self._files[resident.lease] = self._writer.submit(_write, resident.file, copies, self.first_head)
        while len(self._files) > KEPT_ANSWERS:
            self._files.pop(next(iter(self._files)))


def _write(file: Path, copies: list[tuple[int, Tensor, RotaryEmbedding]], first_head: int) -> str:
    tensors = {}
    for index, kept, rope in copies:
        keys, values = kept.cpu().chunk(2, dim=-1)  # [Hkv, tokens, D]
        keys = unrotate(keys, torch.arange(keys.shape[1]), rope)
        tensors |= {f"{index}.keys": keys.contiguous(), f"{index}.values": values.contiguous()}
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, file, metadata={"first_head": str(first_head)})
    return str(file)
