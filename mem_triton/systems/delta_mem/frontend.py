"""Leases a request's session and commits its last state: δ-mem's front-end part.

Workers keep no session: the state that a request starts from travels with it, and its last state is fetched when it has
ended normally.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from mem_triton import metrics
from mem_triton.schema import General
from mem_triton.systems.base import FrontendPart, Outcome, RequestMemory, Rpc
from mem_triton.systems.delta_mem.adapter import DeltaMemAdapter
from mem_triton.systems.delta_mem.request import SessionRequest
from mem_triton.systems.delta_mem.section import Scope
from mem_triton.systems.delta_mem.sessions import Lease, SessionStore, SessionWriteError, StateLayout, layer_order
from mem_triton.systems.engine import EngineShape
from mem_triton.systems.lora import Adapter
from mem_triton.systems.params import RequestParams
from mem_triton.systems.payload import StateRef, SystemPayload
from mem_triton.systems.request import RequestError
from mem_triton.systems.served_model import served

STATE_SECONDS = 60.0
"""Seconds that an answer waits for its state, before its session is not committed."""
LONGEST_NAME = 200
"""Characters of a session's name with its tenant's: file systems take 255 bytes."""


@dataclass(eq=False)
class SessionMemory(RequestMemory):
    """lease: the request's hold on its session, or on a memory that starts empty; None when it has ended.

    lora: the LoRA adapter that answers it, None for none.
    """

    lease: Lease | None = None
    lora: Adapter | None = None


class SessionFrontEnd(FrontendPart):
    """Opens and closes the session of each request; one per engine front end.

    obstacle: why this engine, as it is configured, cannot have sessions; None if it can. scope: the requests that the
    adapter corrects where they do not say themselves.
    """

    scope: Scope = "all"
    corrects_plain = True

    def __init__(
        self, shape: EngineShape, config: General, adapter: DeltaMemAdapter, obstacle: str | None = None
    ) -> None:
        names = sorted(adapter.layers, key=layer_order)
        layout = StateLayout(
            tuple(names),
            adapter.config.spec.heads,
            adapter.config.spec.rank,
            adapter.fingerprint,
            shape.architecture_fingerprint,
            served(shape) if config.session_dir is not None else {},
        )
        self.store = SessionStore(layout, config.session_dir, config.max_sessions)
        self.obstacle, self.scope = obstacle, adapter.scope
        self._aborted: deque[str] = deque(maxlen=4096)  # workers forget old states by themselves, too
        self._logger = logging.getLogger(f"{shape.engine.lower()}.mem_triton")

    def admit(self, fields: SessionRequest, params: RequestParams) -> SessionMemory:
        """Plain requests have a lease, too, of a memory that starts empty."""
        lease = self.open(fields, params)
        return SessionMemory(lease=lease, lora=params.lora, finishes=lease.request.session is not None)

    def admit_reading(self) -> SessionMemory:
        """A request whose tokens write no state and are corrected by none but an empty one."""
        return self.admit(SessionRequest(write=False), RequestParams())

    def open(self, request: SessionRequest, params: RequestParams) -> Lease:
        """The request's lease. Raises RequestError.

        One that is not read leases no session: its state stays empty.
        """
        by_scope = self.scope == "all" or request.session is not None
        if not (by_scope if request.read is None else request.read):
            request = replace(request, session=None, write=False, reset=False)
        if request.session is not None:
            request = _of_tenant(request)
            if self.obstacle:
                raise RequestError("mem_session", self.obstacle)
            if params.answers != 1:
                raise RequestError(
                    "mem_session", f"a session takes one answer at a time: set n to 1, got {params.answers}"
                )
            if params.unfit:
                raise RequestError("mem_session", f"{params.unfit} cannot use a session")
        named = {} if params.lora is None else {"lora": params.lora.identity, "load": params.lora.load}
        return self.store.open(request, **named)

    def payload(self, memory: SessionMemory) -> SystemPayload | None:
        """The state to start from; None for a plain request."""
        lease = memory.lease
        if self.is_plain(lease):
            return None
        if lease.request.session is None:
            return SystemPayload(state=StateRef(write=lease.request.write))
        return SystemPayload(state=StateRef(lease.id, lease.start.data, lease.request.write))

    def identity(self, memory: SessionMemory, salted: bool) -> str | None:
        """The adapter and the state; None for a request that no state corrects, where the scope leaves plain requests
        to the engine: its KV is the engine's own."""
        if memory.lease is None:
            return None
        stock = self.scope == "sessions" and self.is_plain(memory.lease)
        return None if stock and not salted else memory.lease.key

    async def finish(self, memory: SessionMemory, outcome: Outcome, rpc: Rpc) -> None:
        """Commit the session. One that cannot be committed is a warning beside the answer."""
        lease = memory.lease
        if not outcome.normal or lease is None or not self.writes(lease):
            return
        if memory.lora is not None and not memory.lora.holds():
            changed = SessionWriteError("its LoRA adapter was loaded anew, or its files changed, while it answered")
            metrics.COMMIT_FAILURES.inc()
            memory.warnings.append(self.not_committed(lease, changed))
            return
        arguments = self.take_arguments(lease, outcome.prompt_tokens, outcome.generated)
        try:
            parts = await asyncio.wait_for(rpc("take_state", *arguments), STATE_SECONDS)
        except Exception as error:  # the answer is whole all the same
            metrics.COMMIT_FAILURES.inc()
            memory.warnings.append(self.not_committed(lease, error))
            return
        memory.lease = None  # the commit closes it
        try:
            await asyncio.to_thread(self.commit, lease, arguments[1], parts)
        except Exception as error:  # counted where it happened
            memory.warnings.append(self.not_committed(lease, error))

    def close(self, memory: SessionMemory) -> None:
        lease, memory.lease = memory.lease, None
        if lease is not None:
            self.abort(lease)

    def abort(self, lease: Lease) -> None:
        """End a request that commits nothing; workers forget its state at the next commit."""
        if self.writes(lease):
            self._aborted.append(lease.id)
        self.store.close(lease)

    def is_plain(self, lease: Lease) -> bool:
        """Whether the request's memory is that of requests that say nothing: a state of its own, or none."""
        return lease.request.session is None and lease.request.write == (self.scope == "all")

    def writes(self, lease: Lease) -> bool:
        """Whether the request commits its session when it ends normally."""
        return lease.request.session is not None and lease.request.write

    def take_arguments(self, lease: Lease, prompt_tokens: int, generated: int) -> tuple[str, int, list[str]]:
        """Arguments of the workers' ``take_state``: the lease, the position of its last processed token, and leases to
        forget.

        The last sampled token was never fed to the model, so it is not part of the state.
        """
        forget = list(self._aborted)
        self._aborted.clear()
        return lease.id, max(prompt_tokens - 1, prompt_tokens + generated - 2), forget

    def not_committed(self, lease: Lease, error: Exception) -> str:
        """What an answer says whose session could not be committed."""
        warning = (
            f'mem_session "{lease.request.session}" was not committed and is as it was before this request: '
            f"{type(error).__name__}: {str(error)[:300]}"
        )
        self._logger.error("%s", warning)
        return warning

    def commit(self, lease: Lease, position: int, parts: Sequence[dict[str, Any]]) -> None:
        """Put the workers' layers together and commit them; closes the lease. parts: one answer per worker, ranks
        repeat layers."""
        try:
            layers = {i: part["states"][i] for part in parts for i in part["states"]}
            reached = max(part["position"] for part in parts)
            states = b"".join(layers[str(i)] for i in range(len(self.store.layout.layers)))
            version = self.store.commit(lease, states, tokens=reached + 1)
        except Exception:
            metrics.COMMIT_FAILURES.inc()
            raise
        finally:
            self.store.close(lease)
        metrics.COMMITS.inc()
        if reached != position:
            metrics.LATE_COMMITS.inc()
        self._logger.debug("session %s: version %d, %d tokens", lease.request.session, version, reached + 1)


def _of_tenant(request: SessionRequest) -> SessionRequest:
    """The request with its session's name in the tenant's namespace, "acme:alice"; no name of a session or a tenant has
    a colon. Raises RequestError for a name that is too long for a file."""
    if not request.tenant:
        return request
    name = f"{request.tenant}:{request.session}"
    if len(name) > LONGEST_NAME:
        raise RequestError(
            "mem_session", f"with mem_tenant its name has {len(name)} characters, at most {LONGEST_NAME} are possible"
        )
    return replace(request, session=name)
