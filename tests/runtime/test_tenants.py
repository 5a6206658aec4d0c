"""Whom a request speaks for: its API key's tenant, a proxy's, or whatever it says where nothing binds it."""

from __future__ import annotations

import hashlib
import hmac
from types import SimpleNamespace

import pytest
from starlette.datastructures import Headers

from mem_triton.config import ConfigError, parse_config
from mem_triton.runtime.frontend.memory import MemoryFrontEnd
from mem_triton.runtime.frontend.tenants import Tenants
from mem_triton.systems.delta_mem.frontend import SessionFrontEnd
from mem_triton.systems.delta_mem.sessions import SessionStore, StateLayout
from mem_triton.systems.params import RequestParams
from mem_triton.systems.registry import parse_request
from mem_triton.systems.request import RequestError
from tests.support.front import front_end

HASHED = "sha256:" + hashlib.sha256(b"globex-key").hexdigest()


@pytest.fixture
def tenants(monkeypatch):
    monkeypatch.setenv("ACME_KEY", "acme-key")
    return made(keys={"env:ACME_KEY": "acme", HASHED: "globex"})


def made(**section) -> Tenants:
    return Tenants(parse_config({"delta": {"adapter": "a"}, "tenants": section}).tenants)


def bearer(key: str) -> Headers:
    return Headers({"Authorization": f"Bearer {key}"})


def bound(tenants: Tenants, headers, said: str = "") -> str:
    return tenants.bind(said, headers)


def test_fault08_a_key_says_whom_a_request_speaks_for(tenants):
    assert bound(tenants, bearer("acme-key")) == bound(tenants, bearer("acme-key"), "acme") == "acme"
    assert bound(tenants, bearer("globex-key")) == "globex"
    assert bound(tenants, Headers({"authorization": "bearer acme-key"})) == "acme"


@pytest.mark.parametrize(
    "headers", [bearer("acme-key"), bearer("other"), Headers(), Headers({"Authorization": "acme-key"})]
)
def test_fault08_no_request_speaks_for_a_tenant_that_is_not_its_own(tenants, headers):
    with pytest.raises(RequestError, match="mem_tenant: ") as error:
        bound(tenants, headers, "globex")
    assert "acme" not in str(error.value)


@pytest.mark.parametrize(
    "headers", [bearer("other"), bearer(""), Headers(), Headers({"Authorization": "Basic acme-key"})]
)
def test_fault08_a_request_without_a_known_key_sees_what_is_public(tenants, headers):
    assert bound(tenants, headers) == ""


def test_fault08_every_key_is_compared_in_constant_time(tenants, monkeypatch):
    compared, stock = [], hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: (compared.append(b), stock(a, b))[1])
    assert bound(tenants, bearer("acme-key")) == "acme" and bound(tenants, bearer("none")) == ""
    assert compared == 2 * list(tenants._keys), "all of them, the first right one, too"


def test_fault08_a_trusted_header_says_it_once():
    tenants = made(header="X-Tenant")
    assert bound(tenants, Headers({"x-tenant": "acme"})) == "acme" and bound(tenants, Headers()) == ""
    twice = Headers(raw=[(b"x-tenant", b"acme"), (b"x-tenant", b"globex")])
    for headers, message in ((twice, "2 times"), (Headers({"x-tenant": "a:b"}), "must name")):
        with pytest.raises(RequestError, match=message):
            bound(tenants, headers)
    with pytest.raises(RequestError, match="mem_tenant"):
        bound(tenants, Headers({"x-tenant": "acme"}), "globex")


def test_fault08_without_a_binding_and_in_python_a_tenant_is_a_label(tenants):
    assert bound(Tenants(None), Headers(), "acme") == bound(tenants, None, "acme") == "acme"


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"keys": {"sk-in-plain-text": "acme"}}, r"tenants\.keys: key 1 is neither"),
        ({"keys": {"env:ACME_KEY": "a b"}}, r"tenants\.keys: tenant 'a b'"),
        ({"keys": {}}, r'tenants\.keys: must be an object like \{"env:ACME_KEY"'),
        ({"keys": {"env:ACME_KEY": 3}}, r"tenants\.keys: tenant 3"),
        ({}, r"tenants: needs keys or header"),
        ({"keys": {"env:ACME_KEY": "acme"}, "header": "X-Tenant"}, "and not both"),
        ({"header": "X Tenant"}, r"tenants\.header"),
        ({"heder": "X-Tenant"}, r'tenants\.heder: unknown key\. Did you mean "header"'),
        ({"keys": {"env:MEM_TRITON_NOT_SET": "acme"}}, "MEM_TRITON_NOT_SET is not set"),
        ({"keys": {HASHED: "acme", HASHED.upper().replace("SHA256", "sha256"): "globex"}}, "also another tenant's"),
    ],
)
def test_fault08_a_bad_binding_is_refused_at_the_start_and_shows_no_key(section, message):
    with pytest.raises(ConfigError, match=message) as error:
        made(**section)
    assert "plain-text" not in str(error.value)


@pytest.fixture
def memory(tenants, tmp_path):
    sessions = object.__new__(SessionFrontEnd)  # no adapter on disk
    sessions.store = SessionStore(StateLayout(("l",), 1, 4, "a", "m"), tmp_path)
    sessions.obstacle = None
    return front_end(sessions, tenants=tenants)


def committed(memory: MemoryFrontEnd, headers, **fields) -> int:
    """The version from which a request starts that commits the next."""
    lease = memory.open({"mem_session": "alice", **fields}, RequestParams(headers=headers)).parts["delta"].lease
    store = memory.parts["delta"].store
    store.commit(lease, bytes(64), tokens=1)
    store.close(lease)
    return lease.start.version


def test_fault08_a_session_is_its_tenant_s(memory, tmp_path):
    """The same name is another session for another tenant; without a tenant it is the one that it was before."""
    callers = (Headers(), bearer("acme-key"), bearer("globex-key"))
    for version in (0, 1):
        assert [committed(memory, headers) for headers in callers] == [version] * 3
    assert {"alice.safetensors", "acme:alice.safetensors", "globex:alice.safetensors"} <= {
        path.name for path in tmp_path.iterdir()
    }
    with pytest.raises(RequestError, match="mem_tenant"):
        committed(memory, bearer("acme-key"), mem_tenant="globex")
    memory.open({"mem_session": "a" * 128}, RequestParams(headers=bearer("acme-key")))
    with pytest.raises(RequestError, match="with mem_tenant its name has 201 characters, at most 200"):
        memory.open({"mem_session": "a" * 100, "mem_tenant": "b" * 100}, RequestParams())


def test_fault08_who_is_refused_has_nothing_opened(memory):
    memory.parts["memory"] = SimpleNamespace(admit=lambda *_: pytest.fail("opened"))
    with pytest.raises(RequestError, match="mem_tenant"):
        memory.open({"mem_tenant": "globex"}, RequestParams(headers=bearer("acme-key")))
    assert parse_request({"mem_tenant": "globex"}).tenant == "globex"
