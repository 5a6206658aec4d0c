"""Refuses what would change, while it runs, the weights that a server was started with.

A bank's entries and sessions' states were computed with them, and nothing can tell what they would mean under others.
vLLM changes weights by worker methods that its front end calls by name.
"""

from __future__ import annotations

from typing import Any

from vllm.exceptions import VLLMValidationError

CHANGES = frozenset(
    {
        "finish_weight_update",
        "init_weight_transfer_engine",
        "load_model",
        "reload_weights",
        "reset_weights",
        "start_draft_weight_update",
        "start_weight_update",
        "update_weights",
    }
)
"""Worker methods that change weights, or prepare for it."""
LOADS = frozenset({"add_lora", "remove_lora"})
"""Worker methods that change adapters; the engine's methods of these names tell memory of it."""


def check_call(method: Any, timeout: float | None = None, args: tuple = (), kwargs: dict | None = None) -> None:
    """Raise VLLMValidationError, which vLLM answers with HTTP 400, for what changes weights or adapters of workers.

    method: its name; what a function does to a model is its caller's responsibility, most only look.
    """
    if method in CHANGES:
        raise VLLMValidationError(
            f"mem_triton: {method} is refused: banks and sessions belong to the weights that this server was started "
            "with; restart it with the new weights, and with a bank that was written with them",
            parameter=method,
        )
    if method in LOADS:
        raise VLLMValidationError(
            f"mem_triton: {method} of the workers is refused: sessions and cached prefixes belong to the adapter that "
            f"answers; call the engine's {method}, or load it by the server's route for adapters",
            parameter=method,
        )
    if method == "sleep":
        check_sleep(*args, **(kwargs or {}))


def check_sleep(level: int = 1) -> None:
    """Raise VLLMValidationError for a sleep from which the weights do not come back. level 1 keeps them on the host."""
    if int(level) >= 2:
        raise VLLMValidationError(
            f"mem_triton: sleep level {level} is refused: it discards the weights, which banks and sessions belong to, "
            "and memory's own tensors with them; use level 1, or stop the server",
            parameter="level",
        )
