"""The rotary tables of an engine's model, for configurations that list their own frequencies (``reposition.given``)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mem_triton.ops.reposition import rope_from_config
from mem_triton.ops.reposition.given import GIVEN
from mem_triton.schema import ConfigError

TABLE = "cos_sin_cache"
"""Both engines' name of the table [positions, rotary_dim] of a rotary embedding: cosines, then sines."""


def listed_tables(model: nn.Module, config: Mapping[str, Any]) -> Iterator[tuple[nn.Module, Tensor]]:
    """Each rotary embedding of a loaded model, and the table that it is to have; none where no frequencies are listed.

    config: the model's, as a dict. Angles are fp32, as the engines and transformers have them. Raises ConfigError for a
    model whose rotary embeddings have no such table.
    """
    if config.get(GIVEN) is None:
        return
    rope = rope_from_config(config, 0)
    found = {id(module): module for module in model.modules() if isinstance(getattr(module, TABLE, None), Tensor)}
    frequencies = torch.tensor(rope.inv_freq, dtype=torch.float32)
    for module in found.values():
        table = getattr(module, TABLE)
        angles = torch.outer(torch.arange(len(table), dtype=torch.float32), frequencies)
        wanted = torch.cat([angles.cos(), angles.sin()], -1) * rope.attention_factor
        if wanted.shape != table.shape:
            raise ConfigError(
                f"the model lists frequencies of RoPE ({GIVEN}), and a {type(module).__name__} has a table of "
                f"{list(table.shape)}, expected {list(wanted.shape)}; convert the checkpoint with --rope exact"
            )
        yield module, wanted.to(table)
    if not found:
        raise ConfigError(
            f"the model lists frequencies of RoPE ({GIVEN}), and has no table of them that can be changed"
        )
