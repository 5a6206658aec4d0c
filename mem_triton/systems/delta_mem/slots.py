"""Keeps a worker's state tables: which row of the batch starts from which state, and where its last states go.

Engine-neutral. A request that says something about its memory *enters* when the engine puts it into the batch and
*leaves* when it is finished or preempted. Between steps the engine calls ``set_rows`` with the batch's order; kernels
read the persistent device tables, so a captured CUDA graph sees every change.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mem_triton.systems.payload import StateRef

LAST_STATES = 2
"""States kept per slot, by parity of position: async scheduling may run one step past a request's end."""


@dataclass
class _StateRow:
    lease: str | None
    write: bool
    slot: int  # -1: starts from zeros and commits nothing
    last_position: int = -1


class StateSlots:
    """Per-slot initial and last states for the requests in the batch.

    initial: fp32 [layers, slots, state_size]; last: fp32 [layers, slots, 2, state_size];
    row_slot, row_write: int32 [slots], one entry a batch row (slot -1: start from zeros; write 0: frozen state).
    writes: whether a request that says nothing of its state has one of its own, which starts from zeros. Else its state
    is zeros to the end, so that it reads zeros and nothing of the model is corrected.
    batch_invariant: for the layers that advance the states, see ``op.delta_rule_paged``.
    """

    def __init__(
        self,
        layer_indices: Sequence[int],
        state_size: int,
        slots: int,
        device: torch.device,
        writes: bool = True,
        batch_invariant: bool = False,
    ) -> None:
        self.batch_invariant = batch_invariant
        self.layer_indices = list(layer_indices)  # this worker's layers among all of the adapter's
        self.state_size, self._plain_writes = state_size, int(writes)
        self.initial = torch.zeros(len(layer_indices), slots, state_size, dtype=torch.float32, device=device)
        self.last = torch.zeros(len(layer_indices), slots, LAST_STATES, state_size, dtype=torch.float32, device=device)
        self.row_slot = torch.full((slots,), -1, dtype=torch.int32, device=device)
        self.row_write = torch.full((slots,), int(writes), dtype=torch.int32, device=device)
        self._free = list(range(slots))
        self._requests: dict[str, _StateRow] = {}  # request id -> its place in the batch
        self._left: OrderedDict[str, tuple[int, Tensor]] = OrderedDict()  # lease -> last position, [layers, 2, size]
        self._left_limit = 4 * slots
        self._rows_are_plain = True

    def enter(self, request_id: str, state: StateRef | None) -> None:
        """Register a request that joins the batch. state: None for a plain one."""
        if state is None or request_id in self._requests:
            return
        lease, slot = state.handle, -1
        if lease is not None:
            self._left.pop(lease, None)  # preempted and back: it starts over
            slot = self._free.pop()
            self.initial[:, slot] = 0
            if state.data:
                states = torch.frombuffer(bytearray(state.data), dtype=torch.float32).view(-1, self.state_size)
                states = states[self.layer_indices]
                if self.initial.is_cuda:
                    states = states.pin_memory()
                self.initial[:, slot].copy_(states, non_blocking=True)
        self._requests[request_id] = _StateRow(lease, state.write, slot)

    def leave(self, request_id: str) -> None:
        """Forget a request that left the batch; its last states wait for ``take``."""
        running = self._requests.pop(request_id, None)
        if running is None or running.slot < 0:
            return
        if running.write and running.last_position >= 0:
            self._left[running.lease] = (running.last_position, self.last[:, running.slot].clone())
            while len(self._left) > self._left_limit:
                self._left.popitem(last=False)
        self._free.append(running.slot)

    def set_rows(self, request_ids: Sequence[str], last_positions: Sequence[int]) -> None:
        """Write the batch's order into the device tables.

        last_positions: per row, the position of the last token that the coming step processes.
        """
        if not self._requests and self._rows_are_plain:
            return
        slots, writes = [], []
        for request_id, position in zip(request_ids, last_positions, strict=True):
            running = self._requests.get(request_id)
            slots.append(-1 if running is None else running.slot)
            writes.append(self._plain_writes if running is None else int(running.write))
            if running is not None:
                running.last_position = int(position)
        padding = len(self.row_slot) - len(slots)
        table = torch.tensor([slots + [-1] * padding, writes + [self._plain_writes] * padding], dtype=torch.int32)
        if self.row_slot.is_cuda:
            table = table.pin_memory()
        self.row_slot.copy_(table[0], non_blocking=True)
        self.row_write.copy_(table[1], non_blocking=True)
        self._rows_are_plain = not self._requests

    def __contains__(self, request_id: object) -> bool:
        """Whether a request in the batch says something about its state."""
        return request_id in self._requests

    def forget_rows(self) -> None:
        """After a failure: no row of the coming step starts from a state or leaves one."""
        self.row_slot.fill_(-1)
        self.row_write.fill_(self._plain_writes)

    def drop_request(self, request_id: str) -> None:
        """A request has lost its memory: it goes on as a plain one, and leaves no state."""
        running = self._requests.pop(request_id, None)
        if running is not None and running.slot >= 0:
            self._free.append(running.slot)

    def clear_rows(self) -> None:
        """Dummy and warm-up batches: no row starts from a state or leaves one."""
        self.set_rows([], [])

    def take(self, lease: str, position: int) -> tuple[int, bytes]:
        """Hand out a lease's state after the token at ``position``: (its true position, fp32 bytes [layers, size]).

        Waits for the device; see ``pick``. Raises KeyError for an unknown lease.
        """
        position, states = self.pick(lease, position)
        return position, as_bytes(states)

    def pick(self, lease: str, position: int) -> tuple[int, Tensor]:
        """As ``take``, but gives a copy of the states that the device may still be making: fp32 [layers, size].

        If the engine already ran more than one step past ``position`` (a stop string that the front end found late),
        the oldest state still held is returned, with its position.
        """
        if lease in self._left:
            last, states = self._left.pop(lease)
        else:
            running = next((r for r in self._requests.values() if r.lease == lease and r.slot >= 0), None)
            if running is None:
                raise KeyError(f"no state is held for lease {lease}")
            last, states = running.last_position, self.last[:, running.slot]
            running.write = False  # taken: leaving the batch keeps nothing
        position = position if last - LAST_STATES < position <= last else max(last - LAST_STATES + 1, 0)
        return position, states[:, position % LAST_STATES].clone()

    def drop(self, leases: Iterable[str]) -> None:
        """Forget the states of requests that were aborted."""
        for lease in leases:
            self._left.pop(lease, None)


def as_bytes(states: Tensor) -> bytes:
    """A state on its way to the front end; waits for the device."""
    return states.contiguous().cpu().numpy().tobytes()
