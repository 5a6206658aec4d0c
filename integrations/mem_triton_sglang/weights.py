"""Refuses what would change, while it runs, the weights that a server was started with.

A bank's entries and sessions' states were computed with them, and nothing can tell what they would mean under others.
"""

from __future__ import annotations

from typing import Any

from sglang.srt.managers.tokenizer_manager import TokenizerManager


def refusal(what: str) -> str:
    """The sentence that answers a call."""
    return (
        f"mem_triton: {what} is refused: banks and sessions belong to the weights that this server was started with; "
        "restart it with the new weights, and with a bank that was written with them"
    )


class FixedWeights(TokenizerManager):
    """Answers each call that changes weights as SGLang answers one that fails: HTTP 400 with the reason."""

    async def update_weights_from_disk(self, obj: Any, request: Any = None) -> tuple[bool, str, int]:
        return False, refusal("update_weights_from_disk"), 0

    async def update_weights_from_tensor(self, obj: Any, request: Any = None) -> tuple[bool, str]:
        return False, refusal("update_weights_from_tensor")

    async def update_weights_from_distributed(self, obj: Any, request: Any = None) -> tuple[bool, str]:
        return False, refusal("update_weights_from_distributed")

    async def update_weights_from_ipc(self, obj: Any, request: Any = None) -> tuple[bool, str]:
        return False, refusal("update_weights_from_ipc")

    async def begin_weight_update(self, obj: Any, request: Any = None) -> tuple[bool, str]:
        return False, refusal("begin_weight_update")

    async def end_weight_update(self, obj: Any, request: Any = None) -> tuple[bool, str]:
        return False, refusal("end_weight_update")

    async def check_weights(self, obj: Any, request: Any = None) -> tuple[bool, str, Any, Any]:
        if obj.action == "reset_tensors":
            return False, refusal("reset_tensors"), None, None
        return await super().check_weights(obj, request)

    async def release_memory_occupation(self, obj: Any, request: Any = None) -> None:
        """Raises ValueError where the weights would be lost; with a copy on the host they come back as they were."""
        if (obj.tags is None or "weights" in obj.tags) and not self.server_args.enable_weights_cpu_backup:
            raise ValueError(
                "mem_triton: release_memory_occupation is refused: it would discard the weights, which banks and "
                'sessions belong to; release "kv_cache" alone, start with --enable-weights-cpu-backup, or stop the '
                "server"
            )
        await super().release_memory_occupation(obj, request)
