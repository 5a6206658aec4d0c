"""The words a request may say about its memory, whatever engine carries them.

vLLM carries them in ``vllm_xargs`` (HTTP) or ``SamplingParams.extra_args`` (Python)::

    {"mem_session": "alice"}                     # start from alice's state, commit the state after the last token
    {"mem_session": "alice", "mem_write": 0}     # read alice's last committed state, leave it as it is
    {"mem_session": "alice", "mem_reset": 1}     # forget: start alice from zeros again
    {"mem_write": 0}                             # this request writes no memory (with no session: the plain model)
    {"mem_read": 1}                              # corrected by δ-mem although it names no session
    {"mem_read": 0}                              # the plain model, whatever session it names: no state is touched
    {"mem_ids": ["alice", "paris@2"]}            # attend to these entries of the bank
    {"mem_top_k": 3}                             # three retrieved references a chunk (0: none for this request)
    {"mem_query": "the key of the east door"}    # what references are searched by (a chat's last user message else)
    {"mem_capture": "contract"}                  # keep what this prompt says as an entry of the bank
    {"mem_capture": "contract", "mem_capture_answer": 1, "mem_replace": 1}     # with the answer, in place of an earlier
    {"mem_tenant": "acme"}                       # see acme's entries and sessions besides the public entries
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mem_triton import ids as names
from mem_triton.config import nearest_name_hint

WORDS = (
    "mem_session", "mem_write", "mem_read", "mem_reset", "mem_ids", "mem_top_k", "mem_query", "mem_capture",
    "mem_capture_answer", "mem_replace", "mem_tenant",
)  # fmt: skip
LONGEST_QUERY = 4096
MOST_IDS = 1024
CARRIER = "mem_triton"
"""Key under which the front end hands the resolved request to the workers; clients may not set it."""


LONGEST_MESSAGE = 1000
FIELDS = frozenset({*WORDS, CARRIER, "custom_params"})
"""What a refused request may be at fault in."""


def count_refusal(field: str) -> None:
    """Count a refused request. field: the word at fault; those that nobody knows count as one, clients invent them."""
    from mem_triton import metrics  # not with this module: SGLang says where counts are kept only later

    metrics.REFUSALS.labels(field if field in FIELDS else "unknown").inc()


class RequestError(ValueError):
    """A request that cannot be served as asked; engines answer it with HTTP 400. ``field`` names the word at fault.

    What a client sent is cut in both: it goes into logs and answers.
    """

    def __init__(self, field: str, message: str) -> None:
        field = _cut(field, 64)
        super().__init__(_cut(f"{field}: {message}", LONGEST_MESSAGE))
        self.field = field


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 3]}..."


def _shown(value: Any) -> str:
    """A value of a client's own in a message: what it looks like, and not more of it than a reader needs."""
    return _cut(repr(value if not isinstance(value, (str, bytes)) else value[:200]), 80)


@dataclass(frozen=True)
class MemoryRequest:
    """One request's memory words, checked. session: name or None. write: update the state while generating.

    ids: entries to attend to, None if the request names none (an empty tuple: explicitly no entry).
    top_k: references a chunk, None for the server's setting. capture: name to keep the prompt under, capture_answer:
    with its answer, replace: in place of an earlier capture. tenant: "" is public. query: what references are searched
    by, None for what the prompt says. read: whether its state corrects its answer, None for the server's scope.
    """

    session: str | None = None
    write: bool = True
    reset: bool = False
    ids: tuple[str, ...] | None = None
    top_k: int | None = None
    capture: str | None = None
    tenant: str = ""
    query: str | None = None
    capture_answer: bool = False
    replace: bool = False
    read: bool | None = None


def carried_by(params: Any) -> Mapping[str, Any] | None:
    """What the front end put into a request's sampling parameters (any object with ``extra_args``), None if nothing."""
    return (getattr(params, "extra_args", None) or {}).get(CARRIER)


def _flag(words: Mapping[str, Any], name: str, default: bool) -> bool:
    value = words.get(name, default)
    if value in (0, 1) and isinstance(value, (bool, int, float)):
        return bool(value)
    raise RequestError(name, f"must be 0 or 1, got {_shown(value)}")


