"""Which ways to generate are served with memory; the others are refused by name before anything is allocated.

Served is what hands each token to the model once, in order, one sequence a row: memory then writes what a plain forward
call over the whole text writes. tests/transformers/test_hf_modes.py goes through every mode that transformers has.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from transformers import GenerationConfig, PreTrainedModel
from transformers.generation import GenerationMode

from mem_triton_transformers.contexts import CACHES

SERVED = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
BATCHING = ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager")
"""Methods of a model that begin continuous batching."""

_REORDERS = "rows are reordered or dropped, and the memory of each has already been written"
_TAKES_BACK = "tokens are tried and taken back, and memory has already written them"
_TWICE = "each step runs the whole text again, and memory would write it again"
_PACKED = "continuous batching packs several sequences into one row, which would share a memory"
_HUB = "its loop is code from the Hub, and nothing says in which order it runs the model"
_FOREIGN = "another text runs through the model at each step, and memory would write it too"

OPTIONS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "custom_generate": (lambda value: value is not None, "nothing says in which order its loop runs the model"),
    "assistant_model": (lambda value: value is not None, _TAKES_BACK),
    "assistant_early_exit": (lambda value: value is not None, _TAKES_BACK),
    "prompt_lookup_num_tokens": (lambda value: value is not None, _TAKES_BACK),
    "use_mtp": (bool, _TAKES_BACK),
    "num_beams": (lambda value: value not in (None, 1), _REORDERS),
    "num_beam_groups": (lambda value: value not in (None, 1), _REORDERS),
    "constraints": (lambda value: value is not None, _REORDERS),
    "force_words_ids": (lambda value: value is not None, _REORDERS),
    "dola_layers": (lambda value: value is not None, _HUB),
    "token_healing": (bool, "the prompt's end is run before it is replaced"),
    "use_cache": (lambda value: value is False, _TWICE),
    "guidance_scale": (lambda value: value not in (None, 1), _FOREIGN),
    "logits_processor": (lambda value: any("Guidance" in type(p).__name__ for p in value or ()), _FOREIGN),
    "cache_implementation": (
        lambda value: value is not None and value not in ("dynamic", "dynamic_full", "offloaded", "quantized"),
        "generate() then hides which tokens are padding (static caches), or packs sequences (paged)",
    ),
}
"""Argument of generate -> (whether a value is refused, why)."""


class ModeError(NotImplementedError, ValueError):
    """A way to generate that is not served with memory."""


def check_generate(model: PreTrainedModel, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Raise ModeError that names the argument, or the mode, which is not served with memory, and why.

    args, kwargs: of ``model.generate``. What they leave open is taken from their ``generation_config``, then from the
    model's.
    """
    given = inspect.signature(type(model).generate).bind_partial(model, *args, **kwargs).arguments
    given = {**given, **given.pop("kwargs", {})}
    config = _merged(model.generation_config, given)
    for option, (refused, why) in OPTIONS.items():
        value = given.get(option)
        value = getattr(config, option, None) if value is None else value
        if refused(value):
            shown = value if isinstance(value, (bool, int, float, str)) else type(value).__name__
            raise _refusal(f"{option}={shown}", why)
    for name in CACHES:
        if getattr(given.get(name), "is_compileable", False):
            raise _refusal(f"{name}={type(given[name]).__name__}", OPTIONS["cache_implementation"][1])
    if (mode := config.get_generation_mode()) not in SERVED:
        known = mode in (GenerationMode.CONTRASTIVE_SEARCH, GenerationMode.DOLA_GENERATION)
        raise _refusal(
            f"the mode {mode.value}", OPTIONS["dola_layers"][1] if known else "it is not known to mem_triton"
        )


def refuse_batching(name: str, *args: Any, **kwargs: Any) -> NoReturn:
    """Stands in the place of a method that begins continuous batching."""
    raise _refusal(f"{name}()", _PACKED)


def _refusal(what: str, why: str) -> ModeError:
    return ModeError(f"{what} is not served with memory: {why}. Leave it out, or call remove_mem_triton(model) first")


def _merged(base: GenerationConfig, given: Mapping[str, Any]) -> GenerationConfig:
    """The configuration that generate() will use, as far as the choice of its mode needs it."""
    merged = copy.deepcopy(base)
    asked = given.get("generation_config")
    for source in (vars(asked) if asked is not None else {}, given):
        for key, value in source.items():
            if value is not None and hasattr(merged, key) and not key.startswith("_"):
                setattr(merged, key, value)
    return merged
