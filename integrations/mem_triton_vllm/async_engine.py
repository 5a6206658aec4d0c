"""``AsyncLLM``, the engine behind ``vllm serve``, with memory."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import uuid
import weakref
from collections.abc import AsyncGenerator
from typing import Any

from vllm.exceptions import GenerationError, RetryableRequestError
from vllm.outputs import RequestOutput
from vllm.sampling_params import SamplingParams
from vllm.v1.engine.async_llm import AsyncLLM

from mem_triton.runtime.frontend.asynchronous import AsyncMemory, Said
from mem_triton.runtime.frontend.continuation import NORMAL_ENDS
from mem_triton.runtime.frontend.memory import MemoryLostError, Opened
from mem_triton.store.pool.loads import MemoryLoadError
from mem_triton.systems.request import RequestError
from mem_triton_vllm import callers, front_end, http_words, weights
from mem_triton_vllm.capture import capture_failed, reading_request, tokens_so_far
from mem_triton_vllm.front_end import VLLMFrontEnd

CHAT = "chatcmpl-"
"""Start of the ids of vLLM's chat requests."""


class AsyncLLMWithMemory(AsyncLLM):
    """Requests may have a session and read a bank. Bad words raise at the call, before any response has begun."""

    SERVES = True  # HTTP requests come in here
    memory: VLLMFrontEnd

    def start_memory(self) -> None:
        """See that no server drops memory's words, and begin to fill the pages of default entries.

        Where no event loop runs yet these are filled with the first request that reads them.
        """
        http_words.install()
        if self.memory.explicit is not None:
            with contextlib.suppress(RuntimeError):
                asyncio.get_running_loop().call_soon(self._waits.start_loads)

    def generate(
        self, prompt: Any, sampling_params: SamplingParams, request_id: str, **kwargs: Any
    ) -> AsyncGenerator[RequestOutput, None]:
        opened = self.memory.open_request(
            prompt, sampling_params, kwargs.get("lora_request"), callers.headers(), request_id.startswith(CHAT)
        )
        stream = self._generate(prompt, sampling_params, request_id, kwargs, opened, begun := [])
        # A stream that nobody ever reads runs no code of its own. One that was read closes its memory itself, and may
        # be gone while its commit is still being written.
        weakref.finalize(stream, lambda memory: begun or memory.close(opened), self.memory)
        return stream

    async def _generate(
        self, prompt: Any, params: SamplingParams, request_id: str, kwargs: dict[str, Any], opened: Opened,
        begun: list[bool],
    ) -> AsyncGenerator[RequestOutput, None]:  # fmt: skip
        begun.append(True)
        self.memory.begin(request_id)
        if opened.reading is None:
            outputs = super().generate(*self.memory.carry(prompt, params, opened), request_id, **kwargs)
        else:
            outputs = self._read_and_generate(prompt, params, request_id, kwargs, opened)
        generated, said = 0, []
        try:
            async for output in outputs:
                self.memory.check(request_id, output.finished)
                generated = front_end.count_tokens(output, params.output_kind, generated)
                if opened.capture is not None:
                    said = tokens_so_far(output, params.output_kind, said)
                if output.finished:
                    read = functools.partial(self._read_capture, prompt)
                    await self._finish(output, opened, generated, Said(output.prompt_token_ids or (), said, read))
                    if opened.capture is not None and opened.capture.error is not None:
                        raise capture_failed(opened.capture, output, params.output_kind)
                yield output  # the last one only after the commit, so that the next request finds the session free
        except MemoryLoadError as error:
            raise GenerationError(str(error)) from None  # HTTP 500, in a stream an error event
        except MemoryLostError as error:
            raise RetryableRequestError(str(error)) from None  # HTTP 503
        finally:
            try:
                await outputs.aclose()  # first: the engine may still read the request's pages
            finally:
                self.memory.close(opened)

    async def _finish(self, output: RequestOutput, opened: Opened, generated: int, said: Said) -> None:
        """Commit, keep and release what the request leaves, and say what it saw."""
        normal = output.outputs[0].finish_reason in NORMAL_ENDS
        await self._waits.end(opened, len(output.prompt_token_ids or ()), generated, normal, said)
        front_end.add_report(output, opened)

    async def _read_capture(self, prompt: Any, ids: list[int], opened: Opened) -> None:
        """Run the engine request that reads what is kept."""
        request = self.memory.carry(*reading_request(prompt, ids), opened)
        async with contextlib.aclosing(super().generate(*request, f"mem_triton-capture-{uuid.uuid4().hex}")) as outputs:
            async for _ in outputs:
                pass

    async def _read_and_generate(
        self, prompt: Any, params: SamplingParams, request_id: str, kwargs: dict[str, Any], opened: Opened
    ) -> AsyncGenerator[RequestOutput, None]:
        """Serve a request that reads a bank, in as many engine requests as its references change."""
        reading = opened.reading
        prompt, prompt_ids = front_end.prompt_ids_of(self, prompt)
        segments = self.memory.segments(opened, prompt_ids, params)
        try:
            await self._waits.claim(reading, prompt_ids)
        except RequestError as error:
            raise front_end.refused(error) from None
        while True:
            await self._waits.fill(reading)
            continued = front_end.with_tokens(prompt, segments.prompt_ids)
            carried = self.memory.carry(continued, segments.params(), opened)
            async with contextlib.aclosing(super().generate(*carried, request_id, **kwargs)) as outputs:
                async for output in outputs:
                    for merged in segments.take(output):
                        yield merged
            if segments.done:
                return
            await self._waits.refresh(reading, len(prompt_ids), segments.generated)

    async def collective_rpc(self, method: Any, *args: Any, **kwargs: Any) -> Any:
        weights.check_call(method, *args, **kwargs)
        return await super().collective_rpc(method, *args, **kwargs)

    async def sleep(self, level: int = 1, *args: Any, **kwargs: Any) -> None:
        weights.check_sleep(level)
        await super().sleep(level, *args, **kwargs)

    @functools.cached_property
    def _waits(self) -> AsyncMemory:
        return AsyncMemory(self.memory, lambda method, *args: self.collective_rpc(f"mem_triton_{method}", args=args))
