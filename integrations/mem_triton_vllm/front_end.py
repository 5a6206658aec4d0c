"""The front end's half: check a request's memory words, open its session, salt its cache key, commit its last state.

Runs in the process that holds ``AsyncLLM`` (the API server) or ``LLMEngine`` (``LLM``). Everything a worker needs
travels with the request in ``extra_args``; everything a KV cache needs to tell memories apart travels in
``cache_salt``, which vLLM hashes into every block, so prefix caches and KV connectors need no patch of theirs.
"""

from __future__ import annotations

import asyncio
import copy
import functools
import hashlib
import json
import weakref
from collections import deque
from collections.abc import AsyncGenerator
from typing import Any

from vllm.config import VllmConfig
from vllm.exceptions import VLLMValidationError
from vllm.logger import init_logger
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.llm_engine import LLMEngine

from mem_triton.config import MemTritonConfig
from mem_triton.delta_mem import DeltaMemAdapter, load_adapter
from mem_triton.runtime import counters
from mem_triton.runtime.request import CARRIER, RequestError, parse_request
from mem_triton.runtime.sessions import Lease, SessionStore, StateLayout, layer_order
from mem_triton_vllm.refusals import check_engine, check_touch_points, section_of

logger = init_logger("vllm.mem_triton")

TAKE_STATE = "mem_triton_take_state"
"""Worker method, called by name over vLLM's collective RPC."""
NORMAL_ENDS = ("stop", "length")


def model_fingerprint(vllm_config: VllmConfig) -> str:
    """sha256 of the model's architecture and sizes: what a session state must have been made with."""
    fields = vllm_config.model_config.hf_text_config.to_dict()
    sizes = {k: v for k, v in fields.items() if isinstance(v, (int, float, str, list)) and not k.startswith("_")}
    for unstable in ("transformers_version", "dtype", "torch_dtype", "name_or_path"):
        sizes.pop(unstable, None)
    return hashlib.sha256(json.dumps(sizes, sort_keys=True, default=str).encode()).hexdigest()


