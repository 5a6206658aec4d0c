"""Captures on vLLM: the engine request that reads what is kept, and the error of one that was not."""

from __future__ import annotations

from typing import Any

from vllm.exceptions import GenerationError
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams

from mem_triton.systems.explicit.captures import Capture


class CaptureFailed(GenerationError):
    """Answered with the capture's HTTP status; in a stream, with an event behind the answer."""


def reading_request(prompt: Any, ids: list[int]) -> tuple[Any, SamplingParams]:
    """Prompt and parameters of the request that reads ``ids``, in the prefix cache of the one that is captured."""
    salt = prompt.get("cache_salt") if isinstance(prompt, dict) else getattr(prompt, "cache_salt", None)
    prompt = {"type": "token", "prompt_token_ids": ids, **({"cache_salt": salt} if salt else {})}
    return prompt, SamplingParams(
        max_tokens=1, temperature=0.0, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY
    )


def tokens_so_far(output: RequestOutput, kind: RequestOutputKind, before: list[int]) -> list[int]:
    """The answer's tokens: an output holds the new ones alone (DELTA), or all of them."""
    tokens = list(output.outputs[0].token_ids)
    return before + tokens if kind is RequestOutputKind.DELTA else tokens


def capture_failed(capture: Capture, output: RequestOutput, kind: RequestOutputKind) -> CaptureFailed:
    """What the client hears: the reason, and the answer if it has not had it."""
    text = output.outputs[0].text if kind is not RequestOutputKind.DELTA else ""
    error = CaptureFailed(f"{capture.error}" + (f". The answer was: {text}" if text else ""))
    error.status_code = capture.error.status
    return error
