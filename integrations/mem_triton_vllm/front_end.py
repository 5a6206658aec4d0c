"""vLLM's front end: a request's fields become a session, a plan and filled pages before it is scheduled.

Runs in the process that holds ``AsyncLLM`` (the API server) or ``LLMEngine`` (``LLM``). Everything a worker needs
travels with the request in ``extra_args``; what a KV cache needs to tell memories apart travels in vLLM's
``cache_salt`` (sessions) and in the keys of its blocks (``block_keys``).
"""

from __future__ import annotations

import copy
import json
import logging
import re
import sys
from collections.abc import AsyncGenerator, Callable, Mapping
from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine import EngineCoreRequest

from mem_triton.runtime.frontend.memory import MemoryFrontEnd, Opened
from mem_triton.runtime.frontend.tenants import Tenants
from mem_triton.runtime.incidents import Incidents, make_file
from mem_triton.systems.base import FrontendPart
from mem_triton.systems.lora import Adapter, LoadedAdapters
from mem_triton.systems.params import RequestParams
from mem_triton.systems.payload import Place, encode
from mem_triton.systems.registry import count_refusal
from mem_triton.systems.request import CARRIER, RequestError
from mem_triton_vllm.answer_text import AnswerText
from mem_triton_vllm.continuation import ContinuedAnswer, fixed


def keep_warnings() -> None:
    """Have this project's warnings printed in vLLM's server, whose routes raise the root logger's level to ERROR."""
    ours = logging.getLogger("mem_triton")
    if ours.level == logging.NOTSET:
        ours.setLevel(logging.WARNING)


class VLLMFrontEnd(MemoryFrontEnd):
    """Opens and closes the memory of each request; one per engine front end.

    tokenizer: the model's, when it is asked for; None where an engine has none. fixed_all: why no answer of this engine
    can have its references refreshed, None if they can. kept_loras: how many LoRA adapters its workers keep.

    Example::

        opened = front_end.open_request(prompt, params)          # VLLMValidationError -> HTTP 400
        prompt, params = front_end.carry(prompt, params, opened)
        ...
        front_end.close(opened)
    """

    def __init__(
        self,
        parts: Mapping[str, FrontendPart],
        tenants: Tenants | None = None,
        tokenizer: Callable[[], Any] | None = None,
        fixed_all: str | None = None,
        kept_loras: int | None = None,
    ) -> None:
        super().__init__(parts, tenants, Incidents(make_file(), _external_id))
        keep_warnings()
        self.tokenizer, self._fixed = tokenizer, fixed_all
        self.loras = LoadedAdapters(kept_loras)

    def open_request(
        self, prompt: Any, params: Any, lora: Any = None, headers: Mapping[str, str] | None = None, chat: bool = False
    ) -> Opened:
        """Check a request's fields. Raises VLLMValidationError, which vLLM answers with HTTP 400.

        headers: of the HTTP request, None from Python code. chat: its prompt is known to be a chat.
        """
        if isinstance(prompt, EngineCoreRequest):
            params = prompt.params  # those are what vLLM runs
        if not isinstance(params, SamplingParams):
            return Opened()
        if _has_images(prompt) and (params.extra_args or {}).get("mem_capture") is not None:
            raise refused(RequestError("mem_capture", "keeps text: a prompt with images, audio or video is more"))
        if isinstance(prompt, AsyncGenerator):
            for field in ("mem_read", "mem_write"):
                if field in (params.extra_args or {}):
                    raise refused(
                        RequestError(field, "streaming inputs have no prefix key that would part their states")
                    )
        fixed_by = self._fixed or fixed(params)
        said = RequestParams(
            params.n,
            self.answering(lora),
            _unfit(prompt),
            fixed_by,
            _prompt_tokens(prompt),
            headers,
            chat,
            bool(params.stop),
        )
        try:
            return self.open(params.extra_args, said)
        except RequestError as error:
            raise refused(error) from None

    def answering(self, lora: Any) -> Adapter | None:
        """Return the LoRA adapter that a request names, which is loaded. lora: None for none."""
        return lora and self.loras.answering(lora.lora_int_id, lora.lora_name, lora.lora_path)

    def carry(self, prompt: Any, params: Any, opened: Opened, place: Place | None = None) -> tuple[Any, Any]:
        """The salted prompt, and a copy of the parameters with what workers, block hashes and the scheduler need."""
        opened.carried = True
        if (payload := self.payload(opened, place)) is not None:  # a plain request carries nothing
            params = copy.copy(params)
            params.extra_args = {**(params.extra_args or {}), CARRIER: encode(payload)}
        if isinstance(prompt, EngineCoreRequest):
            prompt = copy.copy(prompt)
            prompt.sampling_params = params
        return (_salt(prompt, self.identity(opened)) if opened.parts else prompt), params

    def cut_answer(self, opened: Opened, prompt_ids: list[int], params: SamplingParams) -> ContinuedAnswer:
        """The answer, cut into engine requests where its references change."""
        whole = params.max_tokens or sys.maxsize
        every, limit = self.cut(opened, len(prompt_ids), params.max_tokens) or (whole, whole)
        spells = every < limit and params.detokenize and self.tokenizer is not None
        text = AnswerText(self.tokenizer(), prompt_ids, params) if spells else None
        return ContinuedAnswer(prompt_ids, params, every, limit, text)


