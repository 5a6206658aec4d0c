"""``AsyncLLM``, the engine behind ``vllm serve``, with memory."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import weakref
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any

from vllm.exceptions import GenerationError, RetryableRequestError
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

from mem_triton.runtime.frontend.memory import MemoryLostError, Opened
from mem_triton.store.pool.loads import MemoryLoadError
from mem_triton.systems.lora_users import AdapterInUseError, AdapterUsers
from mem_triton.systems.request import RequestError
from mem_triton_vllm import adapters, callers, front_end, http_fields, lora_routes, weights
from mem_triton_vllm.front_end import VLLMFrontEnd
from mem_triton_vllm.generation import generate
from mem_triton_vllm.service import BARRIER, CALL

LOOK_SECONDS = 0.5
"""How often a call that workers have not answered looks whether the engine is alive."""
CHAT = "chatcmpl-"
"""Start of the ids of vLLM's chat requests."""


class NotKeptError(GenerationError):
    """Answered with the HTTP status of what failed beside the answer; in a stream, with an event behind it."""


class AsyncLLMWithMemory(AsyncLLM):
    """Requests may have memory. Bad fields raise at the call, before any response has begun."""

    SERVES = True  # HTTP requests come in here
    memory: VLLMFrontEnd

    def start_memory(self) -> None:
        """See that servers answer for memory's fields and adapters, and begin what every request would wait for.

        Where no event loop runs yet, that begins with the first request that needs it.
        """
        http_fields.install()
        lora_routes.install()
        self._users, self._loads = AdapterUsers(), set()
        self.memory.barrier = functools.partial(self.collective_rpc, BARRIER)
        self.memory.between_steps = self._between_steps
        with contextlib.suppress(RuntimeError):
            asyncio.get_running_loop().call_soon(self.memory.start)

    async def _between_steps(self, *call: Any) -> list[Any]:
        """A call of all workers between two steps. Raises EngineDeadError: vLLM leaves calls of a dead engine open."""
        calling = asyncio.ensure_future(self.collective_rpc(CALL, args=call))
        try:
            while not calling.done():
                await asyncio.wait([calling], timeout=LOOK_SECONDS)
                if self.errored and not calling.done():
                    raise EngineDeadError
            return calling.result()
        finally:
            calling.cancel()

    async def collective_rpc(self, method: Any, *args: Any, **kwargs: Any) -> Any:
        weights.check_call(method, *args, **kwargs)
        return await super().collective_rpc(method, *args, **kwargs)

    async def add_lora(self, lora_request: Any) -> bool:
        with lora_routes.refusals_told():
            return await self._to_its_end(self._load(lora_request.lora_int_id, lambda: lora_request))

    async def _to_its_end(self, loading: Coroutine[Any, Any, bool]) -> bool:
        """A load that goes on if its caller leaves: workers may have read the files by then."""
        task = asyncio.create_task(loading)
        self._loads.add(task)
        task.add_done_callback(self._loads.discard)
        return await asyncio.shield(task)

    async def _load(self, key: int, which: Callable[[], Any]) -> bool:
        """Load an adapter, one at a time under each key, and none in the place of one that requests in flight use.

        which: it, None if it is there by then. Raises RetryableRequestError, HTTP 503 where a request asks for it.
        """
        async with self._users.lock(key):
            if (lora := which()) is None:
                return True
            if reads := adapters.reads_files(self.memory.loras, lora):
                await self._unused(key, lora.lora_name)
            with self.memory.loras.loading(key, lora.lora_path) as loaded:
                done = await super().add_lora(lora)
                if reads:
                    await asyncio.to_thread(loaded)
            return done

    async def _unused(self, key: int, name: str) -> None:
        """Wait until no request uses an adapter."""
        try:
            await self._users.gone(key, name)
        except AdapterInUseError as error:
            raise RetryableRequestError(str(error)) from None

    async def remove_lora(self, lora_id: int) -> bool:
        async with self._users.lock(lora_id):
            await self._unused(lora_id, str(lora_id))
            removed = await super().remove_lora(lora_id)
            self.memory.loras.forget(lora_id)
        return removed

    async def sleep(self, level: int = 1, *args: Any, **kwargs: Any) -> None:
        weights.check_sleep(level)
        await self.memory.gate.shut()
        with self.memory.gate.reopened():
            await super().sleep(level, *args, **kwargs)

    async def wake_up(self, *args: Any, **kwargs: Any) -> Any:
        woken = await super().wake_up(*args, **kwargs)
        if not await self.is_sleeping():  # it may wake in parts
            self.memory.gate.open()
        return woken

    def generate(
        self, prompt: Any, sampling_params: SamplingParams, request_id: str, **kwargs: Any
    ) -> AsyncGenerator[RequestOutput, None]:
        lora = kwargs.get("lora_request")
        if (named := adapters.of_request(prompt, lora)) is not None and (
            self._users.lock(named.lora_int_id).locked()
            or adapters.to_load(self.memory.loras, prompt, lora) is not None
        ):
            return self._loaded_first(named.lora_int_id, prompt, sampling_params, request_id, kwargs)
        prompt, lora = adapters.settled(prompt, lora)
        if lora is not None:
            kwargs["lora_request"] = lora
        opened = self.memory.open_request(prompt, sampling_params, lora, callers.headers(), request_id.startswith(CHAT))
        leave = self._users.enter(named.lora_int_id) if named is not None else _nobody
        stream = self._generate(prompt, sampling_params, request_id, kwargs, opened, leave, begun := [])
        weakref.finalize(stream, leave)
        # A stream that nobody ever reads runs no code of its own. One that was read closes its memory itself, and may
        # be gone while its commit is still being written.
        weakref.finalize(stream, lambda memory: begun or memory.close(opened), self.memory)
        return stream

    async def _loaded_first(
        self, key: int, prompt: Any, params: SamplingParams, request_id: str, kwargs: dict[str, Any]
    ) -> AsyncGenerator[RequestOutput, None]:
        """Serve a request whose adapter is not loaded yet, or is being replaced. Bad fields raise when it is first
        read."""
        named = functools.partial(adapters.to_load, self.memory.loras, prompt, kwargs.get("lora_request"))
        await self._to_its_end(self._load(key, named))
        async with contextlib.aclosing(self.generate(prompt, params, request_id, **kwargs)) as outputs:
            async for output in outputs:
                yield output

    async def _generate(
        self,
        prompt: Any,
        params: SamplingParams,
        request_id: str,
        kwargs: dict[str, Any],
        opened: Opened,
        leave: Callable[[], None],
        begun: list[bool],
    ) -> AsyncGenerator[RequestOutput, None]:
        begun.append(True)
        self.memory.begin(request_id)

        def run(prompt: Any, params: SamplingParams, request_id: str) -> AsyncGenerator[RequestOutput, None]:
            return super(AsyncLLMWithMemory, self).generate(prompt, params, request_id, **kwargs)

        prompt_ids: list[int] = []
        try:
            if opened.waits:
                prompt, prompt_ids = front_end.prompt_ids_of(self, prompt)
            outputs = generate(self.memory, run, prompt, prompt_ids, params, request_id, opened)
            async with contextlib.aclosing(outputs):
                async for output in outputs:
                    if output.finished and opened.failure is not None:
                        raise _not_kept(opened, output, params.output_kind)
                    yield output
        except RequestError as error:
            raise front_end.refused(error) from None
        except MemoryLoadError as error:
            raise GenerationError(str(error)) from None  # HTTP 500, in a stream an error event
        except MemoryLostError as error:
            raise RetryableRequestError(str(error)) from None  # HTTP 503
        finally:
            self.memory.close(opened)
            leave()


def _nobody() -> None:
    """What a request without an adapter leaves."""


def _not_kept(opened: Opened, output: RequestOutput, kind: RequestOutputKind) -> NotKeptError:
    """Make the error for the client: the reason, and the answer if it has not had it."""
    text = output.outputs[0].text if kind is not RequestOutputKind.DELTA else ""
    error = NotKeptError(f"{opened.failure}" + (f". The answer was: {text}" if text else ""))
    error.status_code = opened.failure.status
    return error
