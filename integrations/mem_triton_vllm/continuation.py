"""Puts an answer together out of several of vLLM's requests: the parameters of each, and their outputs as one."""

from __future__ import annotations

import copy
from dataclasses import replace

from vllm.config import VllmConfig
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams

from mem_triton.runtime.frontend.continuation import Continuation
from mem_triton.runtime.frontend.fixed import PROCESSORS, WATERMARKS, fixed_by
from mem_triton_vllm.answer_text import CONTEXT, AnswerText

CUTTABLE = frozenset(
    [
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "seed",
        "logit_bias",
        "allowed_token_ids",
        "stop_token_ids",
        "ignore_eos",
        "max_tokens",
        "logprobs",
        "logprob_token_ids",
        "detokenize",
        "skip_special_tokens",
        "spaces_between_special_tokens",
        "include_stop_str_in_output",
        "output_kind",
        "stream_interval",
        "extra_args",
        "skip_clone",
        "skip_reading_prefix_cache",
        "repetition_penalty",  # it counts the prompt, too
        "_eos_token_id",
        "_all_stop_token_ids",
        "_watermarking_skipped",
        "output_text_buffer_length",  # vLLM's own
    ]
)
"""Parameters that mean the same in a continuation: none of them looks back over the answer's own tokens."""


def fixed(params: SamplingParams) -> str | None:
    """Why this request's references cannot be refreshed while it answers, None if they can."""
    plain = SamplingParams()
    names = SamplingParams.__struct_fields__
    return fixed_by(((name, getattr(params, name), getattr(plain, name)) for name in names), CUTTABLE)


def fixed_by_engine(vllm_config: VllmConfig) -> str | None:
    """Why no request of this engine can have its references refreshed, None if they can."""
    if vllm_config.model_config.logits_processors:
        return PROCESSORS
    return WATERMARKS if getattr(vllm_config, "watermark_config", None) is not None else None


class ContinuedAnswer(Continuation):
    """Cuts an answer into vLLM's requests, and puts their outputs together.

    text: makes the answer's text of its tokens; None where vLLM's own is right.

    Example::

        while not answer.done:
            for output in engine.run(answer.prompt_ids, answer.params()):
                yield from answer.take(output)
            plan = extend(plan, answer.generated)
    """

    def __init__(
        self, prompt_ids: list[int], params: SamplingParams, every: int, limit: int, text: AnswerText | None = None
    ) -> None:
        super().__init__(prompt_ids, every, limit)
        self._params, self._delta = params, params.output_kind is RequestOutputKind.DELTA
        self._text = text
        self._before: CompletionOutput | None = None  # all earlier requests' answers as one
        self._cached: int | None = None
        self._fresh: list[int] = []  # this engine request's tokens so far

    def params(self) -> SamplingParams:
        """The coming engine request's parameters."""
        params = copy.copy(self._params)
        params.max_tokens = self.room
        if params.seed is not None:
            params.seed += self.index  # the same noise again would repeat itself
        if self._text is not None and params.logprobs is None and params.logprob_token_ids is None:
            params.detokenize = False  # nobody reads it
        return params

    def take(self, output: RequestOutput) -> list[RequestOutput]:
        """What the caller sees of one engine output: nothing, or one output of the whole answer."""
        if self._params.n != 1:  # never cut, see ``fixed``
            self.done = output.finished
            return [output]
        piece, start, known = output.outputs[0], len(self.generated), len(self._fresh)
        fresh = list(piece.token_ids) if self._delta else list(piece.token_ids)[known:]
        self._fresh = [*self._fresh, *fresh]
        answer = copy.copy(piece)
        if self._text is not None:
            self._spell(answer, start, known if self._delta else 0)
        if output.finished:
            self.end(self._fresh, piece.finish_reason)
            self._fresh = []
        if self._text is not None:
            self._text.take(fresh, ended_by_token=piece.finish_reason == "stop")
            answer.text = self._text.seen(self.done, self._delta)
        merged = self._merged(output, answer, start)
        if not self.done and output.finished:
            merged.finished = False
            answer.finish_reason = answer.stop_reason = None
            self._before = answer
            if self._params.output_kind is RequestOutputKind.FINAL_ONLY:
                return []
        return [merged]

    def _spell(self, answer: CompletionOutput, start: int, first: int) -> None:
        """Give log-probabilities the text of their tokens again where it depends on tokens of earlier requests.

        start: the answer's tokens before this engine request. first: place in the request of ``answer``'s first.
        """
        if start == 0 or answer.logprobs is None or first >= CONTEXT:
            return
        tokens = [*self.generated, *self._fresh]
        answer.logprobs = [
            self._text.spelled(entry, tokens[: start + place]) if place < CONTEXT else entry
            for place, entry in enumerate(answer.logprobs, first)
        ]

    def _merged(self, output: RequestOutput, answer: CompletionOutput, start: int) -> RequestOutput:
        merged = copy.copy(output)
        merged.prompt_token_ids, merged.outputs = self.own_prompt, [answer]
        if self._cached is None:
            self._cached = output.num_cached_tokens
        merged.num_cached_tokens = self._cached  # the first request's: later ones find their own text in the cache
        if (earlier := self._before) is None:
            return merged
        if answer.weight_versions is not None:
            spans = [replace(s, start=s.start + start, end=s.end + start) for s in answer.weight_versions]
            answer.weight_versions = [*(earlier.weight_versions or ()), *spans]
        if self._delta:
            return merged
        if self._text is None:
            answer.text = earlier.text + answer.text
        answer.token_ids = [*earlier.token_ids, *answer.token_ids]
        if earlier.cumulative_logprob is not None and answer.cumulative_logprob is not None:
            answer.cumulative_logprob += earlier.cumulative_logprob
        if earlier.logprobs is not None and answer.logprobs is not None:
            answer.logprobs = [*earlier.logprobs, *answer.logprobs]
        return merged
