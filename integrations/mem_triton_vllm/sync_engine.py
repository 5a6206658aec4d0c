"""``LLMEngine``, the engine behind ``LLM``, with memory.

It is stepped by its caller. What a request's memory waits for goes on in a loop that each step lets run; the outputs of
the engine's requests are handed to the coroutines that serve them (``generation``).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.outputs import RequestOutput
from vllm.v1.engine.core_client import InprocClient
from vllm.v1.engine.llm_engine import LLMEngine

from mem_triton.runtime.frontend.memory import MemoryLostError, Opened
from mem_triton.runtime.frontend.stepped import PAUSE_SECONDS, SteppedLoop
from mem_triton.store.pool.loads import MemoryLoadError
from mem_triton.systems.lora_users import in_use
from mem_triton.systems.request import RequestError
from mem_triton_vllm import adapters, front_end, weights
from mem_triton_vllm.front_end import VLLMFrontEnd
from mem_triton_vllm.generation import generate
from mem_triton_vllm.service import BARRIER, CALL


@dataclass(eq=False)
class _SteppedRequest:
    """A request with memory, from its submission to its last output. rest: the other arguments of ``add_request``.

    begun: the engine has it, or it waits for what others do too. error: what its caller has to hear at once.
    """

    opened: Opened
    prompt: Any
    prompt_ids: list[int]
    params: Any
    rest: tuple[tuple[Any, ...], dict[str, Any]]
    task: asyncio.Task[None] | None = None
    begun: bool = False
    error: BaseException | None = None
    internal_ids: list[str] = field(default_factory=list)


class LLMEngineWithMemory(LLMEngine):
    """Requests may have memory."""

    SERVES = False
    memory: VLLMFrontEnd

    def start_memory(self) -> None:
        """Tables of the requests with memory."""
        self.memory.barrier, self.memory.between_steps = self._barrier, self._between_steps
        self._loop = SteppedLoop()
        self._running: dict[str, _SteppedRequest] = {}
        self._streams: dict[str, asyncio.Queue[RequestOutput]] = {}  # engine request -> its outputs
        self._ready: list[RequestOutput] = []  # outputs for the caller
        self._errors: list[BaseException] = []  # what the next step raises
        self._external_ids: dict[str, str] = {}  # vLLM's internal request id -> the caller's

    async def _barrier(self) -> None:
        self.collective_rpc(BARRIER)

    async def _between_steps(self, *call: Any) -> list[Any]:
        return self.collective_rpc(CALL, args=call)

    def add_request(
        self,
        request_id: str,
        prompt: Any,
        params: Any,
        arrival_time: float | None = None,
        lora_request: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> str:
        if (lora := adapters.to_load(self.memory.loras, prompt, lora_request)) is not None:
            self.add_lora(lora)
        prompt, lora_request = adapters.settled(prompt, lora_request)
        args = (arrival_time, lora_request, *args)
        opened = self.memory.open_request(prompt, params, lora_request)
        prompt_ids: list[int] = []
        try:
            if not opened.finishes:
                return super().add_request(request_id, *self.memory.carry(prompt, params, opened), *args, **kwargs)
            if opened.waits:
                prompt, prompt_ids = front_end.prompt_ids_of(self, prompt)
        except BaseException:
            self.memory.close(opened)
            raise
        running = _SteppedRequest(opened, prompt, prompt_ids, params, (args, kwargs))
        self._running[request_id] = running
        running.task = self._loop.spawn(self._serve(request_id, running))
        self._loop.run_until(lambda: running.begun or running.task.done())
        if running.error is not None:
            raise running.error
        return running.internal_ids[-1] if running.internal_ids else request_id

    async def _serve(self, request_id: str, running: _SteppedRequest) -> None:
        """Serve one request to its last output."""
        opened = running.opened

        def run(prompt: Any, params: Any, run_id: str) -> AsyncGenerator[RequestOutput, None]:
            return self._run(prompt, params, run_id, running)

        def begin() -> None:
            running.begun = True

        try:
            self.memory.begin(request_id)
            outputs = generate(
                self.memory, run, running.prompt, running.prompt_ids, running.params, request_id, opened, begin
            )
            async for output in outputs:
                failed = output.finished and opened.failure is not None
                self._ready.append(front_end.ended_by_error(output) if failed else output)
        except (MemoryLoadError, MemoryLostError) as error:
            self._ready.append(front_end.failed(request_id, running.prompt_ids or None, str(error)))
        except RequestError as error:
            running.error = front_end.refused(error)
        except asyncio.CancelledError:
            pass  # aborted by the caller
        except BaseException as error:  # vLLM refuses it only now, or is dead: whoever steps it hears of it
            if running.begun:
                self._errors.append(error)
            else:
                running.error = error
        finally:
            self.memory.close(opened)
            self._running.pop(request_id, None)
            for internal_id in running.internal_ids:
                self._external_ids.pop(internal_id, None)

    async def _run(
        self, prompt: Any, params: Any, run_id: str, running: _SteppedRequest
    ) -> AsyncGenerator[RequestOutput, None]:
        """The outputs of one engine request."""
        args, kwargs = running.rest
        stream = self._streams[run_id] = asyncio.Queue()
        finished = False
        try:
            internal_id = super().add_request(run_id, prompt, params, *args, **kwargs)
            running.internal_ids.append(internal_id)
            self._external_ids[internal_id] = run_id
            running.begun = True
            while not finished:
                output = await stream.get()
                finished = output.finished
                yield output
        finally:
            self._streams.pop(run_id, None)
            if not finished:
                super().abort_request([run_id])

    def step(self) -> list[Any]:
        if super().has_unfinished_requests():
            for output in super().step():
                if (stream := self._streams.get(output.request_id)) is not None:
                    stream.put_nowait(output)
                elif output.request_id not in self._running:
                    self._ready.append(self._checked(output))
        elif self._running:
            if isinstance(self.engine_core, InprocClient):
                super().step()  # an engine core that nobody else steps tells its workers who has left
            time.sleep(PAUSE_SECONDS)
        if self._running:
            self._loop.run()
        if self._errors:
            raise self._errors.pop(0)
        outputs, self._ready = self._ready, []
        return outputs

    def _checked(self, output: RequestOutput) -> RequestOutput:
        """A plain request's output; the reason instead if a worker lost what the request had of memory."""
        try:
            self.memory.check(output.request_id, output.finished)
        except MemoryLostError as error:
            if not output.finished:
                super().abort_request([output.request_id])
            return front_end.failed(output.request_id, output.prompt_token_ids, str(error))
        return output

    def collective_rpc(self, method: Any, *args: Any, **kwargs: Any) -> list[Any]:
        weights.check_call(method, *args, **kwargs)
        return super().collective_rpc(method, *args, **kwargs)

    def add_lora(self, lora_request: Any) -> bool:
        if reads := adapters.reads_files(self.memory.loras, lora_request):
            self._check_unused(lora_request.lora_int_id, lora_request.lora_name)
        with self.memory.loras.loading(lora_request.lora_int_id, lora_request.lora_path) as loaded:
            done = super().add_lora(lora_request)
            if reads:
                loaded()
        return done

    def _check_unused(self, key: int, name: str) -> None:
        """Raise VLLMValidationError for an adapter that answers requests in flight: they keep it."""
        inside = (state.lora_request for state in self.output_processor.request_states.values())
        waiting = (one.rest[0][1] for one in self._running.values() if not one.internal_ids)
        if users := sum(lora is not None and lora.lora_int_id == key for lora in (*inside, *waiting)):
            raise VLLMValidationError(in_use(name, users), parameter="lora_request")

    def remove_lora(self, lora_id: int) -> bool:
        self._check_unused(lora_id, str(lora_id))
        removed = super().remove_lora(lora_id)
        self.memory.loras.forget(lora_id)
        return removed

    def sleep(self, level: int = 1, *args: Any, **kwargs: Any) -> None:
        weights.check_sleep(level)
        shutting = self._loop.spawn(self.memory.gate.shut())
        self._loop.run_until(shutting.done)
        shutting.result()
        with self.memory.gate.reopened():
            super().sleep(level, *args, **kwargs)

    def wake_up(self, *args: Any, **kwargs: Any) -> Any:
        woken = super().wake_up(*args, **kwargs)
        if not self.is_sleeping():  # it may wake in parts
            self.memory.gate.open()
        return woken

    def has_unfinished_requests(self) -> bool:
        return bool(self._running) or super().has_unfinished_requests()

    def get_num_unfinished_requests(self) -> int:
        waiting = sum(1 for request_id in self._running if request_id not in self._streams)
        return waiting + super().get_num_unfinished_requests()

    def abort_request(self, request_ids: list[str], internal: bool = False) -> None:
        super().abort_request(request_ids, internal)
        named = [self._external_ids.get(request_id, request_id) for request_id in request_ids]
        aborted = [self._running[request_id] for request_id in named if request_id in self._running]
        for running in aborted:
            running.task.cancel()
            if running.opened.ending is not None:  # what is kept of it was being read: nobody may step this on
                running.opened.ending.cancel()
        if aborted:
            self._loop.run_until(lambda: all(one.task.done() and one.opened.ending is None for one in aborted))
