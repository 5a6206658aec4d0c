"""Puts an answer together out of several engine requests, as SGLang's clients see it: text, tokens, logprobs."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from sglang.srt.managers.io_struct import GenerateReqInput
from sglang.srt.sampling.sampling_params import SamplingParams

from mem_triton.runtime.frontend.continuation import Continuation
from mem_triton.runtime.frontend.fixed import WATERMARKS, fixed_by
from mem_triton.runtime.frontend.text import TextOfTokens

LOGPROBS = ("output_token_logprobs", "output_top_logprobs", "output_token_ids_logprobs")
CUTTABLE = frozenset(
    [
        "max_new_tokens",
        "stop_token_ids",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "n",
        "beam_width",
        "ignore_eos",
        "skip_special_tokens",
        "spaces_between_special_tokens",
        "no_stop_trim",
        "stream_interval",
        "logit_bias",
        "sampling_seed",
        "custom_params",
    ]
)
"""Sampling parameters that mean the same in a continuation: none of them looks back over the answer's own tokens."""
CUTTABLE_FIELDS = frozenset(
    [
        "rid",
        "session_id",
        "text",
        "input_ids",
        "sampling_params",
        "return_logprob",
        "logprob_start_len",
        "top_logprobs_num",
        "token_ids_logprob",
        "return_text_in_logprobs",
        "stream",
        "log_metrics",
        "lora_path",
        "lora_id",
        "routed_dp_rank",
        "data_parallel_rank",
        "routing_key",
        "conversation_id",
        "http_worker_ipc",
        "background",
        "require_reasoning",
        "priority",
        "extra_key",
        "cache_salt",
        "no_logs",
        "custom_labels",
        "external_trace_header",
        "received_time",
        "kv_hints",
        "modalities",
    ]
)
"""Fields of a request, likewise."""


def fixed(obj: GenerateReqInput, params: dict[str, Any]) -> str | None:
    """Why this request's references cannot be refreshed while it answers, None if they can."""
    return fixed_by(_parameters(obj, params), CUTTABLE) or fixed_by(_fields(obj), CUTTABLE_FIELDS)


def fixed_by_engine(server_args: Any) -> str | None:
    """Why no request of this server can have its references refreshed, None if they can."""
    return WATERMARKS if server_args.enable_watermark else None


def _parameters(obj: GenerateReqInput, params: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """(name, value, SGLang's default) of the sampling parameters, and of log-probabilities of the prompt."""
    plain = SamplingParams()
    yield "prompt_logprobs", bool(obj.return_logprob) and (obj.logprob_start_len or 0) >= 0, False
    for name in SamplingParams.__struct_fields__:
        yield name, params.get(name), getattr(plain, name)


def _fields(obj: GenerateReqInput) -> Iterator[tuple[str, Any, Any]]:
    """(name, value, SGLang's default) of the request's fields."""
    for field in dataclasses.fields(GenerateReqInput):
        default = None if field.default is dataclasses.MISSING else field.default
        yield field.name, getattr(obj, field.name), default


class ContinuedAnswer(Continuation):
    """Cuts a request into SGLang requests, and puts their outputs together.

    incremental: outputs of a stream hold what is new, not all so far. decode: token ids to text, None if none is made.

    Example::

        while not answer.done:
            async for out in generate(answer.request()):
                if (seen := answer.take(out)) is not None:
                    yield seen
    """

    def __init__(
        self,
        obj: GenerateReqInput,
        prompt_ids: Sequence[int],
        every: int,
        limit: int,
        *,
        incremental: bool,
        decode: Callable[[list[int]], str] | None,
    ) -> None:
        super().__init__(prompt_ids, every, limit)
        self._obj, self._incremental = obj, bool(obj.stream) and incremental
        self._text = None if decode is None else TextOfTokens(decode, prompt_ids)
        self._one_piece = every >= limit
        self._earlier: dict[str, Any] | None = None  # all requests before this one as one output
        self._fresh: list[int] = []  # this engine request's tokens so far
        self._sent = ""  # the answer's text so far, as an incremental client has it

    def request(self) -> GenerateReqInput:
        """The coming engine request; its ``sampling_params`` are its own."""
        request = copy.copy(self._obj)
        request.text, request.input_ids = None, self.prompt_ids
        request.sampling_params = params = dict(self._obj.sampling_params)
        if not self._one_piece:
            params["max_new_tokens"] = self.room
            if params.get("sampling_seed") is not None:
                params["sampling_seed"] += self.index  # the same noise again would repeat itself
        return request

    def take(self, out: dict[str, Any]) -> dict[str, Any] | None:
        """What the client sees of one output of SGLang's."""
        if self._one_piece:
            self.done = out["meta_info"]["finish_reason"] is not None
            return out
        reason, known = out["meta_info"]["finish_reason"], len(self._fresh)
        new = list(out["output_ids"]) if self._incremental else list(out["output_ids"])[known:]
        self._fresh = [*self._fresh, *new] if self._incremental else list(out["output_ids"])
        if self._text is not None:
            self._text.take(new[:-1] if self._ends_with_stop(reason) else new)
        if reason is not None:
            self.end(self._fresh, reason["type"])
        whole = self._merged(out)
        goes_on = reason is not None and not self.done
        if goes_on:
            whole["meta_info"]["finish_reason"] = None
        seen = self._seen(whole, out)
        if goes_on:
            self._earlier, self._fresh = whole, []
            return seen if self._obj.stream else None
        return seen

    def _merged(self, out: dict[str, Any]) -> dict[str, Any]:
        """The answer so far as one output of all its tokens."""
        earlier = self._earlier
        whole = {**out, "output_ids": list(self._fresh), "meta_info": (meta := dict(out["meta_info"]))}
        if "text" in out and self._text is not None:
            whole["text"] = self._text.so_far if not self.done else self._text.whole()
        if earlier is None:
            return whole
        before = earlier["meta_info"]
        whole["output_ids"] = [*earlier["output_ids"], *self._fresh]
        meta["prompt_tokens"] = len(self.own_prompt)
        for name in ("cached_tokens", "cached_tokens_details"):  # later requests find their own text in the cache
            if name in before:
                meta[name] = before[name]
        for name in ("completion_tokens", "reasoning_tokens", "num_retractions", "e2e_latency"):
            if name in before and name in meta:
                meta[name] += before[name]
        for name in LOGPROBS:
            if name in before and name in meta and not self._incremental:
                meta[name] = [*(before[name] or ()), *(meta[name] or ())]
            if f"{name}_length" in before and f"{name}_length" in meta:
                meta[f"{name}_length"] += before[f"{name}_length"]
        if (reason := meta["finish_reason"]) is not None and reason["type"] == "length":
            meta["finish_reason"] = {**reason, "length": len(whole["output_ids"])}
        return whole

    def _ends_with_stop(self, reason: dict[str, Any] | None) -> bool:
        """Whether the last token is a stop token that is no text."""
        matched = (reason or {}).get("matched")
        return isinstance(matched, int) and not self._obj.sampling_params.get("no_stop_trim")

    def _seen(self, whole: dict[str, Any], out: dict[str, Any]) -> dict[str, Any]:
        """The answer so far, or what an incremental client has not seen of it; counts are of all of it."""
        seen = {**whole, "meta_info": dict(whole["meta_info"])}
        if self._incremental:
            seen["output_ids"] = out["output_ids"]
            if "text" in seen:
                seen["text"], self._sent = seen["text"][len(self._sent) :], seen["text"]
        return seen
