"""Convert a GGUF file into a model folder with ordinary tensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils import logging


def convert(
    source: Path, folder: Path, dtype: str, settings: Mapping[str, Any], tokens: Mapping[str, int], parameters: int
) -> None:
    """Write the model of a GGUF file and its tokenizer into ``folder``, in ``dtype``.

    settings: what the configuration says instead of the file, which keeps its numbers in fp32. tokens: of the
    configuration for generation. parameters: how many the model has. Raises ValueError if it has another number, or if
    the file gives no chat template; and what transformers raises.
    """
    logging.disable_progress_bar()
    place: dict[str, Any] = {"pretrained_model_name_or_path": source.parent, "gguf_file": source.name}
    tokenizer = AutoTokenizer.from_pretrained(**place)
    if not tokenizer.chat_template:
        raise ValueError(f"{source}: this version of transformers reads no chat template from it")
    read = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32)
    known = {key: value for key, value in read.config.to_dict().items() if key not in _ITS_OWN} | dict(settings)
    with torch.device("meta"):  # a model of its own: the one that was read is marked as quantised
        plain = AutoModelForCausalLM.from_config(AutoConfig.for_model(known.pop("model_type"), **known))
    plain.load_state_dict(read.state_dict(), assign=True)
    plain.tie_weights()
    if (count := sum(parameter.numel() for parameter in plain.parameters())) != parameters:
        raise ValueError(f"{source}: gives {count} parameters, expected {parameters}")
    plain.to(getattr(torch, dtype)).save_pretrained(folder)
    GenerationConfig(**tokens).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


_ITS_OWN = ("quantization_config", "_name_or_path", "_model_name_or_path", "architectures")
