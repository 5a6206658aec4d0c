"""Makes vLLM's engines their counterparts with memory, in the constructors of the two classes."""

from __future__ import annotations

import functools
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from vllm.config import VllmConfig
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.llm_engine import LLMEngine

from mem_triton.config import ConfigError, MemTritonConfig
from mem_triton.runtime.channel import CALL, ChannelError, Client, make_folder
from mem_triton.runtime.frontend.memory import Call
from mem_triton.systems.base import FrontendServices
from mem_triton_vllm import callers
from mem_triton_vllm.async_engine import AsyncLLMWithMemory
from mem_triton_vllm.continuation import fixed_by_engine
from mem_triton_vllm.front_end import VLLMFrontEnd
from mem_triton_vllm.refusals import check_engine, check_touch_points, has_one_front_end, obstacles, section_of
from mem_triton_vllm.shape import shape_of
from mem_triton_vllm.sync_engine import LLMEngineWithMemory


def install(undo: ExitStack) -> None:
    """Let engines whose configuration has a ``mem_triton`` section become their counterparts with memory.

    Only the two constructors are wrapped; an engine without the section is the stock class, untouched. ``undo``
    puts them back.
    """
    for stock, with_memory in ((AsyncLLM, AsyncLLMWithMemory), (LLMEngine, LLMEngineWithMemory)):
        if not getattr(stock.__init__, "_mem_triton", False):
            undo.callback(setattr, stock, "__init__", stock.__init__)
            stock.__init__ = _checking_init(stock.__init__, with_memory)


def _checking_init(stock_init: Any, with_memory: type) -> Any:
    @functools.wraps(stock_init)
    def __init__(self: Any, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> None:
        config = section_of(vllm_config)
        if config is None:
            return stock_init(self, vllm_config, *args, **kwargs)
        check_touch_points()
        check_engine(vllm_config)
        if config.tenants is not None and with_memory.SERVES:
            callers.install()

        def tokenizer() -> Any:
            return self.renderer.get_tokenizer()

        memory = _front_end(vllm_config, config, lambda ids: tokenizer().decode(ids), tokenizer)
        folder = make_folder()  # the processes that are started next find it
        stock_init(self, vllm_config, *args, **kwargs)
        memory.call = _workers(vllm_config, folder)
        self.memory, self.__class__ = memory, with_memory
        self.start_memory()

    __init__._mem_triton = True
    return __init__


def _workers(vllm_config: VllmConfig, folder: Path) -> Call:
    """What calls the workers of an engine that runs. Raises ConfigError if one of them is out of reach."""
    client = Client(vllm_config.parallel_config.world_size, folder)
    if has_one_front_end(vllm_config):
        try:
            client.connect()
        except ChannelError as error:
            raise ConfigError(f"mem_triton: {error}") from None
    return functools.partial(client.call, CALL)


def _front_end(vllm_config: VllmConfig, config: MemTritonConfig, decode: Any, tokenizer: Any = None) -> VLLMFrontEnd:
    """What is configured, before the engine starts: what cannot work is said at once."""
    if vllm_config.model_config.skip_tokenizer_init:
        decode = tokenizer = None

    def render(messages: list[dict[str, str]]) -> str:
        return tokenizer().apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    services = FrontendServices(decode, tokenizer and render, tokenizer, obstacles(vllm_config))
    loras = vllm_config.lora_config
    more = {"tokenizer": tokenizer, "fixed_all": fixed_by_engine(vllm_config)}
    more["kept_loras"] = None if loras is None else loras.max_cpu_loras
    return VLLMFrontEnd.of(config, shape_of(vllm_config), services, **more)
