"""Spells the text of an answer that is cut into several engine requests.

vLLM starts a detokenizer with each engine request and its prompt. One that starts within a character prints the prompt
(vllm-project/vllm#48853) and loses the character, so an answer that is cut has one of its own, from start to end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from vllm.logprobs import Logprob
from vllm.sampling_params import SamplingParams
from vllm.tokenizers.detokenizer_utils import convert_ids_list_to_tokens
from vllm.v1.engine.detokenizer import IncrementalDetokenizer
from vllm.v1.engine.logprobs import LogprobsProcessor

BROKEN = "\ufffd"
"""What a tokenizer writes for a character whose tokens are not all there yet."""
CONTEXT = 4
"""Tokens that a character may begin before the token that completes it."""


class AnswerText:
    """Runs vLLM's detokenizer over a whole answer, and gives the incomplete character that it holds back at the end.

    tokenizer, prompt_ids, params: of the request. Example::

        text.take([175], ended_by_token=False)
        text.seen(finished=False, delta=True)       # "": half a character
    """

    def __init__(self, tokenizer: Any, prompt_ids: Sequence[int], params: SamplingParams) -> None:
        self._tokenizer, self._params = tokenizer, params
        self._tokens: list[int] = []  # those that text is made of
        self._sent = 0  # characters that a reader of deltas has
        whole = _whole_characters(tokenizer, list(prompt_ids))
        request = SimpleNamespace(request_id="", sampling_params=params, prompt_token_ids=whole, prompt_embeds=None)
        self._detokenizer = IncrementalDetokenizer.from_new_request(tokenizer, request)
        self._logprobs = LogprobsProcessor(tokenizer, None, None, None, None, None)

    def take(self, tokens: Sequence[int], *, ended_by_token: bool) -> None:
        """The next tokens. ended_by_token: the last of them is a stop token, which is no text."""
        self._detokenizer.update(list(tokens), ended_by_token)
        drop = ended_by_token and not self._params.include_stop_str_in_output
        self._tokens += tokens[:-1] if drop else tokens

    def seen(self, finished: bool, delta: bool) -> str:
        """The text so far; with ``delta`` what is new in it since the last call."""
        text = self._detokenizer.get_next_output_text(True, False)
        if finished:
            text += self._held_back(text)
        if not delta:
            return text
        text, self._sent = text[self._sent :], len(text)
        return text

    def _held_back(self, text: str) -> str:
        """The characters that the answer ends within."""
        tail = self._decode(self._tokens[-CONTEXT:])
        if not tail.endswith(BROKEN):
            return ""
        whole = self._decode(self._tokens)
        count = len(whole) - len(whole.rstrip(BROKEN))
        return BROKEN * max(0, count - (len(text) - len(text.rstrip(BROKEN))))

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=self._params.skip_special_tokens)

    def spelled(self, entry: dict[int, Logprob], before: list[int]) -> dict[int, Logprob]:
        """Log-probabilities of one position with the texts of their tokens after the tokens ``before``."""
        ids = list(entry)
        texts = convert_ids_list_to_tokens(self._tokenizer, ids)
        texts = self._logprobs._verify_tokens(texts, ids, before[-CONTEXT:])
        return {id: replace(entry[id], decoded_token=text) for id, text in zip(ids, texts, strict=True)}


def _whole_characters(tokenizer: Any, prompt_ids: list[int]) -> list[int]:
    """The prompt without tokens at its end that are part of a character: a decoder that starts after them prints it."""
    for dropped in range(CONTEXT + 1):
        whole = prompt_ids[: len(prompt_ids) - dropped]
        if not whole or not tokenizer.decode(whole[-CONTEXT:]).endswith(BROKEN):
            return whole
    return []
