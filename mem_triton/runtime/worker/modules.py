"""Finds the attention modules of a model that an engine has loaded, whatever their classes are called."""

from __future__ import annotations

from torch import nn

from mem_triton.schema import ConfigError


def attention_modules(model: nn.Module, attention: type[nn.Module], what: str) -> dict[str, nn.Module]:
    """Every module with ``qkv_proj``, ``attn`` and ``o_proj``, by name, in the model's order.

    attention: the engine's class of ``attn``. what: the kind of memory, for messages. Raises ConfigError if a module
    has no ``o_proj``, or if there is none.
    """
    modules = {
        name: module
        for name, module in model.named_modules()
        if isinstance(getattr(module, "attn", None), attention) and hasattr(module, "qkv_proj")
    }
    for name, module in modules.items():
        if not hasattr(module, "o_proj"):
            raise ConfigError(f"{what} cannot be attached to {name}: it has no o_proj")
    if not modules:
        raise ConfigError(
            f"{what} cannot be attached to {type(model).__name__}: none of its modules has qkv_proj, attn and o_proj"
        )
    return modules
