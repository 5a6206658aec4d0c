"""The contract of a memory system: what it adds to configuration and requests, its front-end part and its worker part.

A system is one package. The registry (``registry``) finds it by its configuration section, in this package or, by the
entry-point group ``mem_triton.systems``, in another distribution. Engines know the contract and no system.

The life of a request with memory, in the front end::

    memory = part.admit(fields, params)            # RequestError: HTTP 400, nothing is scheduled
    await part.prepare(memory, prompt_ids, rpc)    # retrieve, claim pages
    await part.ready(memory, alive)                # its pages are filled
    payload = part.payload(memory)                 # travels with the engine's request
    await part.advance(memory, ...)                # new references, where the answer is served in several pieces
    await part.finish(memory, outcome, rpc)        # commit, keep
    part.close(memory)                             # however it ended, harmless twice

and in each worker ``enter``, ``begin_step`` before every forward pass, and ``leave``.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from enum import Enum
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Protocol

from mem_triton.schema import General, Section
from mem_triton.systems.engine import EngineShape
from mem_triton.systems.params import RequestParams
from mem_triton.systems.payload import SystemPayload

if TYPE_CHECKING:
    import torch
    from torch import Tensor


Rpc = Callable[..., Awaitable[list[Any]]]
"""rpc(call, *args): calls a worker part's ``calls[call]`` on every worker; one answer a worker, in their order.

It has no deadline: who waits for what may never come has one."""
Alive = Callable[[], Awaitable[None]]
"""Raises what ends a wait: the client has hung up, or the request was aborted."""


class Capability(Enum):
    """What a system needs of an engine; one that lacks it refuses the system at start, by this description."""

    STATE = "a recurrent state per sequence and corrections around the projections of attention"
    SEGMENTS = "keys and values in attention besides the request's own context"
    LAYER_IO = "the model's decoder layers, hidden states in and out, between two steps"
    CAPTURE = "copies of a request's own keys and values"
    CHAT = "a protocol above chat requests, without a part in the workers"


@dataclass(eq=False, kw_only=True)
class RequestMemory:
    """One request's memory of one system; systems subclass it with what they hold for the request.

    warnings: what went wrong after the answer was whole. failure: why what the request asked for beside its answer was
    not done, with the HTTP status. reads_answer: ``Outcome.answer`` is wanted. waits: it has pages to claim and fill
    before the request runs. finishes: its end has to be seen to. dropped: tokens at the prompt's start that its memory
    has already, and the engine does not read; known when it is prepared. unscheduled: the engine does not run it; its
    answer has no tokens, and comes when its end has been seen to.
    """

    warnings: list[str] = field(default_factory=list)
    failure: Failure | None = None
    reads_answer: bool = False
    waits: bool = False
    finishes: bool = True
    dropped: int = 0
    unscheduled: bool = False

    def report(self) -> dict[str, Any]:
        """Return what the answer says of it."""
        return {}


class Failure(RuntimeError):
    """What a request asked for besides its answer was not done. status: of the HTTP answer."""

    def __init__(self, message: str, status: HTTPStatus = HTTPStatus.INTERNAL_SERVER_ERROR) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Outcome:
    """How a request ended. normal: neither aborted nor failed. prompt_ids, answer: its tokens, () where nobody reads
    them.

    read: runs an engine request of these tokens, with this payload, to its end; None where the engine cannot.
    """

    normal: bool
    prompt_tokens: int
    generated: int
    prompt_ids: Sequence[int] = ()
    answer: Sequence[int] = ()
    read: Callable[[list[int], SystemPayload], Awaitable[None]] | None = None


class FrontendPart:
    """A system in the process that takes requests; one per engine front end. Subclasses override what they need.

    concerns_all: requests that say nothing read this memory, too. corrects_plain: their keys and values depend on what
    the workers do for it, although they carry nothing. between_steps: the calls that all workers answer between the
    same two steps, in the order in which they are made; others overtake each other, and steps.
    """

    concerns_all: bool = False
    corrects_plain: bool = False
    between_steps: frozenset[str] = frozenset()

    def check(self, fields: Any) -> None:
        """Raise RequestError if the fields name what does not exist."""

    def admit(self, fields: Any, params: RequestParams) -> RequestMemory | None:
        """Make the request's memory; None if it has none. Raises RequestError, with nothing scheduled."""
        raise NotImplementedError

    def admit_reading(self) -> RequestMemory | None:
        """Make the memory of an engine request whose text is captured: as little as there can be."""
        return None

    def start(self, rpc: Rpc) -> None:
        """Begin what every request would wait for; engine and event loop run."""

    async def prepare(self, memory: RequestMemory, prompt_ids: Sequence[int], rpc: Rpc) -> None:
        """Find and claim what the request reads. Raises RequestError if it never fits."""

    async def ready(self, memory: RequestMemory, alive: Alive, rpc: Rpc) -> None:
        """Wait until the request can run. Raises MemoryLoadError if it never can."""

    def cut(self, memory: RequestMemory, prompt_tokens: int, max_tokens: int | None) -> tuple[int, int] | None:
        """Return (tokens after which ``advance`` is called, tokens of the whole answer); None for no cut."""
        return None

    async def advance(self, memory: RequestMemory, prompt_tokens: int, generated: Sequence[int], rpc: Rpc) -> None:
        """Change what the coming tokens read, at a cut of the answer."""

    async def finish(self, memory: RequestMemory, outcome: Outcome, rpc: Rpc) -> None:
        """Commit and keep, as the answer is whole. What fails now is a warning or a ``failure``, not an exception."""

    def close(self, memory: RequestMemory) -> None:
        """Release what the request holds, however it ended; harmless twice."""

    def payload(self, memory: RequestMemory) -> SystemPayload | None:
        """Return what its workers need; None for a request like one without fields."""
        return None

    def identity(self, memory: RequestMemory, salted: bool) -> str | None:
        """Return what the request's keys and values depend on, for the engine's salt; None if they are the engine's.

        salted: after an incident, when not even plain requests may find what was cached before.
        """
        return None