def _ids(words: Mapping[str, Any]) -> tuple[str, ...] | None:
    ids = words.get("mem_ids")
    if ids is None:
        return None
    ids = [ids] if isinstance(ids, str) else ids
    if not isinstance(ids, (list, tuple)):
        raise RequestError("mem_ids", f'must be a list of ids like "alice" or "alice@2", got {_shown(ids)}')
    if len(ids) > MOST_IDS:
        raise RequestError("mem_ids", f"names {len(ids)} entries, a request may name {MOST_IDS}")
    found = [_id(id) for id in ids]
    return tuple(dict.fromkeys(found))  # an entry named twice is one memory


def _id(word: Any) -> str:
    if names.split_places(word):
        return word
    if (reference := names.split_reference(word)) is None:
        old = isinstance(word, str) and names.OLD_ID.fullmatch(word.partition("@")[0])
        hint = "; an entry of an older bank gets another id by `mem-triton bank rename`" if old else ""
        raise RequestError(
            "mem_ids", f'{word!r} is no id; ids look like "alice", "alice@2" or, in a document, "alice#0"{hint}'
        )
    id, version = reference
    return id if version is None else f"{id}@{version}"


def _top_k(words: Mapping[str, Any]) -> int | None:
    value = words.get("mem_top_k")
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value not in range(65):
        raise RequestError("mem_top_k", f"must be a whole number from 0 to 64, got {_shown(value)}")
    return int(value)


def _query(words: Mapping[str, Any]) -> str | None:
    value = words.get("mem_query")
    if value is not None and not (isinstance(value, str) and value.strip() and len(value) <= LONGEST_QUERY):
        raise RequestError("mem_query", f"must be text of 1 to {LONGEST_QUERY} characters, got {_shown(value)}")
    return value


def _capture(words: Mapping[str, Any]) -> str | None:
    value = words.get("mem_capture")
    if value is not None and not names.is_id(value):
        raise RequestError("mem_capture", f"must be {names.ID_RULE}, got {_shown(value)}")
    return value


def _tenant(words: Mapping[str, Any]) -> str:
    value = words.get("mem_tenant", "")
    if value != "" and not names.is_name(value):
        raise RequestError("mem_tenant", f"must be {names.NAME_RULE}, got {_shown(value)}")
    return value


def parse_request(extra_args: Mapping[str, Any] | None) -> MemoryRequest:
    """Check the memory words among an engine's extra arguments; words of others pass untouched.

    Raises RequestError naming the word and the fix: unknown ``mem_*`` words, bad values, bad combinations.
    """
    words = extra_args or {}
    if CARRIER in words:
        raise RequestError(CARRIER, "is reserved for mem_triton's own use; remove it from the request")
    for name in words:
        if isinstance(name, str) and name.startswith("mem_") and name not in WORDS:
            raise RequestError(name, "unknown memory word." + nearest_name_hint(name[:64], WORDS))
    session = words.get("mem_session")
    if session is not None and not names.is_name(session):
        raise RequestError("mem_session", f"must be {names.NAME_RULE}")
    request = MemoryRequest(
        session, _flag(words, "mem_write", True), _flag(words, "mem_reset", False), _ids(words), _top_k(words),
        _capture(words), _tenant(words), _query(words), _flag(words, "mem_capture_answer", False),
        _flag(words, "mem_replace", False), _flag(words, "mem_read", True) if "mem_read" in words else None,
    )  # fmt: skip
    for name in ("mem_capture_answer", "mem_replace"):
        if name in words and request.capture is None:
            raise RequestError(name, "needs mem_capture, the name to keep the prompt under")
    if request.reset and session is None:
        raise RequestError("mem_reset", "needs mem_session, the session to reset")
    if request.reset and not request.write:
        raise RequestError("mem_reset", "cannot be combined with mem_write 0: a reset is a write")
    if request.read is False:
        for name in ("mem_reset", "mem_write"):
            if name in words and _flag(words, name, False):
                raise RequestError(name, "cannot be combined with mem_read 0: a state that is not read is not written")
    return request
