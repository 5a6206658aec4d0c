"""What keys of KV caches must tell apart: adapter, state, bank and the pool's precision (fault 29).

Each of these can be taken out of its key without any request failing: it would read another one's KV blocks.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from mem_triton.config import MemTritonConfig
from mem_triton.store.bank import Bank
from mem_triton.systems.delta_mem.frontend import SessionFrontEnd
from mem_triton.systems.delta_mem.request import SessionRequest
from mem_triton.systems.delta_mem.sessions import CommittedState, SessionStore, StateLayout
from mem_triton.systems.engine import EngineShape
from mem_triton.systems.explicit import plans as module
from mem_triton.systems.explicit.frontend import ExplicitFrontEnd
from mem_triton.systems.explicit.layout import layout_of
from mem_triton.systems.explicit.section import MemorySection
from mem_triton.systems.params import RequestParams
from mem_triton.systems.registry import parse_request
from tests.store.bank_case import DIM, HEADS, entry, spec

SHAPE = EngineShape(
    engine="test",
    model="m",
    revision=None,
    hf_config={},
    dtype=torch.bfloat16,
    hidden=64,
    heads=4,
    kv_heads=HEADS,
    head_dim=DIM,
    tp_size=1,
    pp_spans=((0, 6),),
    max_requests=4,
    max_step_tokens=640,
    max_model_len=4096,
)
POOL = 2**-10  # GiB


@pytest.fixture
def banks(tmp_path):
    """Two banks that differ in nothing but in being two."""
    made = [Bank.create(tmp_path / name, spec()) for name in ("one", "other")]
    for bank in made:
        bank.add([entry("alice", 1)])
    yield made
    for bank in made:
        bank.close()


def carried_bank(bank: Bank, monkeypatch, dtype: str = "auto", shape: EngineShape = SHAPE) -> str:
    """What a request that reads ``alice@1`` carries as its bank."""
    monkeypatch.setattr(module, "open_bank", lambda shape, section: bank)
    front = ExplicitFrontEnd(shape, MemorySection(bank=str(bank.path), pool_gib=POOL, pool_dtype=dtype), None)
    reading = front.admit(parse_request({"mem_ids": ["alice"]}).systems["memory"], RequestParams())
    front.claim(reading)
    payload = front.payload(reading)
    assert list(payload.pages) == ["alice@1"]
    return payload.key


def test_fault29_requests_of_two_banks_share_no_kv(banks, monkeypatch):
    one, other = (carried_bank(bank, monkeypatch) for bank in banks)
    assert one and other and one != other
    assert carried_bank(banks[0], monkeypatch) == one, "the same bank keeps its key, so that prefixes are shared"


def test_fault29_pools_of_another_precision_share_no_kv(banks, monkeypatch):
    keys = [carried_bank(banks[0], monkeypatch, dtype) for dtype in ("auto", "int8", "fp8")]
    keys.append(carried_bank(banks[0], monkeypatch, shape=replace(SHAPE, dtype=torch.float16)))
    assert len(set(keys)) == 4
    section = MemorySection(bank="b", pool_gib=POOL)
    assert layout_of(SHAPE, section, banks[0].spec).cache_key(banks[0]) == keys[0]


def session_key(fingerprint: str) -> str:
    """The key of a request to a front end that serves an adapter with this fingerprint."""
    adapter = SimpleNamespace(
        layers={"model.layers.0.self_attn": None},
        fingerprint=fingerprint,
        scope="all",
        config=SimpleNamespace(spec=SimpleNamespace(heads=2, rank=4)),
    )
    return SessionFrontEnd(SHAPE, MemTritonConfig(), adapter).open(SessionRequest("alice"), RequestParams()).key


def test_fault29_two_adapters_share_no_kv():
    assert session_key("a" * 64) != session_key("b" * 64)
    assert session_key("a" * 64) == session_key("a" * 64), "the same adapter keeps its key"


def test_fault29_two_states_under_one_name_and_number_share_no_kv():
    store = SessionStore(StateLayout(("model.layers.0.self_attn",), 2, 4, "a" * 64, "m" * 64))
    keys = {store._key(SessionRequest("alice"), CommittedState(1, data), "") for data in (b"one", b"other", None)}
    assert len(keys) == 3
