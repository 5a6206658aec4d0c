"""Faults in our own code while an engine runs: each named place raises for as long as a file names it.

``install`` wraps the places in the process that calls it; a case's rounds choose which one raises (``switch``).
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

VARIABLE = "MEM_TRITON_TEST_FAULT"

SHARED = {
    "enter states": "mem_triton.systems.delta_mem.slots:StateSlots.enter",
    "leave states": "mem_triton.systems.delta_mem.slots:StateSlots.leave",
    "rows of states": "mem_triton.systems.delta_mem.slots:StateSlots.set_rows",
    "enter tables": "mem_triton.systems.explicit.worker:ExplicitMemory.enter",
    "leave tables": "mem_triton.systems.explicit.worker:ExplicitMemory.leave",
    "rows of tables": "mem_triton.systems.explicit.worker:ExplicitMemory.begin_step",
    "one row": "mem_triton.store.pool.tables:MemoryTables._show",
    "load a page": "mem_triton.systems.explicit.worker:ExplicitMemory.load_page",
    "fetch": "mem_triton.store.pool.fetching:Fetcher._do",
    "take a state": "mem_triton.systems.delta_mem.worker:DeltaWorker.take_state",
    "order of steps": "mem_triton.store.pool.loader:PageLoader.before_step",
}
VLLM = {
    **SHARED,
    "payload": "mem_triton_vllm.worker:carried_by",
    "attention": "mem_triton.ops.memory_attention.planned:PlannedLayer.attend",
    "step of states": "mem_triton_vllm.state_cache:DeltaStateCache.step",
    "block keys": "mem_triton_vllm.block_keys:memory_keys",
    "places": "mem_triton_vllm.places:place_of",
}
POOLS = {
    "enter a pool": "mem_triton.systems.memoryllm.worker:PoolWorker.enter",
    "leave a pool": "mem_triton.systems.memoryllm.worker:PoolWorker.leave",
    "rows of pools": "mem_triton.systems.memoryllm.worker:PoolWorker.begin_step",
    "fetch a version": "mem_triton.systems.memoryllm.worker:PoolWorker.fetch",
    "place a version": "mem_triton.systems.memoryllm.worker:PoolWorker.place",
    "begin a write": "mem_triton.systems.memoryllm.worker:PoolWorker.write",
    "choose rows": "mem_triton.systems.memoryllm.choosing:RowChooser._choose",
}
"""Of MemoryLLM's and M+'s pools, on both engines."""
SGLANG = {
    **SHARED,
    "payload": "mem_triton_sglang.worker:carried_of",
    "positions": "mem_triton_sglang.worker:_positions",
    "attention": "mem_triton.ops.memory_attention.planned:PlannedLayer.attend",
    "step of states": "mem_triton_sglang.states:DeltaStates.advance",
    "radix keys": "mem_triton_sglang.radix_keys:seen_tokens",
    "places": "mem_triton_sglang.places:place_of",
}


class Injected(Exception):
    """What a place raises."""


def switch(name: str | None) -> None:
    """Which place raises from now on, in all processes; None for none."""
    if path := os.environ.get(VARIABLE):
        Path(path).write_text(name or "")


def install_vllm() -> None:
    _install(VLLM)


def install_sglang() -> None:
    _install(SGLANG)


def install_pools() -> None:
    _install(POOLS)


def without_guards() -> None:
    """Negative control: what our code raises reaches the engine."""
    from mem_triton.runtime.worker.memory import BatchMemory

    def lose(self: Any, request_ids: Any, where: str, error: BaseException) -> None:
        raise error

    BatchMemory.lose = lose


def vllm_without_guards() -> None:
    install_vllm()
    without_guards()


def sglang_without_guards() -> None:
    install_sglang()
    without_guards()


def _install(places: dict[str, str]) -> None:
    for name, place in places.items():
        module, _, path = place.partition(":")
        *owners, attribute = path.split(".")
        owner = functools.reduce(getattr, owners, importlib.import_module(module))
        setattr(owner, attribute, _raising(name, getattr(owner, attribute)))


def _raising(name: str, stock: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(stock)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if Path(os.environ[VARIABLE]).read_text() == name and _is_concerned(name, args):
            raise Injected(name)
        return stock(*args, **kwargs)

    return wrapped


def _is_concerned(name: str, args: tuple[Any, ...]) -> bool:
    return name != "attention" or args[-1]().row_slot is not None  # without memory it is the engine's own attention
