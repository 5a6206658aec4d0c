"""Takes every request of SGLang's HTTP server and of ``Engine`` with memory, in a ``TokenizerManager`` of our own.

A request's fields are answered before the scheduler hears of it: its session is leased, its references are found and
their pages filled. It travels on as an ordinary request, with what workers need among its ``custom_params`` and what
its KV depends on in its ``extra_key``.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import os
import time
import uuid
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Any

from fastapi import HTTPException
from sglang.srt.constants import GPU_MEMORY_ALL_TYPES
from sglang.srt.managers.io_struct import AbortReq, GenerateReqInput
from sglang.srt.managers.utils import is_health_check_generate_req

from mem_triton.config import MemTritonConfig
from mem_triton.runtime.channel import CALL, Client
from mem_triton.runtime.frontend.continuation import NORMAL_ENDS
from mem_triton.runtime.frontend.memory import MemoryFrontEnd, MemoryLostError, Opened
from mem_triton.runtime.incidents import VARIABLE, Incidents
from mem_triton.store.pool.loads import MemoryLoadError
from mem_triton.systems.base import Failure, FrontendServices, Outcome
from mem_triton.systems.params import RequestParams
from mem_triton.systems.payload import Place
from mem_triton.systems.registry import count_refusal
from mem_triton.systems.request import RequestError
from mem_triton_sglang.adapters import KnownAdapters
from mem_triton_sglang.carrier import is_memory_field, packed
from mem_triton_sglang.chat_models import ServesChatModels
from mem_triton_sglang.continuation import ContinuedAnswer, fixed, fixed_by_engine
from mem_triton_sglang.identity import extra_key_of
from mem_triton_sglang.orders import BetweenSteps
from mem_triton_sglang.shape import shape_of
from mem_triton_sglang.weights import FixedWeights

LOOK_SECONDS = 0.5
"""How often a request that waits for its pages looks whether its client is still there."""


class Aborted(Exception):
    """The request was aborted before SGLang's scheduler had it."""


@dataclass
class _Running:
    """A request with memory, from its fields to its last output."""

    obj: GenerateReqInput
    request: Any  # fastapi's, None from ``Engine``
    opened: Opened
    alone: bool = True  # not one of several in one HTTP request
    said: list[int] = field(default_factory=list)  # the answer's tokens, of a request that is captured
    aborted: bool = False
    looked: float = 0.0

    async def look(self) -> None:
        """Raises Aborted, or ValueError as SGLang does when the client has hung up."""
        if self.aborted:
            raise Aborted
        if self.request is None or self.obj.background or time.monotonic() < self.looked + LOOK_SECONDS:
            return
        self.looked = time.monotonic()
        if await self.request.is_disconnected():
            raise ValueError(f"Request is disconnected from the client side; {self.obj.rid} waited for its memory")


