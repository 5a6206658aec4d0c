"""The request vocabulary: what is accepted, and errors that name the field and the fix."""

from __future__ import annotations

import pytest
from prometheus_client import REGISTRY

from mem_triton import metrics
from mem_triton.systems.delta_mem.request import SessionRequest
from mem_triton.systems.explicit.request import ReadingRequest
from mem_triton.systems.memoryllm.request import PoolRequest
from mem_triton.systems.registry import count_refusal, parse_request, refusable
from mem_triton.systems.request import MemoryRequest, RequestError


def expected(tenant: str = "", **values) -> MemoryRequest:
    """What fields are read as; those that are not named have their defaults."""
    kinds = {"delta": SessionRequest, "memory": ReadingRequest, "memoryllm": PoolRequest}
    return MemoryRequest(
        tenant,
        {
            system: kind(tenant=tenant, **{n: v for n, v in values.items() if n in kind.__dataclass_fields__})
            for system, kind in kinds.items()
        }
        | {"memo": False},  # no trace
    )


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        (None, expected()),
        ({"top_n_tokens": 3}, expected()),
        ({"mem_session": "alice"}, expected(session="alice")),
        ({"mem_session": "a.b-c_1", "mem_write": 0}, expected(session="a.b-c_1", write=False)),
        ({"mem_session": "alice", "mem_write": True, "mem_reset": 1.0}, expected(session="alice", reset=True)),
        ({"mem_write": False}, expected(write=False)),
        ({"mem_read": 1}, expected(read=True)),
        (
            {"mem_session": "alice", "mem_read": False, "mem_write": 0},
            expected(session="alice", write=False, read=False),
        ),
        ({"mem_ids": "alice"}, expected(ids=("alice",))),
        ({"mem_ids": ["alice", "doc/7:a@2", "alice"]}, expected(ids=("alice", "doc/7:a@2"))),
        ({"mem_ids": []}, expected(ids=())),
        ({"mem_top_k": 0}, expected(top_k=0)),
        ({"mem_top_k": 3.0, "mem_tenant": "acme"}, expected(top_k=3, tenant="acme")),
        ({"mem_capture": "contract"}, expected(capture="contract")),
        ({"mem_pool": ""}, expected(pool="")),
        ({"mem_pool": "main@2", "mem_tenant": "acme"}, expected(pool="main@2", tenant="acme")),
        ({"mem_inject": "new", "mem_fork": "main", "mem_seed": 3.0}, expected(inject="new", fork="main", seed=3)),
    ],
)
def test_accepted(fields, wanted):
    assert parse_request(fields) == wanted


