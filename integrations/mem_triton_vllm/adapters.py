"""Has LoRA adapters loaded before a request that names them is admitted, and notes what their files held then.

vLLM's workers load an adapter in the step that first runs it, and one of ``load_inplace`` in every step that runs it:
nobody could say which files answered a request.
"""

from __future__ import annotations

from typing import Any

import msgspec
from vllm.lora.request import LoRARequest
from vllm.v1.engine import EngineCoreRequest

from mem_triton.systems.lora import LoadedAdapters


def to_load(loras: LoadedAdapters, prompt: Any, named: LoRARequest | None) -> LoRARequest | None:
    """The adapter that has to be loaded before the request is admitted, in place; None if its workers have it.

    named: the call's; a prompt that is an engine's request brings its own, and vLLM runs that.
    """
    lora = of_request(prompt, named)
    if lora is None or loras.capacity is None:  # an engine without LoRA says so itself
        return None
    key, path = lora.lora_int_id, lora.lora_path
    is_there = loras.has_read(key, path) if lora.load_inplace else loras.knows(key)
    return None if is_there else _in_place(lora, True)


def of_request(prompt: Any, named: LoRARequest | None) -> LoRARequest | None:
    """The adapter that a request names."""
    return prompt.lora_request if isinstance(prompt, EngineCoreRequest) else named


def settled(prompt: Any, named: LoRARequest | None) -> tuple[Any, LoRARequest | None]:
    """A request's prompt and adapter, which its workers do not read again."""
    if isinstance(prompt, EngineCoreRequest):
        named = _in_place(prompt.lora_request, False)
        prompt = msgspec.structs.replace(prompt, lora_request=named)
    return prompt, _in_place(named, False)


def reads_files(loras: LoadedAdapters, lora: LoRARequest) -> bool:
    """Whether workers that are told to load the adapter read its files; they do not where they have it."""
    return lora.load_inplace or not loras.knows(lora.lora_int_id)


def _in_place(lora: LoRARequest | None, reads: bool) -> LoRARequest | None:
    if lora is None or lora.load_inplace == reads:
        return lora
    return msgspec.structs.replace(lora, load_inplace=reads)
