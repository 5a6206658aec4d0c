"""Says why a request's references cannot be refreshed while it answers.

A continuation starts a new engine request, so whatever an engine counts over the answer would start over. An engine
says which of its parameters mean the same in a continuation; all others, those of later versions among them, keep an
answer in one piece.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

STRUCTURED, PENALTIES, STOP = "structured outputs", "penalties", "stop strings"
PROMPT_LOGPROBS, WATERMARKS, PROCESSORS = "prompt log-probabilities", "watermarks", "custom logits processors"
INSIDE = "hidden states or routed experts"
REASONS = {
    "n": "several answers (n)",
    "stop": STOP,
    "stop_regex": STOP,
    "structured_outputs": STRUCTURED,
    "json_schema": STRUCTURED,
    "regex": STRUCTURED,
    "ebnf": STRUCTURED,
    "structural_tag": STRUCTURED,
    "presence_penalty": PENALTIES,
    "frequency_penalty": PENALTIES,
    "repetition_penalty": PENALTIES,
    "prompt_logprobs": PROMPT_LOGPROBS,
    "logprob_start_len": PROMPT_LOGPROBS,
    "max_thinking_tokens": "a thinking budget",
    "custom_logit_processor": PROCESSORS,
    "watermark": WATERMARKS,
    "return_sampling_mask": "sampling masks",
    "return_flat_raw_output_top_logprobs": "flat log-probabilities",
    "return_hidden_states": INSIDE,
    "return_routed_experts": INSIDE,
    "return_indexer_topk": INSIDE,
}
"""What the report says of an engine's parameter, by its name; others are named as they are."""


def fixed_by(values: Iterable[tuple[str, Any, Any]], cuttable: Collection[str]) -> str | None:
    """Name the first parameter that keeps an answer in one piece; None if it may be cut.

    values: (name, what the request says, the engine's default) of each parameter. cuttable: names of those that mean
    the same in a continuation.
    """
    name = next((name for name, value, default in values if name not in cuttable and is_said(value, default)), None)
    return name and REASONS.get(name, name)


def is_said(value: Any, default: Any) -> bool:
    """Whether a value asks for something else than the default; None, False and what is empty ask for nothing."""
    if value is None or value is default:
        return False
    try:
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return bool(value != default and (value or default or is_number))
    except (RuntimeError, ValueError):  # arrays
        return True