_INTERNAL_ID = re.compile(r"(?:\d+_)?(.*)-[0-9a-f]{8}", re.DOTALL)


def _external_id(internal_id: str) -> str:
    """The caller's id of a request, of which vLLM makes "<id>-<8 digits>", or "<answer>_<id>-<8 digits>" for several
    answers."""
    found = _INTERNAL_ID.fullmatch(internal_id)
    return found[1] if found else internal_id


def refused(error: RequestError) -> VLLMValidationError:
    count_refusal(error.field)
    return VLLMValidationError(str(error), parameter=error.field)


def count_tokens(output: RequestOutput, kind: RequestOutputKind, before: int) -> int:
    """Tokens generated so far: an output holds the new ones alone (DELTA), or all of them."""
    tokens = len(output.outputs[0].token_ids)
    return before + tokens if kind is RequestOutputKind.DELTA else tokens


def tokens_so_far(output: RequestOutput, kind: RequestOutputKind, before: list[int]) -> list[int]:
    """The answer's tokens: an output holds the new ones alone (DELTA), or all of them."""
    tokens = list(output.outputs[0].token_ids)
    return before + tokens if kind is RequestOutputKind.DELTA else tokens


def add_report(output: RequestOutput, opened: Opened) -> None:
    """What the request saw, in the response's field for KV-related extras; OpenAI's protocol has no other."""
    if (report := opened.report()) is not None:
        extras = dict(output.kv_transfer_params or {})
        output.kv_transfer_params = {**extras, "mem_triton": report}


def ended_by_error(output: RequestOutput) -> RequestOutput:
    """The last output of a whole answer, beside which something failed; its report says what."""
    ended = copy.copy(output)
    ended.outputs = [copy.copy(answer) for answer in output.outputs]
    for answer in ended.outputs:
        answer.finish_reason = "error"
    return ended


def failed(request_id: str, prompt_ids: list[int] | None, reason: str) -> RequestOutput:
    """The last output of a request that ends alone, because its memory could not be had."""
    answer = CompletionOutput(0, "", [], None, None, finish_reason="error")
    report = {"mem_triton": {"error": reason}}
    return RequestOutput(request_id, None, prompt_ids, None, [answer], finished=True, kv_transfer_params=report)


def _unfit(prompt: Any) -> str | None:
    """The kind of prompt that memory cannot serve, None for tokens."""
    if isinstance(prompt, AsyncGenerator):
        return "streaming inputs"
    embeds = prompt.get("prompt_embeds") if isinstance(prompt, dict) else getattr(prompt, "prompt_embeds", None)
    return None if embeds is None else "prompts given as embeddings"


def _prompt_tokens(prompt: Any) -> int | None:
    """How long a rendered prompt is; None while it is text."""
    ids = prompt.get("prompt_token_ids") if isinstance(prompt, dict) else getattr(prompt, "prompt_token_ids", prompt)
    return len(ids) if isinstance(ids, list) else None


def _has_images(prompt: Any) -> bool:
    if isinstance(prompt, dict):
        return prompt.get("type") == "multimodal" or bool(prompt.get("multi_modal_data"))
    return bool(getattr(prompt, "mm_features", None))


def prompt_ids_of(engine: Any, prompt: Any) -> tuple[Any, list[int]]:
    """A prompt in the engine's rendered form, and its tokens."""
    if isinstance(prompt, EngineCoreRequest):
        return prompt, list(prompt.prompt_token_ids or ())
    if not (isinstance(prompt, dict) and "prompt_token_ids" in prompt):
        from vllm.renderers.inputs.preprocess import parse_model_prompt

        renderer = engine.renderer
        parsed = parse_model_prompt(engine.model_config, prompt)
        (prompt,) = renderer.render_cmpl([parsed], renderer.default_cmpl_tok_params)
    return prompt, list(prompt.get("prompt_token_ids") or ())


def with_tokens(prompt: Any, prompt_ids: list[int]) -> Any:
    """The same prompt, continued: its tokens replaced by ``prompt_ids``."""
    if isinstance(prompt, EngineCoreRequest):
        prompt = copy.copy(prompt)
        prompt.prompt_token_ids = prompt_ids
        return prompt
    return {**prompt, "prompt_token_ids": prompt_ids}


def _salt(prompt: Any, key: str | None) -> Any:
    """The prompt with ``key`` folded into its cache salt; a salt of the client's own stays part of it.

    key: None leaves the prompt as it is, unless its salt imitates one that has a key.
    """
    own = prompt.get("cache_salt") if isinstance(prompt, dict) else getattr(prompt, "cache_salt", None)
    if key is None and not (isinstance(own, str) and own.startswith("[")):
        return prompt
    if isinstance(prompt, EngineCoreRequest):
        prompt = copy.copy(prompt)
        prompt.cache_salt = _join(prompt.cache_salt, key)
        return prompt
    if isinstance(prompt, str):
        prompt = {"prompt": prompt}
    elif isinstance(prompt, list):
        prompt = {"prompt_token_ids": prompt}
    if isinstance(prompt, dict):
        return {**prompt, "cache_salt": _join(prompt.get("cache_salt"), key)}
    return prompt  # a stream of inputs: plain requests only, see ``admit``


def _join(salt: str | None, key: str | None) -> str:
    return json.dumps([salt, "mem_triton", key])  # quoted, so that no client salt can imitate a key