class TokenizerManagerWithMemory(FixedWeights, KnownAdapters, ServesChatModels):
    """Requests may have a session and read a bank. Bad fields are ValueErrors, which SGLang answers with HTTP 400."""

    def start_memory(self, config: MemTritonConfig) -> None:
        """Open what is configured. Raises ConfigError naming what does not fit."""
        shape = shape_of(self.server_args, self.model_config)
        client = Client(ranks=shape.tp_size * len(shape.pp_spans))
        services = FrontendServices(
            decode=None if self.tokenizer is None else self.tokenizer.decode,
            render=self.tokenizer and self._render,
            tokenizer=None if self.tokenizer is None else lambda: self.tokenizer,
        )
        incidents = Incidents(Path(os.environ[VARIABLE]))
        call = functools.partial(client.call, CALL)
        self.memory = MemoryFrontEnd.of(config, shape, services, incidents=incidents, call=call)
        self.memory.between_steps = BetweenSteps(client.call, super().generate_request)
        self._running: dict[str, _Running] = {}
        self._released: set[str] = set()  # kinds of device memory that are not there
        self.know_adapters()

    def _render(self, messages: list[dict[str, str]]) -> str:
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    async def generate_request(self, obj: Any, request: Any = None) -> AsyncGenerator[Any, None]:
        if not self._is_concerned(obj):
            stock = super().generate_request(obj, request)
        else:
            obj.normalize_batch_and_arguments()
            stock = self._single(obj, request) if obj.is_single else self._many(obj, request)
        async with contextlib.aclosing(stock) as responses:
            async for response in responses:
                if isinstance(obj, GenerateReqInput):
                    for out in response if isinstance(response, list) else [response]:
                        self._check(out, request is not None and not obj.stream)
                yield response

    def _check(self, out: dict[str, Any], whole: bool = True) -> None:
        """Raise if a worker lost the request's memory: its answer is withheld. whole: HTTP, and no answer has begun."""
        meta = out["meta_info"]
        try:
            self.memory.check(meta["id"], meta["finish_reason"] is not None)
        except MemoryLostError as error:
            super().abort_request(meta["id"])
            if whole:
                raise HTTPException(HTTPStatus.SERVICE_UNAVAILABLE, str(error)) from None
            raise ValueError(str(error)) from None  # SGLang ends a stream with it

    async def release_memory_occupation(self, obj: Any, request: Any = None) -> None:
        await self.memory.gate.shut()
        with self.memory.gate.reopened(unless=lambda: bool(self._released)):
            await super().release_memory_occupation(obj, request)
        self._released |= set(obj.tags or GPU_MEMORY_ALL_TYPES)

    async def resume_memory_occupation(self, obj: Any, request: Any = None) -> None:
        await super().resume_memory_occupation(obj, request)
        self._released -= set(obj.tags or GPU_MEMORY_ALL_TYPES)
        if not self._released:
            self.memory.gate.open()

    def abort_request(self, rid: str = "", abort_all: bool = False) -> None:
        for running in list(self._running.values()) if abort_all else filter(None, [self._running.get(rid)]):
            running.aborted = True
        super().abort_request(rid, abort_all)

    def _is_concerned(self, obj: Any) -> bool:
        """Whether memory has anything to do with this call; the others go SGLang's way, untouched."""
        if not isinstance(obj, GenerateReqInput) or is_health_check_generate_req(obj):
            return False
        if self.memory.concerns_all or self.memory.is_salted:
            return True
        keys = obj.extra_key if isinstance(obj.extra_key, list) else [obj.extra_key]
        if any(extra_key_of(key) != key for key in keys if isinstance(key, str)):
            return True  # it imitates one of ours
        said = obj.sampling_params if isinstance(obj.sampling_params, list) else [obj.sampling_params]
        return any(_speaks(self._with_preferred(params)) for params in said)

    def _with_preferred(self, params: Any) -> dict[str, Any]:
        """A request's sampling parameters over the server's own (``--preferred-sampling-params``)."""
        return {**(self.preferred_sampling_params or {}), **(params if isinstance(params, dict) else {})}

    async def _many(self, obj: GenerateReqInput, request: Any) -> AsyncGenerator[Any, None]:
        """Several prompts, or several answers to each: requests of their own, put together as SGLang does it."""
        parts = []
        for i in range(obj.batch_size):
            for _ in range(obj.parallel_sample_num):
                part = copy.copy(obj[i])
                part.sampling_params = {**part.sampling_params, "n": 1}
                if obj.parallel_sample_num > 1:
                    part.regenerate_rid()
                part.normalize_batch_and_arguments()
                parts.append(part)
        running: list[_Running] = []
        try:
            for part in parts:  # all fields are checked before anything runs
                running.append(self._open(part, request, obj.parallel_sample_num, alone=False))
            generators = [self._run(one) for one in running]
            if obj.stream:
                streams = self._stream_batch_responses(generators, [part.rid for part in parts])
                async with contextlib.aclosing(streams) as responses:
                    async for response in responses:
                        yield response
            else:
                yield await self._collect_batch_responses(generators)
        finally:
            for one in running:  # those that never began, too
                self._close(one)

    async def _single(self, obj: GenerateReqInput, request: Any) -> AsyncGenerator[Any, None]:
        async with contextlib.aclosing(self._run(self._open(obj, request, 1))) as responses:
            async for response in responses:
                yield response

    def _open(self, obj: GenerateReqInput, request: Any, answers: int, alone: bool = True) -> _Running:
        """Check a request's fields. Raises RequestError."""
        obj.sampling_params = self._with_preferred(obj.sampling_params)
        fields = obj.sampling_params.get("custom_params")
        try:
            if fields is not None and not isinstance(fields, dict):
                raise RequestError("custom_params", f"must be an object of names and values, got {fields!r:.80}")
            fixed_by = fixed_by_engine(self.server_args) or fixed(obj, obj.sampling_params)
            asked = RequestParams(
                answers,
                self.answering(obj.lora_path),
                _unfit(obj),
                fixed_by,
                prompt_tokens=None if obj.input_ids is None else len(obj.input_ids),
                headers=None if request is None else getattr(request, "headers", {}),  # None: from ``Engine``
                stops=bool(obj.sampling_params.get("stop") or obj.sampling_params.get("stop_regex")),
            )
            opened = self.memory.open(fields, asked)
        except RequestError as error:
            count_refusal(error.field)
            raise
        if obj.rid in self._running:
            self.memory.close(opened)
            raise ValueError(f"Duplicate request ID detected: {obj.rid}")
        self.memory.begin(obj.rid)
        self._running[obj.rid] = running = _Running(obj, request, opened, alone)
        return running

    def _close(self, running: _Running) -> None:
        if self._running.get(running.obj.rid) is running:
            del self._running[running.obj.rid]
        self.memory.close(running.opened)

    async def _run(self, running: _Running) -> AsyncGenerator[Any, None]:
        """Serve one opened request; its last output comes after its commit, so that the next finds the session free."""
        try:
            async with contextlib.aclosing(self._outputs(running)) as outputs:
                async for out in outputs:
                    if running.opened.reads_answer:
                        news = bool(running.obj.stream) and self.incremental_streaming_output
                        running.said = (running.said if news else []) + list(out["output_ids"])
                    if out["meta_info"]["finish_reason"] is not None:
                        self._check(out, running.request is not None and not running.obj.stream)
                        await self._finish(out, running)
                        self._close(running)  # now: who reads no further may keep this generator for long
                    yield out
        finally:
            self._close(running)

    async def _outputs(self, running: _Running) -> AsyncGenerator[Any, None]:
        obj, opened = running.obj, running.opened
        if opened.unscheduled:
            async for out in self._done(running):
                yield out
            return
        if not opened.waits:
            async with contextlib.aclosing(self._generate(copy.copy(obj), running)) as outputs:
                async for out in outputs:
                    yield out
            return
        answer = None
        try:
            answer = await self._begin(running)
            while not answer.done:
                await self.memory.ready(opened, running.look)
                await running.look()
                async with contextlib.aclosing(self._generate(answer.request(), running, answer.place)) as outputs:
                    async for out in outputs:
                        if (seen := answer.take(out)) is not None:
                            yield seen
                if not answer.done:
                    await self.memory.advance(opened, len(answer.own_prompt), answer.generated)
        except Aborted:
            reason = None
        except MemoryLoadError as error:
            reason = {"type": "abort", "message": str(error), "status_code": HTTPStatus.INTERNAL_SERVER_ERROR}
        else:
            return
        async for out in self._aborted(running, reason):
            yield out if answer is None else answer.take(out)

    async def _begin(self, running: _Running) -> ContinuedAnswer:
        """Find and claim what a request reads, and decide how its answer is cut. Raises ValueError before it runs."""
        obj, opened = running.obj, running.opened
        await self._tokenized(obj)
        self._validate_one_request(obj, obj.input_ids)
        await self._prepared(running)
        obj.input_ids = obj.input_ids[opened.dropped :]
        room = max(1, (self.max_req_input_len or self.context_len) - len(obj.input_ids))  # all of it is a prompt later
        wanted = obj.sampling_params.get("max_new_tokens", self.sampling_params_class().max_new_tokens)
        limit = room if wanted is None else min(wanted, room)
        every, allowed = self.memory.cut(opened, len(obj.input_ids), limit) or (limit, limit)
        if allowed < limit:
            limit, obj.sampling_params = allowed, {**obj.sampling_params, "max_new_tokens": allowed}
        said = {n: obj.sampling_params.get(n) for n in ("skip_special_tokens", "spaces_between_special_tokens")}
        as_asked = {name: value is None or bool(value) for name, value in said.items()}
        decode = self.tokenizer and functools.partial(self.tokenizer.decode, **as_asked)
        return ContinuedAnswer(
            obj, obj.input_ids, every, limit, incremental=self.incremental_streaming_output, decode=decode
        )

    async def _tokenized(self, obj: GenerateReqInput) -> None:
        if obj.input_ids is None:
            obj.input_ids, _ = await self._tokenize_texts(obj.text)
            obj.text = None

    async def _prepared(self, running: _Running) -> None:
        try:
            await self.memory.prepare(running.opened, running.obj.input_ids)
        except RequestError as error:
            count_refusal(error.field)
            raise

    def _generate(
        self, obj: GenerateReqInput, running: _Running, place: Place | None = None
    ) -> AsyncGenerator[Any, None]:
        """One request of SGLang's, with what its workers, its KV's keys and the scheduler need."""
        payload = self.memory.payload(running.opened, place)
        custom = packed(obj.sampling_params.get("custom_params"), payload)
        obj.sampling_params = {**obj.sampling_params, "custom_params": custom}
        carries = payload.systems if payload is not None else ()
        key = self.memory.identity(running.opened, carries)  # plain requests pass by this front end
        obj.extra_key = extra_key_of(obj.extra_key, key, payload)
        return super().generate_request(obj, running.request)

    async def _done(self, running: _Running) -> AsyncGenerator[Any, None]:
        """Give the one output of a request that the engine does not run; what it asks for is done at its end."""
        obj = running.obj
        await self._tokenized(obj)
        await self._prepared(running)
        ended = {"type": "stop", "matched": None}
        async for out in self._ended(running, ended):
            yield out | {"meta_info": {"prompt_tokens": len(obj.input_ids), "cached_tokens": 0, **out["meta_info"]}}

    async def _aborted(self, running: _Running, reason: dict[str, Any] | None) -> AsyncGenerator[Any, None]:
        """The output of a request that ended before the scheduler had it."""
        async for out in self._ended(running, reason):
            yield out

    async def _ended(self, running: _Running, reason: dict[str, Any] | None) -> AsyncGenerator[Any, None]:
        """Make an output of a request that SGLang's scheduler never had, as SGLang makes it."""
        self._init_req_state(running.obj, running.request)
        responses = self._wait_one_response(running.obj, running.request)
        self._handle_abort_req(AbortReq(rid=running.obj.rid, finished_reason=reason))
        async with contextlib.aclosing(responses) as outputs:
            async for out in outputs:
                yield out

    async def _finish(self, out: dict[str, Any], running: _Running) -> None:
        """Commit, keep and release what the request leaves; its last output says what it saw."""
        meta, opened = out["meta_info"], running.opened
        normal = meta["finish_reason"]["type"] in NORMAL_ENDS
        read = functools.partial(self._read_text, running.obj.extra_key)
        prompt_tokens, generated = meta.get("prompt_tokens", 0), meta.get("completion_tokens", 0)
        outcome = Outcome(normal, prompt_tokens, generated, running.obj.input_ids or (), running.said)
        await self.memory.end(opened, outcome, read)
        if (report := opened.report()) is not None:
            meta["mem_triton"] = report
        if opened.failure is not None:
            self._not_kept(out, running, opened.failure)

    async def _read_text(self, client_key: str | None, ids: list[int], opened: Opened) -> None:
        """Run the request that reads what is kept."""
        params = {"max_new_tokens": 1, "temperature": 0.0}
        obj = GenerateReqInput(input_ids=ids, sampling_params=params, rid=uuid.uuid4().hex, extra_key=client_key)
        obj.normalize_batch_and_arguments()
        async with contextlib.aclosing(self._generate(obj, _Running(obj, None, opened))) as outputs:
            async for _ in outputs:
                pass

    def _not_kept(self, out: dict[str, Any], running: _Running, error: Failure) -> None:
        """Say so as SGLang says that a request has failed: by the HTTP status, or in the last output where a stream or
        others' answers would be lost. The answer comes along."""
        if running.request is not None and running.alone and not running.obj.stream:
            answer = f". The answer was: {out['text']}" if out.get("text") else ""
            raise HTTPException(error.status, f"{error}{answer}")
        out["meta_info"]["finish_reason"] = {"type": "abort", "message": str(error), "status_code": error.status}


def _speaks(params: dict[str, Any]) -> bool:
    fields = params.get("custom_params")
    return fields is not None and (not isinstance(fields, dict) or any(map(is_memory_field, fields)))


def _unfit(obj: GenerateReqInput) -> str | None:
    """The kind of request that memory does not serve, None for plain tokens."""
    kinds = {
        "SGLang's own sessions (session_params)": bool(obj.session_params),
        "prompts given as embeddings": obj.input_embeds is not None or obj.positional_embed_overrides is not None,
        "images, audio and video": obj.contains_mm_input(),
        "beam search": (obj.sampling_params.get("beam_width") or 1) > 1,
        "multi-item scoring": obj.multi_item_delimiter_indices is not None or obj.token_indices_to_pool is not None,
    }
    return next((kind for kind, present in kinds.items() if present), None)
