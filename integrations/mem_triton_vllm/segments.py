"""A request whose references change while it answers: served as several engine requests, seen as one.

After every ``every`` generated tokens new references are fetched for what was just said (Memory³ §2.4). The engine gets
the next tokens as a continuation of the text so far, with the references of every part. Its prefix cache holds all of
that but the last block, so nothing is computed twice, no running request waits for a retrieval, and preemption, tensor
parallelism and the block hashes see ordinary requests with ordinary plans.
"""

from __future__ import annotations

import copy

from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams


def obstacle(params: SamplingParams) -> str | None:
    """Why this request's references cannot be refreshed while it answers, None if they can.

    A continuation starts a new engine request, so whatever the engine counts over the answer would start over.
    """
    reasons = {
        "several answers (n)": params.n != 1,
        "stop strings": bool(params.stop),
        "structured outputs": params.structured_outputs is not None,
        "presence or frequency penalties": bool(params.presence_penalty or params.frequency_penalty),
        "prompt log-probabilities": params.prompt_logprobs is not None,
        "min_tokens": params.min_tokens > 0,
    }
    return next((name for name, present in reasons.items() if present), None)


class Segments:
    """Cuts an answer into engine requests of ``every`` tokens, and puts their outputs together.

    prompt_ids: the request's own prompt; limit: tokens that the answer may have in all.

    Example::

        while not segments.done:
            for output in engine.run(segments.prompt_ids, segments.params()):
                yield from segments.take(output)
            plan = extend(plan, segments.generated)
    """

    def __init__(self, prompt_ids: list[int], params: SamplingParams, every: int, limit: int) -> None:
        self._own_prompt, self._params, self._every, self._limit = list(prompt_ids), params, every, limit
        self.generated: list[int] = []
        self.done = False
        self._index = 0
        self._before: RequestOutput | None = None  # all earlier segments as one output
        self._cached: int | None = None
        self._fresh: list[int] = []  # this segment's tokens so far

    @property
    def prompt_ids(self) -> list[int]:
        """The coming segment's prompt: the text so far."""
        return self._own_prompt + self.generated

    def params(self) -> SamplingParams:
        """The coming segment's parameters."""
        params = copy.copy(self._params)
        params.max_tokens = min(self._every, self._limit - len(self.generated))
        if params.seed is not None:
            params.seed += self._index  # the same noise again would repeat itself
        return params

    def take(self, output: RequestOutput) -> list[RequestOutput]:
        """What the caller sees of one engine output: nothing, or one output of the whole answer."""
        answer = output.outputs[0]
        delta = self._params.output_kind is RequestOutputKind.DELTA
        self._fresh = self._fresh + list(answer.token_ids) if delta else list(answer.token_ids)
        if output.finished:
            self._end(answer.finish_reason)
        merged = self._merged(output, delta)
        if not self.done and output.finished:
            merged.finished = False
            merged.outputs[0].finish_reason = merged.outputs[0].stop_reason = None
            self._before = None if delta else merged
            if self._params.output_kind is RequestOutputKind.FINAL_ONLY:
                return []
        return [merged]

    def _end(self, reason: str | None) -> None:
        self.generated += self._fresh
        self._fresh = []
        self._index += 1
        self.done = reason != "length" or len(self.generated) >= self._limit

    def _merged(self, output: RequestOutput, delta: bool) -> RequestOutput:
        merged = copy.copy(output)
        merged.prompt_token_ids = self._own_prompt
        answer = copy.copy(output.outputs[0])
        merged.outputs = [answer]
        if self._cached is None:
            self._cached = output.num_cached_tokens
        merged.num_cached_tokens = self._cached  # the first segment's: later ones find their own text in the cache
        if delta or self._before is None:
            return merged
        earlier = self._before.outputs[0]
        answer.text = earlier.text + answer.text
        answer.token_ids = [*earlier.token_ids, *answer.token_ids]
        if earlier.cumulative_logprob is not None and answer.cumulative_logprob is not None:
            answer.cumulative_logprob += earlier.cumulative_logprob
        if earlier.logprobs is not None and answer.logprobs is not None:
            answer.logprobs = [*earlier.logprobs, *answer.logprobs]
        return merged
