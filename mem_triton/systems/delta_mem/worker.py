"""Keeps the states that running requests start from and leave behind: δ-mem's worker part."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from torch import Tensor

from mem_triton.schema import ConfigError
from mem_triton.systems.base import StepBatch, WorkerHost, WorkerPart
from mem_triton.systems.delta_mem.adapter import DeltaMemAdapter, load_adapter
from mem_triton.systems.delta_mem.section import DeltaSection
from mem_triton.systems.delta_mem.slots import StateSlots, as_bytes
from mem_triton.systems.engine import EngineShape
from mem_triton.systems.payload import SystemPayload


def served_adapter(section: DeltaSection, engine: str) -> DeltaMemAdapter:
    """The configured adapter. Raises AdapterError, or ConfigError if engines cannot serve it. engine: for messages."""
    adapter = load_adapter(section.adapter, section.revision, section.scope)
    if adapter.config.memory_write_granularity != "token":
        raise ConfigError(
            f"mem_triton.delta.adapter: {section.adapter} writes its memory by "
            f"{adapter.config.memory_write_granularity}; {engine} serves token writes only (memory_write_granularity "
            '"token"). Use mem_triton_transformers for message and sentence means'
        )
    return adapter


class DeltaWorker(WorkerPart):
    """slots: the states by running request. Raises AdapterError or ConfigError naming what does not fit."""

    def __init__(self, section: DeltaSection, engine: EngineShape, host: WorkerHost) -> None:
        self.slots: StateSlots = host.attach_states(
            served_adapter(section, engine.engine), section.tokens_per_state, lambda error: host.lose(error, True)
        )
        self._host = host
        self.calls = {"take_state": self.take_state}
        self._copier = ThreadPoolExecutor(1, thread_name_prefix="mem_triton-states")

    def take_state(self, lease: str, position: int, forget: list[str]) -> Future[dict[str, Any]]:
        """This rank's layers of a lease's state after ``position``: {"position": int, "states": {index: bytes}}."""
        slots = self.slots
        with self._host.exclusive():
            slots.drop(forget)
            reached, states = slots.pick(lease, position)
        return self._copier.submit(self._copied, reached, states)

    def _copied(self, reached: int, states: Tensor) -> dict[str, Any]:
        slots = self.slots
        with self._host.on_stream():
            data = as_bytes(states)  # steps may begin: on a GPU this waits for the one that runs
        size = 4 * slots.state_size
        parts = {str(layer): data[i * size : (i + 1) * size] for i, layer in enumerate(slots.layer_indices)}
        return {"position": reached, "states": parts}

    def enter(self, request_id: str, payload: SystemPayload) -> None:
        self.slots.enter(request_id, payload.state)

    def leave(self, request_id: str) -> None:
        self.slots.leave(request_id)

    def begin_step(self, step: StepBatch) -> Mapping[str, Exception]:
        self.slots.set_rows(step.request_ids, step.last)
        return {}

    def forget_rows(self) -> None:
        self.slots.forget_rows()

    def drop_request(self, request_id: str) -> None:
        self.slots.drop_request(request_id)

    def __contains__(self, request_id: object) -> bool:
        return request_id in self.slots

    def describe(self) -> str:
        return f"δ-mem in {len(self.slots.layer_indices)} layer(s)"
