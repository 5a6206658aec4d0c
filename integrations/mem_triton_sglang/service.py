"""What a scheduler process answers to the front end's calls over the channel.

The calls come in on the channel's thread: they take the worker's lock, and what they queue joins the stream of the
forward passes. What waits for a forward pass does so without the lock.
"""

from __future__ import annotations

from typing import Any

from mem_triton.systems.delta_mem.slots import as_bytes
from mem_triton_sglang.channel import serve
from mem_triton_sglang.worker import WorkerMemory


def serve_memory(memory: WorkerMemory, rank: int) -> None:
    """Answer calls from now on, in a thread that ends with the process."""
    service = Service(memory)
    names = ("take_state", "load_pages", "pages_state", "capture_state", "drop_captures")
    serve(rank, {name: getattr(service, name) for name in names})


class Service:
    """The methods; arguments and answers are plain data."""

    def __init__(self, memory: WorkerMemory) -> None:
        self.memory = memory

    def take_state(self, lease: str, position: int, forget: list[str]) -> dict[str, Any]:
        """This rank's layers of a lease's state after ``position``: {"position": int, "states": {index: bytes}}."""
        slots = self.memory.delta.slots
        with self.memory.lock, self.memory.on_stream():
            slots.drop(forget)
            reached, states = slots.pick(lease, position)
        with self.memory.on_stream():
            data = as_bytes(states)  # without the lock: on a GPU this waits for the step that runs
        size = 4 * slots.state_size
        parts = {str(layer): data[i * size : (i + 1) * size] for i, layer in enumerate(slots.layer_indices)}
        return {"position": reached, "states": parts}

    def load_pages(self, orders: list[Any]) -> None:
        """Start to fill pages in the background, behind the forward passes that are queued."""
        with self.memory.lock, self.memory.on_stream():
            for ref, pages, _ in orders:
                self.memory.explicit.load(ref, pages, wait=True)

    def pages_state(self, heard: list[str]) -> dict[str, dict[str, Any]]:
        """What has been filled, less what the front end has ``heard``: reference -> None, or its error; and the
        loader's counts."""
        loader = self.memory.explicit.loader
        return {"finished": loader.outcomes(heard), "stats": loader.stats()}

    def capture_state(self, lease: str) -> dict[str, Any]:
        """{"file": path} of this rank's part of a kept prompt, {"error": reason}, {} while it is written."""
        try:
            with self.memory.lock, self.memory.on_stream():
                return self.memory.explicit.captures.state(lease)
        except KeyError as error:
            return {"error": str(error)}

    def drop_captures(self, leases: list[str]) -> None:
        """Forget captures; nothing of them stays here or on the disk."""
        with self.memory.lock:
            self.memory.explicit.captures.drop(leases)