@dataclass(frozen=True)
class FrontendServices:
    """What an engine's front end gives to a system's. obstacles: why this engine, as it is configured, cannot serve a
    capability to requests.

    decode: token ids to text; render: messages to the chat template's text; tokenizer: the model's; each None where
    there is none. They may be called as soon as requests come.
    """

    decode: Callable[[list[int]], str] | None = None
    render: Callable[[list[dict[str, str]]], str] | None = None
    tokenizer: Callable[[], Any] | None = None
    obstacles: Mapping[Capability, str] = field(default_factory=dict)


ServedChat = Callable[[dict[str, Any], Any], Awaitable[tuple[int, dict[str, Any]]]]
"""served(body, caller): a chat request to a model of this server, without HTTP; its status and its body, as OpenAI's
API has them. caller: the client's own request, for which it is made. Cancelling it aborts the request."""


@dataclass(frozen=True)
class ChatHost:
    """What an engine's server gives to a chat model. served: asks the server's models. fields_in: where a chat request
    has memory's fields."""

    served: ServedChat
    fields_in: str


class ChatPart:
    """A chat model that a system serves under a name of its own, above the engine's models. model: the name."""

    model: str

    def check(self, body: Mapping[str, Any]) -> None:
        """Raise RequestError for what cannot be answered, before anything is asked."""

    def busy(self) -> str | None:
        """Why a request has to come again later (HTTP 429), None if it can come in."""
        return None

    async def answer(self, body: Mapping[str, Any], caller: Any = None) -> tuple[int, dict[str, Any]]:
        """Answer a request that ``check`` has passed: HTTP status and body. Cancelling it cancels what it asks."""
        raise NotImplementedError

    def stream(self, body: Mapping[str, Any], caller: Any = None) -> AsyncIterator[str]:
        """Answer a request that ``check`` has passed, by server-sent events."""
        raise NotImplementedError

    async def close(self) -> None:
        """Release what the chat model holds, as the server ends."""


@dataclass(frozen=True)
class StepBatch:
    """The coming forward pass. first, last: per row, the positions of its first and its last token in this step."""

    request_ids: Sequence[str]
    first: Sequence[int]
    last: Sequence[int]


class WorkerPart:
    """A system in a worker; made when the model is loaded, before the KV cache is sized.

    calls: what the front end's ``rpc`` reaches, by name; in a thread of their own, while steps run. What takes long is
    a future. Whatever else raises costs the requests concerned their memory.
    """

    calls: Mapping[str, Callable[..., Any]] = {}

    def enter(self, request_id: str, payload: SystemPayload) -> None:
        """Add a request with a payload to the batch; harmless if it is there already."""

    def leave(self, request_id: str) -> None:
        """Remove a request from the batch, finished or preempted; its KV is still its own."""

    def begin_step(self, step: StepBatch) -> Mapping[str, Exception]:
        """Write the coming step's tables. Returns whose memory cannot be shown, and why."""
        return {}

    def forget_rows(self) -> None:
        """Clear the tables of the coming step, which could not be written: no row has memory."""

    def drop_request(self, request_id: str) -> None:
        """Drop a request that lost its memory: it goes on without, and nothing of it is kept."""

    def __contains__(self, request_id: object) -> bool:
        """Whether a request in the batch has memory of its own here."""
        return False

    def segments(self, layer: int) -> LayerSegments | None:
        """Return what an attention layer reads besides its context, by its index in the model; None if nothing."""
        return None

    def describe(self) -> str:
        """Describe the memory in one line, for the log."""
        return type(self).__name__


