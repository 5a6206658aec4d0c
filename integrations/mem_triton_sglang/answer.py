"""One answer out of several engine requests, as SGLang's clients see it: text, tokens, counts and log-probabilities."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

from sglang.srt.managers.io_struct import GenerateReqInput

from mem_triton.runtime.front.segments import Segments

BROKEN = "\ufffd"
"""What a tokenizer writes for a character whose tokens are not all there yet."""
LOGPROBS = ("output_token_logprobs", "output_top_logprobs", "output_token_ids_logprobs")
CONTEXT = 5
"""Tokens of the prompt that the text's first token is decoded behind, as SGLang does it."""


def fixed(obj: GenerateReqInput, params: dict[str, Any]) -> str | None:
    """Why this request's references cannot be refreshed while it answers, None if they can.

    A continuation starts a new engine request, so whatever SGLang counts over the answer would start over.
    """
    penalties = (params.get("frequency_penalty"), params.get("presence_penalty"))
    grammars = (params.get(name) for name in ("json_schema", "regex", "ebnf", "structural_tag"))
    reasons = {
        "stop strings": bool(params.get("stop") or params.get("stop_regex")),
        "structured outputs": any(grammars),
        "penalties": any(penalties) or params.get("repetition_penalty") not in (None, 1),
        "prompt log-probabilities": bool(obj.return_logprob) and (obj.logprob_start_len or 0) >= 0,
        "min_new_tokens": bool(params.get("min_new_tokens")),
        "a thinking budget": obj.max_thinking_tokens is not None,
        "custom logit processors": bool(obj.custom_logit_processor),
        "watermarks": bool(obj.watermark or params.get("watermark")),
        "sampling masks": bool(obj.return_sampling_mask),
        "flat log-probabilities": bool(obj.return_flat_raw_output_top_logprobs),
        "hidden states or routed experts": bool(
            obj.return_hidden_states or obj.return_routed_experts or obj.return_indexer_topk
        ),
    }
    return next((name for name, present in reasons.items() if present), None)


class Answer(Segments):
    """Cuts a request into SGLang requests, and puts their outputs together.

    incremental: outputs of a stream hold what is new, not all so far. decode: token ids to text, None if none is made.

    Example::

        while not answer.done:
            async for out in generate(answer.request()):
                if (seen := answer.take(out)) is not None:
                    yield seen
    """

    def __init__(
        self, obj: GenerateReqInput, prompt_ids: Sequence[int], every: int, limit: int, *,
        incremental: bool, decode: Callable[[list[int]], str] | None,
    ) -> None:  # fmt: skip
        super().__init__(prompt_ids, every, limit)
        self._obj, self._incremental, self._decode = obj, bool(obj.stream) and incremental, decode
        self._one_piece = every >= limit
        self._earlier: dict[str, Any] | None = None  # all segments before this one as one output
        self._fresh: list[int] = []  # this segment's tokens so far
        self._text = ""  # this segment's text so far
        self._sent = ""  # the answer's text so far, as an incremental client has it

    def request(self) -> GenerateReqInput:
        """The coming segment; its ``sampling_params`` are its own."""
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
        reason = out["meta_info"]["finish_reason"]
        self._fresh = [*self._fresh, *out["output_ids"]] if self._incremental else list(out["output_ids"])
        self._text = self._text + out.get("text", "") if self._incremental else out.get("text", "")
        if reason is not None:
            self.end(self._fresh, reason["type"])
        whole = self._merged(out)
        goes_on = reason is not None and not self.done
        if goes_on:
            whole["meta_info"]["finish_reason"] = None
        seen = self._seen(whole, out)
        if goes_on:
            self._earlier, self._fresh, self._text = whole, [], ""
            return seen if self._obj.stream else None
        return seen

    def _merged(self, out: dict[str, Any]) -> dict[str, Any]:
        """The answer so far as one output of all its tokens."""
        earlier = self._earlier
        whole = {**out, "output_ids": list(self._fresh), "meta_info": (meta := dict(out["meta_info"]))}
        if "text" in out:
            whole["text"] = self._whole_text()
        if earlier is None:
            return whole
        before = earlier["meta_info"]
        whole["output_ids"] = [*earlier["output_ids"], *self._fresh]
        meta["prompt_tokens"] = len(self.own_prompt)
        for name in ("cached_tokens", "cached_tokens_details"):  # later segments find their own text in the cache
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

    def _whole_text(self) -> str:
        earlier = self._earlier["text"] if self._earlier is not None else ""
        return (self._repaired(earlier) if earlier.endswith(BROKEN) else earlier) + self._text

    def _repaired(self, earlier: str) -> str:
        """Text of the earlier segments, with the characters that this one's tokens have completed."""
        tail = self.own_prompt[-CONTEXT:]
        tokens = [*tail, *self._earlier["output_ids"], *self._fresh]
        text = self._decode(tokens)[len(self._decode(tail)) :][: len(earlier)]
        return text if text.startswith(earlier.rstrip(BROKEN)) else earlier

    def _seen(self, whole: dict[str, Any], out: dict[str, Any]) -> dict[str, Any]:
        """The answer so far, or what an incremental client has not seen of it; counts are of all of it."""
        seen = {**whole, "meta_info": dict(whole["meta_info"])}
        if "text" in whole and whole["meta_info"]["finish_reason"] is None:
            seen["text"] = whole["text"].rstrip(BROKEN)  # the next segment may complete it
        if self._incremental:
            seen["output_ids"] = out["output_ids"]
            if "text" in seen:
                seen["text"], self._sent = seen["text"][len(self._sent) :], seen["text"]
        return seen
