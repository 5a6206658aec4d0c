"""Loads models under ``--load-format mem_triton``, vLLM's official hook, and prepares them for their memory.

It loads the weights with any base format (``--model-loader-extra-config '{"base_load_format": "dummy"}'``), then makes
sure that δ-mem is attached after LoRA and before the KV cache is planned.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import nn
from vllm.config import ModelConfig, VllmConfig
from vllm.config.load import LoadConfig
from vllm.logger import init_logger
from vllm.model_executor.model_loader import get_model_loader
from vllm.model_executor.model_loader.base_loader import BaseModelLoader

from mem_triton.compat import installation
from mem_triton.runtime.worker.rotary import listed_tables
from mem_triton_vllm import warmup
from mem_triton_vllm.names import LOAD_FORMAT
from mem_triton_vllm.refusals import check_engine, check_touch_points, section_of

logger = init_logger("vllm.mem_triton")


class MemTritonLoader(BaseModelLoader):
    """Delegates to the base format's loader and prepares the served model (not a draft model) for its memory."""

    def __init__(self, load_config: LoadConfig) -> None:
        super().__init__(load_config)
        base = copy.copy(load_config)
        extra = dict(load_config.model_loader_extra_config or {})
        base.load_format = extra.pop("base_load_format", "auto")
        if base.load_format == LOAD_FORMAT:
            raise ValueError(f"base_load_format: {LOAD_FORMAT} cannot be its own base; name the weights' format")
        base.model_loader_extra_config = extra
        self.base = get_model_loader(base)

    def download_model(self, model_config: ModelConfig) -> None:
        self.base.download_model(model_config)

    def load_weights(self, model: nn.Module, model_config: ModelConfig) -> None:
        self.base.load_weights(model, model_config)

    def load_model(self, vllm_config: VllmConfig, model_config: ModelConfig, prefix: str = "") -> nn.Module:
        if model_config is not vllm_config.model_config:  # a draft model: only the served model remembers
            return self.base.load_model(vllm_config, model_config, prefix)
        config = section_of(vllm_config)
        check_touch_points()
        logger.info("%s", installation(__file__))
        check_engine(vllm_config)
        model = self.base.load_model(vllm_config, model_config, prefix)
        use_frequencies(model, model_config.hf_text_config.to_dict())
        _prepare(vllm_config, model, config)
        warmup.register(vllm_config)
        return model


def use_frequencies(model: nn.Module, config: dict[str, Any]) -> None:
    """Turn by the frequencies that a model's configuration lists, where it lists some. Raises ConfigError."""
    for module, table in listed_tables(model, config):
        module.cos_sin_cache = table


def _prepare(vllm_config: VllmConfig, model: nn.Module, config: Any) -> None:
    from mem_triton_vllm import service, v1_runner, v2_runner  # after vLLM has chosen its runner

    service.install()
    if vllm_config.use_v2_model_runner:
        v2_runner.prepare(vllm_config, model, config)
    else:
        v1_runner.prepare(vllm_config, model, config)