class MemoryFrontEnd:
    """Opens and closes the memory of each request; one per engine front end.

    Example::

        prompt, params, lease = front_end.open(prompt, params)      # VLLMValidationError -> HTTP 400
    """

    def __init__(self, vllm_config: VllmConfig, config: MemTritonConfig, adapter: DeltaMemAdapter) -> None:
        names = sorted(adapter.layers, key=layer_order)
        layout = StateLayout(
            tuple(names), adapter.config.spec.heads, adapter.config.spec.rank, adapter.fingerprint,
            model_fingerprint(vllm_config),
        )  # fmt: skip
        self.store = SessionStore(layout, config.session_dir, config.max_sessions)
        self._session_obstacle = self._find_session_obstacle(vllm_config)
        self._aborted: deque[str] = deque(maxlen=4096)  # workers forget old states by themselves, too

    @staticmethod
    def _find_session_obstacle(vllm_config: VllmConfig) -> str | None:
        parallel = vllm_config.parallel_config
        if parallel.data_parallel_size > 1:
            return "sessions need --data-parallel-size 1: each data-parallel engine has a front end of its own"
        if getattr(parallel, "_api_process_count", 1) > 1:
            return "sessions need --api-server-count 1: each API server would keep versions of its own"
        if vllm_config.speculative_config is not None:
            return "sessions do not work with speculative decoding: a rejected draft would be committed"
        if vllm_config.model_config.enable_prompt_embeds:
            return "sessions do not work with --enable-prompt-embeds: such prompts have no tokens to count"
        return None

    def open(self, prompt: Any, params: Any) -> tuple[Any, Any, Lease | None]:
        """Prepare one request: (salted prompt, parameters that carry its memory, its lease).

        Parameters are copied, never changed. Raises VLLMValidationError, which vLLM answers with HTTP 400.
        """
        if not isinstance(params, SamplingParams):
            return prompt, params, None
        try:
            request = parse_request(params.extra_args)
            if request.session is not None:
                self._check_session(prompt, params)
            lease = self.store.open(request)
        except RequestError as error:
            counters.REFUSALS.labels(error.field).inc()
            raise VLLMValidationError(str(error), parameter=error.field) from None
        carried: dict[str, Any] = {"write": int(request.write)}
        if request.session is not None:
            carried |= {"lease": lease.id, "state": lease.start.data}
        if carried != {"write": 1}:  # a plain request carries nothing
            params = copy.copy(params)
            params.extra_args = {**(params.extra_args or {}), CARRIER: carried}
        return _salt(prompt, lease.key), params, lease

    def _check_session(self, prompt: Any, params: SamplingParams) -> None:
        if self._session_obstacle:
            raise RequestError("mem_session", self._session_obstacle)
        if params.n != 1:
            raise RequestError("mem_session", f"a session takes one answer at a time: set n to 1, got {params.n}")
        if isinstance(prompt, AsyncGenerator):
            raise RequestError("mem_session", "streaming inputs cannot use a session")

    def abort(self, lease: Lease | None) -> None:
        """End a request that commits nothing; workers forget its state at the next commit."""
        if lease is None:
            return
        if lease.request.session and lease.request.write:
            self._aborted.append(lease.id)
        self.store.close(lease)

    def commits(self, lease: Lease | None, output: RequestOutput) -> bool:
        """Whether this finished output ends a request that writes its session."""
        writes = lease is not None and lease.request.session is not None and lease.request.write
        return writes and output.finished and output.outputs[0].finish_reason in NORMAL_ENDS

    def take_arguments(self, lease: Lease, output: RequestOutput, generated: int) -> tuple[str, int, list[str]]:
        """Arguments of ``TAKE_STATE``: the lease, the position of its last processed token, and leases to forget.

        The last sampled token was never fed to the model, so it is not part of the state.
        """
        forget = list(self._aborted)
        self._aborted.clear()
        prompt_tokens = len(output.prompt_token_ids or ())
        return lease.id, max(prompt_tokens - 1, prompt_tokens + generated - 2), forget

    def commit(self, lease: Lease, position: int, parts: list[dict[str, Any]]) -> None:
        """Put the workers' layers together and commit them. parts: one answer per worker, ranks repeat layers."""
        try:
            layers = {i: part["states"][i] for part in parts for i in part["states"]}
            reached = max(part["position"] for part in parts)
            states = b"".join(layers[str(i)] for i in range(len(self.store.layout.layers)))
            version = self.store.commit(lease, states, tokens=reached + 1)
        except Exception:
            counters.COMMIT_FAILURES.inc()
            raise
        finally:
            self.store.close(lease)
        counters.COMMITS.inc()
        if reached != position:
            counters.LATE_COMMITS.inc()
        logger.debug("session %s: version %d, %d tokens", lease.request.session, version, reached + 1)


class AsyncLLMWithMemory(AsyncLLM):
    """``AsyncLLM`` whose requests may have a session. Bad words raise at the call, before any response has begun."""

    memory: MemoryFrontEnd

    def generate(
        self, prompt: Any, sampling_params: SamplingParams, request_id: str, **kwargs: Any
    ) -> AsyncGenerator[RequestOutput, None]:
        prompt, sampling_params, lease = self.memory.open(prompt, sampling_params)
        outputs = super().generate(prompt, sampling_params, request_id, **kwargs)
        stream = self._generate(outputs, sampling_params, lease, begun := [])
        # A stream that nobody ever reads runs no code of its own. One that was read closes its lease itself, and may be
        # gone while its commit is still being written.
        weakref.finalize(stream, lambda memory: begun or memory.abort(lease), self.memory)
        return stream

    async def _generate(
        self,
        outputs: AsyncGenerator[RequestOutput, None],
        params: SamplingParams,
        lease: Lease | None,
        begun: list[bool],
    ) -> AsyncGenerator[RequestOutput, None]:
        begun.append(True)
        generated, settled = 0, False  # settled: the lease is closed, or its commit is under way and will close it
        try:
            async for output in outputs:
                generated = _count(output, params.output_kind, generated)
                if self.memory.commits(lease, output):
                    arguments = self.memory.take_arguments(lease, output, generated)
                    parts = await self.collective_rpc(TAKE_STATE, args=arguments)
                    settled = True
                    await asyncio.to_thread(self.memory.commit, lease, arguments[1], parts)
                elif output.finished:
                    settled = True
                    self.memory.abort(lease)
                yield output  # the last one only after the commit, so that the next request finds the session free
        finally:
            if not settled:
                self.memory.abort(lease)
            await outputs.aclose()


