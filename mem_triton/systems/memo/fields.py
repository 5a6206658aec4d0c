"""Says which fields of a chat request the model of both models understands.

Whatever else a request says must be as if it were left out: an answer without what was asked for would be a silent one.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

UNDERSTOOD = frozenset(
    {"model", "messages", "stream", "stream_options", "temperature", "seed", "max_tokens", "max_completion_tokens"}
)
WITHOUT_EFFECT = frozenset(
    {
        "user",
        "metadata",
        "store",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "request_id",
        "rid",
        "verbosity",
        "reasoning_effort",
        "include_reasoning",
        "separate_reasoning",
        "stream_reasoning",
        "parallel_tool_calls",
        "skip_special_tokens",
        "spaces_between_special_tokens",
        "add_generation_prompt",
    }
)
"""Fields that change neither what is asked nor what is answered; they may say anything."""
DEFAULTS: Mapping[str, tuple[Any, ...]] = {
    "n": (1,),
    "tool_choice": ("none",),
    "function_call": ("none",),
    "modalities": (["text"],),
    "top_p": (1,),
    "top_k": (-1,),
    "repetition_penalty": (1,),
    "length_penalty": (1,),
}
"""What else than nothing leaves a field as it is."""
_NOTHING = (None, False, 0, "", [], {})


def unserved(body: Mapping[str, Any], more: Collection[str] = ()) -> str | None:
    """The first field that asks for what is not served, None if there is none. more: fields that are understood, too.

    None, empty and the field's default ask for nothing.
    """
    known = UNDERSTOOD | WITHOUT_EFFECT | {"response_format", *more}
    for name, value in body.items():
        if name not in known and value not in (*_NOTHING, *DEFAULTS.get(name, ())):
            return name
    kind = body.get("response_format") or {}
    return "response_format" if not isinstance(kind, Mapping) or kind.get("type", "text") != "text" else None
