"""vLLM's side of an answer in segments (``runtime.front.segments``): parameters of each, and their outputs as one."""

from __future__ import annotations

import copy

from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams

from mem_triton.runtime.front.segments import Segments


def fixed(params: SamplingParams) -> str | None:
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


class OutputSegments(Segments):
    """Cuts an answer into vLLM's requests, and puts their outputs together.

    Example::

        while not segments.done:
            for output in engine.run(segments.prompt_ids, segments.params()):
                yield from segments.take(output)
            plan = extend(plan, segments.generated)
    """

    def __init__(self, prompt_ids: list[int], params: SamplingParams, every: int, limit: int) -> None:
        super().__init__(prompt_ids, every, limit)
        self._params = params
        self._before: RequestOutput | None = None  # all earlier segments as one output
        self._cached: int | None = None
        self._fresh: list[int] = []  # this segment's tokens so far

    def params(self) -> SamplingParams:
        """The coming segment's parameters."""
        params = copy.copy(self._params)
        params.max_tokens = self.room
        if params.seed is not None:
            params.seed += self.index  # the same noise again would repeat itself
        return params

    def take(self, output: RequestOutput) -> list[RequestOutput]:
        """What the caller sees of one engine output: nothing, or one output of the whole answer."""
        answer = output.outputs[0]
        delta = self._params.output_kind is RequestOutputKind.DELTA
        self._fresh = self._fresh + list(answer.token_ids) if delta else list(answer.token_ids)
        if output.finished:
            self.end(self._fresh, answer.finish_reason)
            self._fresh = []
        merged = self._merged(output, delta)
        if not self.done and output.finished:
            merged.finished = False
            merged.outputs[0].finish_reason = merged.outputs[0].stop_reason = None
            self._before = None if delta else merged
            if self._params.output_kind is RequestOutputKind.FINAL_ONLY:
                return []
        return [merged]

    def _merged(self, output: RequestOutput, delta: bool) -> RequestOutput:
        merged = copy.copy(output)
        merged.prompt_token_ids = self.own_prompt
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