class LLMEngineWithMemory(LLMEngine):
    """``LLMEngine`` (the engine behind ``LLM``) whose requests may have a session."""

    memory: MemoryFrontEnd

    def add_request(self, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any) -> str:
        prompt, params, lease = self.memory.open(prompt, params)
        try:
            internal_id = super().add_request(request_id, prompt, params, *args, **kwargs)
        except BaseException:
            self.memory.abort(lease)
            raise
        if lease is not None and lease.request.session is not None:
            self._leases[request_id] = (lease, params.output_kind, 0)
            self._external_ids[internal_id] = request_id
        return internal_id

    def step(self) -> list[Any]:
        outputs = super().step()
        for output in outputs:
            if output.request_id not in self._leases:
                continue
            lease, kind, generated = self._leases[output.request_id]
            generated = _count(output, kind, generated)
            self._leases[output.request_id] = (lease, kind, generated)
            if not output.finished:
                continue
            self._forget(output.request_id)
            if self.memory.commits(lease, output):
                arguments = self.memory.take_arguments(lease, output, generated)
                self.memory.commit(lease, arguments[1], self.collective_rpc(TAKE_STATE, args=arguments))
            else:
                self.memory.abort(lease)
        return outputs

    def abort_request(self, request_ids: list[str], internal: bool = False) -> None:
        super().abort_request(request_ids, internal)
        for request_id in request_ids:
            request_id = self._external_ids.get(request_id, request_id)
            if request_id in self._leases:
                self.memory.abort(self._forget(request_id))

    def _forget(self, request_id: str) -> Lease:
        self._external_ids = {i: e for i, e in self._external_ids.items() if e != request_id}
        return self._leases.pop(request_id)[0]

    @functools.cached_property
    def _leases(self) -> dict[str, tuple[Lease, RequestOutputKind, int]]:
        return {}  # request id -> its lease, how its output comes, tokens so far

    @functools.cached_property
    def _external_ids(self) -> dict[str, str]:
        return {}  # vLLM's internal request id -> the caller's


def _count(output: RequestOutput, kind: RequestOutputKind, before: int) -> int:
    """Tokens generated so far: an output holds the new ones alone (DELTA), or all of them."""
    tokens = len(output.outputs[0].token_ids)
    return before + tokens if kind is RequestOutputKind.DELTA else tokens


def install() -> None:
    """Let engines whose configuration has a ``mem_triton`` section become their counterparts with memory.

    Only the two constructors are wrapped; an engine without the section is the stock class, untouched.
    """
    for stock, with_memory in ((AsyncLLM, AsyncLLMWithMemory), (LLMEngine, LLMEngineWithMemory)):
        if not getattr(stock.__init__, "_mem_triton", False):
            stock.__init__ = _checking_init(stock.__init__, with_memory)


def _checking_init(stock_init: Any, with_memory: type) -> Any:
    @functools.wraps(stock_init)
    def __init__(self: Any, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> None:
        config = section_of(vllm_config)
        if config is None:
            return stock_init(self, vllm_config, *args, **kwargs)
        check_touch_points()
        check_engine(vllm_config)
        adapter = load_adapter(config.delta.adapter, config.delta.revision)
        memory = MemoryFrontEnd(vllm_config, config, adapter)
        stock_init(self, vllm_config, *args, **kwargs)
        self.memory, self.__class__ = memory, with_memory

    __init__._mem_triton = True
    return __init__


def _salt(prompt: Any, key: str) -> Any:
    """The prompt with ``key`` folded into its cache salt; a salt of the client's own stays part of it."""
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
    return prompt  # a stream of inputs: plain requests only, see _check_session


def _join(salt: str | None, key: str) -> str:
    return json.dumps([salt, "mem_triton", key])  # quoted, so that no client salt can imitate a key
