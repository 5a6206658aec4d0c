"""Makes SGLang's tokenizer manager its counterpart with memory, by hooks.

The parts of the first hook are imported when a server starts and not before: ``prometheus_client`` decides at import
where counts are kept, and SGLang, whose ``/metrics`` adds up the counts of its processes, tells it so only then.
"""

from __future__ import annotations

from typing import Any

from sglang.srt.managers.tokenizer_manager import TokenizerManager

from mem_triton.config import ConfigError
from mem_triton_sglang.configuration import configured


def after_init(result: None, manager: TokenizerManager, *args: Any, **kwargs: Any) -> None:
    """``TokenizerManager.__init__``: with a configuration, the manager becomes one with memory."""
    config = configured()
    if config is None:
        return
    if type(manager) is not TokenizerManager:
        raise ConfigError(f"mem_triton does not work with {type(manager).__name__}, which takes the requests here")
    from mem_triton_sglang import http_fields
    from mem_triton_sglang.tokenizer_manager import TokenizerManagerWithMemory

    manager.__class__ = TokenizerManagerWithMemory
    manager.start_memory(config)
    manager.start_chats(config)
    http_fields.install(manager.chats, manager.adapters_by_name)


def after_metadata(result: dict[str, Any], meta_info: dict[str, Any]) -> dict[str, Any]:
    """``build_endpoint_weight_version_metadata``: the ``metadata`` of OpenAI's answers says what was read, too.

    SGLang makes it of the first answer's ``meta_info`` alone, and streams have none.
    """
    return {**result, "mem_triton": meta_info["mem_triton"]} if "mem_triton" in meta_info else result