@pytest.mark.parametrize(
    ("fields", "named", "message"),
    [
        ({"mem_pool": "a b"}, "mem_pool", "names no pool"),
        ({"mem_pool": ["main"]}, "mem_pool", "names no pool"),
        ({"mem_inject": ""}, "mem_inject", "must be the name of a pool"),
        ({"mem_inject": "main@2"}, "mem_inject", "must be the name of a pool"),
        ({"mem_fork": "main"}, "mem_fork", "belongs to a write"),
        ({"mem_seed": 0}, "mem_seed", "belongs to a write"),
        ({"mem_inject": "main", "mem_fork": "a/b"}, "mem_fork", "names no pool"),
        ({"mem_inject": "main", "mem_seed": 1.5}, "mem_seed", "must be a whole number"),
        ({"mem_inject": "main", "mem_seed": True}, "mem_seed", "must be a whole number"),
        ({"mem_inject": "main", "mem_seed": float("nan")}, "mem_seed", "must be a whole number"),
        ({"mem_inject": "main", "mem_seed": 2**63}, "mem_seed", "must be a whole number"),
        ({"mem_inject": "main", "mem_pool": ""}, "mem_pool", "does not go together with mem_inject"),
        ({"mem_inject": "main", "mem_session": "a"}, "mem_session", "does not go together with mem_inject"),
        ({"mem_sesion": "a"}, "mem_sesion", 'Did you mean "mem_session"'),
        ({"mem_session": 3}, "mem_session", "letters, digits"),
        ({"mem_session": ""}, "mem_session", "letters, digits"),
        ({"mem_session": "../../etc/passwd"}, "mem_session", "letters, digits"),
        ({"mem_session": ".hidden"}, "mem_session", "starting with a letter"),
        ({"mem_session": "a" * 129}, "mem_session", "1 to 128"),
        ({"mem_session": "a\n"}, "mem_session", "letters, digits"),
        ({"mem_write": "no"}, "mem_write", "must be 0 or 1, got 'no'"),
        ({"mem_write": 2}, "mem_write", "must be 0 or 1"),
        ({"mem_write": [0]}, "mem_write", "must be 0 or 1"),
        ({"mem_read": None}, "mem_read", "must be 0 or 1"),
        ({"mem_session": "a", "mem_read": 0, "mem_write": 1}, "mem_write", "not read is not written"),
        ({"mem_session": "a", "mem_read": 0, "mem_reset": 1}, "mem_reset", "not read is not written"),
        ({"mem_reset": 1}, "mem_reset", "needs mem_session"),
        ({"mem_session": "a", "mem_reset": 1, "mem_write": 0}, "mem_reset", "a reset is a write"),
        ({"mem_ids": 3}, "mem_ids", "must be a list of ids"),
        ({"mem_ids": ["a", 3]}, "mem_ids", "3 is no id"),
        ({"mem_ids": ["a@new"]}, "mem_ids", "'a@new' is no id"),
        ({"mem_ids": ["../x"]}, "mem_ids", "is no id"),
        ({"mem_top_k": -1}, "mem_top_k", "from 0 to 64"),
        ({"mem_top_k": 65}, "mem_top_k", "from 0 to 64"),
        ({"mem_top_k": 1.5}, "mem_top_k", "whole number"),
        ({"mem_top_k": "5"}, "mem_top_k", "whole number"),
        ({"mem_capture": "a@1"}, "mem_capture", "no '@'"),
        ({"mem_capture": ["a"]}, "mem_capture", "1 to 128"),
        ({"mem_tenant": "a b"}, "mem_tenant", "letters, digits"),
        ({"mem_id": ["a"]}, "mem_id", 'Did you mean "mem_ids"'),
        ({"mem_triton": {"state": b"forged"}}, "mem_triton", "reserved"),
    ],
)
def test_refused(fields, named, message):
    with pytest.raises(RequestError, match=message) as error:
        parse_request(fields)
    assert error.value.field == named


HUGE = "x" * 1_000_000


@pytest.mark.parametrize(
    "fields",
    [
        {f"mem_{HUGE}": 1},
        {"mem_write": HUGE},
        {"mem_ids": HUGE},
        {"mem_ids": [HUGE]},
        {"mem_ids": {HUGE: 1}},
        {"mem_top_k": HUGE},
        {"mem_capture": HUGE},
        {"mem_tenant": HUGE},
        {"mem_session": HUGE},
        {"mem_query": HUGE},
        {"mem_ids": ["a"] * 5000},
    ],
)
def test_fault09_messages_are_short_and_labels_come_from_a_closed_set(fields):
    with pytest.raises(RequestError) as refused:
        parse_request(fields)
    assert len(str(refused.value)) <= 1000 and len(refused.value.field) <= 64
    before = REGISTRY.get_sample_value("mem_triton:refusals_total", {"field": "unknown"}) or 0.0
    count_refusal(refused.value.field)
    labels = {s.labels["field"] for metric in metrics.REFUSALS.collect() for s in metric.samples}
    assert labels <= refusable() | {"unknown"}
    if refused.value.field not in refusable():
        assert REGISTRY.get_sample_value("mem_triton:refusals_total", {"field": "unknown"}) == before + 1


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan"), 1e300, -1, 65, 2.5, True, [3], {}])
def test_fault22_numbers_that_are_no_count_are_refused_by_name(value):
    with pytest.raises(RequestError, match="mem_top_k"):
        parse_request({"mem_top_k": value})
