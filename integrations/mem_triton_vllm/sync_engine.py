"""``LLMEngine``, the engine behind ``LLM``, with memory.

It is stepped by its caller, so nothing here waits: a request that reads a bank is put off until its pages are filled,
and a step submits those that are ready.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass, field
from typing import Any

from vllm.logger import init_logger
from vllm.outputs import RequestOutput
from vllm.v1.engine.llm_engine import LLMEngine

from mem_triton.runtime.frontend.asynchronous import CAPTURE_SECONDS
from mem_triton.runtime.frontend.continuation import NORMAL_ENDS
from mem_triton.runtime.frontend.memory import Opened
from mem_triton.store.pool.courier import PageCourier
from mem_triton.store.pool.loads import LoadWait, MemoryLoadError
from mem_triton.systems.explicit.captures import Capture
from mem_triton.systems.explicit.searches import Found, Searches
from mem_triton.systems.request import RequestError
from mem_triton_vllm import front_end, weights
from mem_triton_vllm.capture import reading_request, tokens_so_far
from mem_triton_vllm.front_end import VLLMFrontEnd
from mem_triton_vllm.segments import OutputSegments

logger = init_logger("vllm.mem_triton")

POLL_SECONDS = 0.001


@dataclass
class _Running:
    """A request with memory, from its submission to its last output."""

    opened: Opened
    prompt: Any
    params: Any
    rest: tuple[tuple[Any, ...], dict[str, Any]]  # the other arguments of add_request
    prompt_tokens: int = 0
    segments: OutputSegments | None = None  # None: no bank is read
    generated: int = 0
    wait: LoadWait = field(default_factory=LoadWait)
    said: list[int] = field(default_factory=list)  # the answer's tokens, of a request that is captured
    held: RequestOutput | None = None  # the last output, while what is kept is read
    kept: list[int] = field(default_factory=list)  # its tokens


class LLMEngineWithMemory(LLMEngine):
    """Requests may have a session and read a bank."""

    SERVES = False
    memory: VLLMFrontEnd

    def start_memory(self) -> None:
        """Tables of the requests with memory."""
        explicit = self.memory.explicit
        self._courier = PageCourier(explicit.residency) if explicit is not None else None
        self._searches = Searches()
        self._running: dict[str, _Running] = {}
        self._put_off: list[str] = []  # waiting for their pages, in order
        self._external_ids: dict[str, str] = {}  # vLLM's internal request id -> the caller's

    def add_request(self, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any) -> str:
        opened = self.memory.open_request(
            prompt, params, kwargs.get("lora_request", args[1] if len(args) > 1 else None)
        )
        running = _Running(opened, prompt, params, (args, kwargs))
        try:
            if opened.reading is None:
                return self._submit(request_id, running)
            running.prompt, ids = front_end.prompt_ids_of(self, prompt)
            running.prompt_tokens = len(ids)
            explicit, reading = self.memory.explicit, opened.reading
            found = self._searches.wait(explicit.find, reading, ids) if reading.top_k else Found()
            explicit.attach(reading, ids, found)
            running.segments = self.memory.segments(opened, ids, params)
            explicit.claim(reading)
        except RequestError as error:
            self.memory.close(opened)
            raise front_end.refused(error) from None
        except BaseException:
            self.memory.close(opened)
            raise
        self._running[request_id] = running
        self._put_off.append(request_id)
        return request_id

    def _submit(self, request_id: str, running: _Running) -> str:
        prompt, params = running.prompt, running.params
        if running.segments is not None:
            prompt, params = front_end.with_tokens(prompt, running.segments.prompt_ids), running.segments.params()
        args, kwargs = running.rest
        carried = self.memory.carry(prompt, params, running.opened)
        internal_id = super().add_request(request_id, *carried, *args, **kwargs)
        if running.segments is not None or _has_session(running.opened):
            self._running[request_id] = running
            self._external_ids[internal_id] = request_id
        return internal_id

    def step(self) -> list[Any]:
        outputs = self._submit_ready()
        if not super().has_unfinished_requests():
            if self._put_off:
                time.sleep(POLL_SECONDS)
            return outputs
        stepped = super().step()
        lost = self.memory.incidents.lost()
        for output in stepped:
            if (reason := lost.get(output.request_id)) is not None:
                outputs += self._withhold(output, reason)
                continue
            running = self._running.get(output.request_id)
            outputs += [output] if running is None else self._advance(output, running)
        return outputs

    def _withhold(self, output: RequestOutput, reason: str) -> list[RequestOutput]:
        """A request that lost its memory in a worker ends with the reason instead of its answer."""
        if not output.finished:
            super().abort_request([output.request_id])
        reason = f"the engine lost the memory of this request ({reason})"
        if output.request_id in self._running:
            return [self._fail(output.request_id, reason)]
        return [front_end.failed(output.request_id, output.prompt_token_ids, reason)]

    def has_unfinished_requests(self) -> bool:
        return bool(self._put_off) or super().has_unfinished_requests()

    def get_num_unfinished_requests(self) -> int:
        return len(self._put_off) + super().get_num_unfinished_requests()

    def abort_request(self, request_ids: list[str], internal: bool = False) -> None:
        super().abort_request(request_ids, internal)
        for request_id in request_ids:
            request_id = self._external_ids.get(request_id, request_id)
            if request_id in self._running:
                running = self._forget(request_id)
                self.memory.close(running.opened)
                if running.held is not None:
                    self._drop(running.opened.capture)

    def collective_rpc(self, method: Any, *args: Any, **kwargs: Any) -> list[Any]:
        weights.check_call(method, *args, **kwargs)
        return super().collective_rpc(method, *args, **kwargs)

    def sleep(self, level: int = 1, *args: Any, **kwargs: Any) -> None:
        weights.check_sleep(level)
        super().sleep(level, *args, **kwargs)

    def _submit_ready(self) -> list[RequestOutput]:
        """Carry pages one round further and submit what they have made ready; outputs of requests that failed."""
        if self._courier is None:
            return []
        try:
            self._carry_pages()
        except Exception as error:  # an engine that is dead says so in its own step
            logger.exception("mem_triton: pages could not be carried")
            return [
                self._fail(request_id, f"its pages could not be loaded: {error}") for request_id in [*self._put_off]
            ]
        failed = []
        for request_id in list(self._put_off):
            running = self._running[request_id]
            pending = running.opened.reading.pending
            try:
                running.wait.look(pending)
            except MemoryLoadError as error:
                failed.append(self._fail(request_id, str(error)))
                continue
            if not pending:
                self._put_off.remove(request_id)
                try:
                    self._submit(request_id, running)
                except BaseException:  # vLLM refuses it only now; its caller hears of it in ``step``
                    self.memory.close(self._forget(request_id).opened)
                    raise
        return failed

    def _carry_pages(self) -> None:
        """Tell the workers what to load, and hear what they have loaded."""
        if orders := self._courier.orders():
            try:
                self.collective_rpc(front_end.LOAD_PAGES, args=(orders,))
            except BaseException:
                self._courier.undelivered(orders)
                raise
        if self._courier.busy:
            self._courier.settle(self.collective_rpc(front_end.PAGES_STATE, args=(self._courier.heard(),)))

    def _fail(self, request_id: str, reason: str) -> RequestOutput:
        """A request whose memory could not be had ends alone, with the reason in its report."""
        running = self._forget(request_id)
        self.memory.close(running.opened)
        if running.held is not None:  # its answer is whole, and what is kept of it was being read
            return self._not_kept(running, RuntimeError(reason))
        return front_end.failed(request_id, running.segments and running.segments.own_prompt, reason)

    def _advance(self, output: RequestOutput, running: _Running) -> list[RequestOutput]:
        """What the caller sees of one engine output of a request with memory."""
        if running.held is not None:
            return [self._kept(output.request_id)] if output.finished else []
        reading = running.opened.reading
        seen = running.segments.take(output) if running.segments is not None else [output]
        for merged in seen:
            running.generated = front_end.count_tokens(merged, running.params.output_kind, running.generated)
            if running.opened.capture is not None:
                running.said = tokens_so_far(merged, running.params.output_kind, running.said)
        if not output.finished:
            return seen
        if running.segments is not None and not running.segments.done:
            explicit, generated = self.memory.explicit, running.segments.generated
            found = self._searches.wait(explicit.find_next, reading, running.prompt_tokens, generated)
            explicit.refresh(reading, len(generated), found)
            self._put_off.append(output.request_id)
            return seen
        self._forget(output.request_id)
        normal = output.outputs[0].finish_reason in NORMAL_ENDS
        capture = running.opened.capture if normal else None
        if capture is not None:
            capture.watched = True
        try:
            self._finish(seen[-1], running, normal)
        except BaseException:
            if capture is not None:
                self.memory.explicit.captures.discard(capture)
            raise
        if capture is None or not self._read_capture(output.request_id, running, seen[-1]):
            front_end.add_report(seen[-1], running.opened)
            return seen
        return seen[:-1]

    def _finish(self, output: RequestOutput, running: _Running, normal: bool) -> None:
        """Commit the session and unpin the pages. The answer is whole: a commit that fails is a warning beside it."""
        opened, lease, sessions = running.opened, running.opened.lease, self.memory.sessions
        try:
            if normal and lease is not None and sessions.writes(lease):
                arguments = sessions.take_arguments(lease, len(output.prompt_token_ids or ()), running.generated)
                parts = self.collective_rpc(front_end.TAKE_STATE, args=arguments)
                opened.lease = None  # the commit closes it
                try:
                    sessions.commit(lease, arguments[1], parts)
                except Exception as error:  # counted where it happened
                    opened.warnings.append(sessions.not_committed(lease, error))
        finally:
            self.memory.close(opened)

    def _read_capture(self, request_id: str, running: _Running, output: RequestOutput) -> bool:
        """Submit the engine request that reads what is kept, and hold the answer's last output until then.

        False if there is nothing to wait for: the capture has failed.
        """
        capture, captures = running.opened.capture, self.memory.explicit.captures
        try:
            ids = captures.tokens(capture, output.prompt_token_ids or (), running.said)
            request = self.memory.carry(*reading_request(running.prompt, ids), self.memory.open_capture(capture, ids))
            internal_id = super().add_request(request_id, *request)
        except Exception as error:
            captures.failed(capture, error)
            captures.discard(capture)
            output.outputs[0].finish_reason = "error"
            return False
        running.held, running.kept = output, ids
        self._running[request_id] = running
        self._external_ids[internal_id] = request_id
        return True

    def _kept(self, request_id: str) -> RequestOutput:
        """What was kept has been read: make an entry of it. Returns the answer's last output, which was held."""
        running = self._forget(request_id)
        capture, captures = running.opened.capture, self.memory.explicit.captures
        try:
            captures.keep(capture, running.kept, self._captured(capture))
        except Exception as error:
            return self._not_kept(running, error)
        self._drop(capture)
        front_end.add_report(running.held, running.opened)
        return running.held

    def _not_kept(self, running: _Running, error: Exception) -> RequestOutput:
        """The answer of a request whose capture has failed: it ends as an error, with its text and the reason."""
        self.memory.explicit.captures.failed(running.opened.capture, error)
        self._drop(running.opened.capture)
        running.held.outputs[0].finish_reason = "error"
        front_end.add_report(running.held, running.opened)
        return running.held

    def _drop(self, capture: Capture) -> None:
        """Leave nothing of a capture behind, in the workers or on the disk."""
        with contextlib.suppress(Exception):  # workers that cannot be asked are gone
            self.collective_rpc(front_end.DROP_CAPTURES, args=([capture.lease],))
        self.memory.explicit.captures.discard(capture)

    def _captured(self, capture: Capture) -> list[dict[str, Any]]:
        files: dict[int, dict[str, Any]] = {}
        until = time.monotonic() + CAPTURE_SECONDS
        while True:
            answers = self.collective_rpc(front_end.CAPTURE_STATE, args=(capture.lease,))
            files |= {rank: answer for rank, answer in enumerate(answers) if answer}
            if len(files) == len(answers):
                return list(files.values())
            if time.monotonic() > until:
                return [*files.values(), {"error": f"its keys and values were not written in {CAPTURE_SECONDS:.0f} s"}]
            time.sleep(POLL_SECONDS)

    def _forget(self, request_id: str) -> _Running:
        self._external_ids = {i: e for i, e in self._external_ids.items() if e != request_id}
        if request_id in self._put_off:
            self._put_off.remove(request_id)
        return self._running.pop(request_id)


def _has_session(opened: Opened) -> bool:
    return opened.lease is not None and opened.lease.request.session is not None
