"""``AsyncLLM``, the engine behind ``vllm serve``, with memory."""

from __future__ import annotations

import asyncio
import functools
import weakref
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, Any

from vllm.outputs import RequestOutput
from vllm.sampling_params import SamplingParams
from vllm.v1.engine.async_llm import AsyncLLM

from mem_triton.runtime.courier import PageCourier
from mem_triton.runtime.request import RequestError
from mem_triton.runtime.sessions import Lease
from mem_triton_vllm import front_end
from mem_triton_vllm.front_end import MemoryFrontEnd, MemoryLoadError, Opened

if TYPE_CHECKING:
    from mem_triton_vllm.explicit_front_end import Reading

POLL_SECONDS = 0.002


class AsyncLLMWithMemory(AsyncLLM):
    """Requests may have a session and read a bank. Bad words raise at the call, before any response has begun."""

    memory: MemoryFrontEnd

    def start_memory(self) -> None:
        """Nothing to do: the pages of default entries are filled with the first request that reads them."""

    def generate(
        self, prompt: Any, sampling_params: SamplingParams, request_id: str, **kwargs: Any
    ) -> AsyncGenerator[RequestOutput, None]:
        opened = self.memory.open(prompt, sampling_params, kwargs.get("lora_request"))
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
        if opened.reading is None:
            outputs = super().generate(*self.memory.carry(prompt, params, opened), request_id, **kwargs)
        else:
            outputs = self._read_and_generate(prompt, params, request_id, kwargs, opened)
        generated, settled = 0, False  # settled: the lease is closed, or its commit is under way and will close it
        try:
            async for output in outputs:
                generated = front_end.count_tokens(output, params.output_kind, generated)
                if output.finished:
                    await self._finish(output, opened.reading)
                    settled = True
                    await self._settle(output, opened.lease, generated)
                yield output  # the last one only after the commit, so that the next request finds the session free
        finally:
            if not settled:
                self.memory.close(opened)
            await outputs.aclose()

    async def _settle(self, output: RequestOutput, lease: Lease | None, generated: int) -> None:
        sessions = self.memory.sessions
        if lease is None:
            return
        if not sessions.commits(lease, output):
            sessions.abort(lease)
            return
        arguments = sessions.take_arguments(lease, output, generated)
        try:
            parts = await self.collective_rpc(front_end.TAKE_STATE, args=arguments)
        except BaseException:
            sessions.abort(lease)
            raise
        await asyncio.to_thread(sessions.commit, lease, arguments[1], parts)

    async def _read_and_generate(
        self, prompt: Any, params: SamplingParams, request_id: str, kwargs: dict[str, Any], opened: Opened
    ) -> AsyncGenerator[RequestOutput, None]:
        """Serve a request that reads a bank, in as many engine requests as its references change."""
        explicit, reading = self.memory.explicit, opened.reading
        prompt, prompt_ids = front_end.prompt_ids_of(self, prompt)
        await asyncio.to_thread(explicit.retrieve, reading, prompt_ids)
        segments = self.memory.segments(opened, prompt_ids, params)
        try:
            explicit.claim(reading)
        except RequestError as error:
            raise front_end.refused(error) from None
        while True:
            await self._fill(reading)
            continued = front_end.with_tokens(prompt, segments.prompt_ids)
            carried = self.memory.carry(continued, segments.params(), opened)
            outputs = super().generate(*carried, request_id, **kwargs)
            try:
                async for output in outputs:
                    for merged in segments.take(output):
                        yield merged
            finally:
                await outputs.aclose()
            if segments.done:
                return
            await asyncio.to_thread(explicit.refresh, reading, len(prompt_ids), segments.generated)

    async def _fill(self, reading: Reading) -> None:
        """Wait until every page that the request reads is filled; others go on meanwhile."""
        while pending := reading.pending:
            if failure := next((t.state for t in pending if t.state.startswith("failed")), None):
                raise MemoryLoadError(failure)
            if self._carrying.locked():
                await asyncio.sleep(POLL_SECONDS)
            else:
                await self._carry_pages()

    async def _carry_pages(self) -> None:
        """One round of orders and answers; one task at a time does it for all."""
        async with self._carrying:
            if orders := self._courier.orders():
                await self.collective_rpc(front_end.LOAD_PAGES, args=(orders,))
            if self._courier.busy:
                self._courier.settle(await self.collective_rpc(front_end.PAGES_STATE))
        await asyncio.sleep(POLL_SECONDS)

    async def _finish(self, output: RequestOutput, reading: Reading | None) -> None:
        """Keep what the request asked to keep, unpin its pages, and say what it saw."""
        if reading is None:
            return
        explicit = self.memory.explicit
        if reading.capture is not None and output.outputs[0].finish_reason in ("stop", "length"):
            states = await self._captured(reading)
            await asyncio.to_thread(explicit.keep, reading, states)
        explicit.close(reading)
        front_end.add_report(output, reading)

    async def _captured(self, reading: Reading) -> list[dict[str, Any]]:
        files: dict[int, dict[str, Any]] = {}
        while True:
            answers = await self.collective_rpc(front_end.CAPTURE_STATE, args=(reading.capture["lease"],))
            files |= {rank: answer for rank, answer in enumerate(answers) if answer}
            if len(files) == len(answers):
                return list(files.values())
            await asyncio.sleep(POLL_SECONDS)

    @functools.cached_property
    def _courier(self) -> PageCourier:
        return PageCourier(self.memory.explicit.residency)

    @functools.cached_property
    def _carrying(self) -> asyncio.Lock:
        return asyncio.Lock()