Adapter = Mapping[str, "tuple[Tensor, Tensor]"]
"""A layer's linears, such as "self_attn.q_proj", with (down [r, in], up [out, r]), whole: ``up @ down`` is added."""


class LayerIO(Protocol):
    """A model's own decoder layers, for calls between two steps (``FrontendPart.between_steps``), alike on all ranks.

    They run beside the engine's batches: without KV cache, without what others have put on them.
    """

    def embed(self, ids: Sequence[int]) -> Tensor:
        """Return the input embeddings [T, d] of tokens."""

    def run(self, layer: int, hidden: Tensor, adapter: Adapter) -> Tensor:
        """Run a layer on hidden rows [T, d] at positions 0...T-1, causal. adapter: added to its linears."""

    def project(self, layer: int, rows: Tensor, adapter: Adapter) -> tuple[Tensor, Tensor]:
        """Keys before RoPE and values, [Hkv, T, D] of this rank, that a layer makes of its input rows [T, d].

        adapter: added to its linears."""

    def normed(self, layer: int, rows: Tensor) -> Tensor:
        """Normalise a layer's input rows [T, d] by its first norm."""

    def watch(self, layer: int, seen: Callable[[Tensor], None]) -> None:
        """Call ``seen`` in each step with the layer's rows [T, d] behind its first norm, before its attention runs.

        Raises ConfigError where the engine runs layers in a way that cannot be watched.
        """


class LayerSegments(Protocol):
    """What one attention layer reads besides its context."""

    def read(self, rows: int) -> dict[str, Any]:
        """Fields of ``ops.memory_attention.AttentionCall`` for a batch of ``rows`` rows, padding included."""


@dataclass(frozen=True)
class WorkerHost:
    """What an engine's worker gives to a system's.

    layers: this rank's attention layers, by their index in the model. tp_rank: among the ranks that split heads; rank:
    among all. deterministic: rows must not depend on their batch. chat: its server can serve a system's chat model.
    read_kv: (request id, layer, tokens) -> copies of its keys, with their rotation, and values, [Hkv, tokens, D].
    attach_states: gives each layer of an adapter its state and corrections. layer_io: the model's decoder layers;
    raises ConfigError for a model whose layers are not known. lose: (error, everybody) costs the requests
    of the step that runs their memory, everybody's or that of the requests which have some.
    exclusive: no step begins inside, and what is queued joins the forward passes' stream; on_stream: the latter alone.
    """

    layers: Sequence[int]
    tp_rank: int
    rank: int
    device: torch.device
    lose: Callable[[BaseException, bool], None]
    exclusive: Callable[[], AbstractContextManager[Any]]
    on_stream: Callable[[], AbstractContextManager[Any]]
    read_kv: Callable[[str, int, int], tuple[Tensor, Tensor]] | None = None
    attach_states: Callable[..., Any] | None = None
    layer_io: Callable[[], LayerIO] | None = None
    deterministic: bool = False
    chat: bool = False

    @property
    def capabilities(self) -> frozenset[Capability]:
        """What this engine has."""
        has = {Capability.SEGMENTS}
        if self.attach_states is not None:
            has.add(Capability.STATE)
        if self.read_kv is not None:
            has.add(Capability.CAPTURE)
        if self.layer_io is not None:
            has.add(Capability.LAYER_IO)
        if self.chat:
            has.add(Capability.CHAT)
        return frozenset(has)


class MemorySystem:
    """Describes a memory system to the registry; holds no state.

    name: its configuration section, and its name in payloads, worker calls and messages. title: for people. fields: its
    request fields, with what each means. requires: what it needs of an engine's workers.
    """

    name: str
    title: str
    Config: type[Section]
    fields: Mapping[str, str]
    requires: frozenset[Capability] = frozenset()

    def parse(self, fields: Mapping[str, Any], tenant: str) -> Any:
        """Check a request's fields, and give what ``admit`` takes. Raises RequestError naming the field and the fix."""
        raise NotImplementedError

    def frontend(self, config: General, engine: EngineShape, services: FrontendServices) -> FrontendPart:
        """Make its front-end part. Raises ConfigError for what cannot work, before the start."""
        raise NotImplementedError

    def worker(self, config: General, engine: EngineShape, host: WorkerHost) -> WorkerPart | None:
        """Make its part of a worker; None where it has none. Raises ConfigError for what cannot work."""
        raise NotImplementedError

    def chat(self, config: General, host: ChatHost) -> ChatPart | None:
        """Make its chat model, for a system that needs CHAT."""
        return None


def missing(requires: Iterable[Capability], capabilities: Iterable[Capability]) -> list[str]:
    """Name what is required and not there."""
    return [c.value for c in Capability if c in set(requires) - set(capabilities)]
