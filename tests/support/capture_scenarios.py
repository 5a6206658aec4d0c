"""What every engine's HTTP server must do with captures and tenants: tests that each engine's file imports."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from mem_triton.store.bank import Bank
from tests.support.memory_bench import SECRET, MemoryBench, make_memory_bench, tokens_of
from tests.support.memory_scenarios import PROMPTS
from tests.support.models import tiny_tokenizer
from tests.support.server import ServerProcess, ids, until

KEYS = {"acme-key": "acme", "globex-key": "globex"}
SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "The locker is falcon."}


@pytest.fixture(scope="module")
def memory_bench(tmp_path_factory: pytest.TempPathFactory) -> MemoryBench:
    return make_memory_bench(tmp_path_factory.mktemp("memory"))


def section(memory_bench: MemoryBench) -> dict[str, Any]:
    """The configuration of a server: two API keys are tenants', and a default entry is read by whoever says nothing."""
    keys = {f"sha256:{hashlib.sha256(key.encode()).hexdigest()}": tenant for key, tenant in KEYS.items()}
    return {**memory_bench.section(capture="own", default=["beta"]), "tenants": {"keys": keys}}


@pytest.fixture(scope="module")
def server(memory_bench: MemoryBench, start_server: Callable[..., ServerProcess]) -> ServerProcess:
    return start_server(memory_bench.model, section(memory_bench))


@contextlib.contextmanager
def speaking_with(server: ServerProcess, key: str) -> Iterator[None]:
    """Requests with this API key."""
    server.http.headers["Authorization"] = f"Bearer {key}"
    try:
        yield
    finally:
        del server.http.headers["Authorization"]


def left(memory_bench: MemoryBench) -> list[str]:
    return [path.name for path in (memory_bench.prefixes / "incoming").iterdir()]


def test_fault08_a_tenant_is_its_api_key_s(server: ServerProcess, memory_bench: MemoryBench) -> None:
    with speaking_with(server, "acme-key"):
        for fields in (ids(SECRET), ids(SECRET, mem_tenant="acme")):
            assert server.tokens(PROMPTS[0], fields=fields) == memory_bench.after(PROMPTS[0], "alpha"), (
                "the key says it"
            )
    with speaking_with(server, "globex-key"):
        unknown, foreign = (server.complete(PROMPTS[0], fields=ids(id)) for id in ("nobody", SECRET))
        assert unknown.status_code == foreign.status_code == 400
        assert unknown.text.replace("nobody", SECRET) == foreign.text, "nobody can tell whether it exists"
        for fields in (ids(SECRET, mem_tenant="acme"), {"mem_tenant": "acme", "mem_capture": "x"}):
            for stream in (False, True):
                response = server.complete(PROMPTS[0], fields=fields, stream=stream)
                assert response.status_code == 400 and "mem_tenant" in response.text


def test_fault07_a_chat_is_kept_so_that_reading_it_is_sound(server: ServerProcess, memory_bench: MemoryBench) -> None:
    """While a default entry is read, which is no part of it: the oracle has what is kept as text before the prompt."""
    fields, id = {"mem_capture": "chat", "mem_capture_answer": 1}, "capture.acme:chat@1"
    body = {"messages": [SYSTEM, USER], "max_tokens": 6, "temperature": 0, "model": "m", server.fields_in: fields}
    with speaking_with(server, "acme-key"):
        response = server.http.post("/v1/chat/completions", json=body)
        assert server.report(response)["capture"] == {"id": id}
        with Bank.open(memory_bench.prefixes) as bank:
            kept = bank.token_ids(id)
        text = tiny_tokenizer().decode(kept)
        assert text.startswith("<|im_start|>user\nThe locker is falcon.<|im_end|>\n<|im_start|>assistant\n")
        assert text.endswith("<|im_end|>\n") and "brief" not in text
        assert server.tokens(PROMPTS[0], fields=ids(id)) == memory_bench.generate(kept + PROMPTS[0])
        again = server.http.post("/v1/chat/completions", json=body)
        assert again.status_code == 400 and "mem_replace" in again.text
    fields = {"mem_capture": "chat"}
    response = server.http.post("/v1/chat/completions", json={**body, server.fields_in: fields})
    assert server.report(response)["capture"] == {"id": "capture:chat@1"}
    with Bank.open(memory_bench.prefixes) as bank:
        text = tiny_tokenizer().decode(bank.token_ids("capture:chat@1"))
    assert text == "<|im_start|>user\nThe locker is falcon.<|im_end|>\n"


@pytest.mark.parametrize("role", ["system", "user"])
def test_fault22_half_a_surrogate_pair_in_a_chat_ends_no_server(
    server: ServerProcess, memory_bench: MemoryBench, role: str
) -> None:
    """JSON can say it, and UTF-8 cannot: an answer, or the client's mistake; nothing of it is kept."""
    half = {"role": role, "content": "The locker \ud83d is falcon."}
    words: list[dict[str, Any]] = [{}, {"mem_ids": '["alpha"]'}, {"mem_capture": f"half-{role}"}]
    for fields in words:
        body = {"messages": [half, USER], "max_tokens": 2, "model": "m", server.fields_in: fields}
        headers = {"Content-Type": "application/json"}
        response = server.http.post("/v1/chat/completions", content=json.dumps(body), headers=headers)
        assert response.status_code in (200, 400), response.text
    assert server.tokens(PROMPTS[0], fields=ids("alpha")) == memory_bench.after(PROMPTS[0], "alpha")
    assert left(memory_bench) == []


def test_fault07_fault17_a_capture_that_fails_is_an_http_error_with_its_reason(
    server: ServerProcess, memory_bench: MemoryBench
) -> None:
    """Streamed, too; the answer is not lost, nothing is left behind, and the next one is kept."""
    incoming, text = memory_bench.prefixes / "incoming", tokens_of(61, 20)
    failures = server.metric("mem_triton:capture_failures_total")
    incoming.rename(away := incoming.with_name("away"))
    incoming.write_text("no folder")  # as a full disk: a worker cannot write there
    try:
        failed = server.complete(text, 4, fields={"mem_capture": "fails"})
        assert failed.status_code == 500 and 'mem_capture: \\"fails\\" was not kept' in failed.text
        assert "The answer was: " in failed.text
        streamed = server.complete(text, 4, fields={"mem_capture": "fails"}, stream=True).text
        assert '"choices"' in streamed and '"error"' in streamed and "was not kept" in streamed
        assert server.tokens(text, 4) == memory_bench.after(text, "beta", count=4), "others go on"
    finally:
        incoming.unlink()
        away.rename(incoming)
    counted = server.metric("mem_triton:capture_failures_total") - failures
    assert counted == 2
    kept = server.complete(text, 4, fields={"mem_capture": "fails"})
    assert server.report(kept)["capture"] == {"id": "capture:fails@1"}
    assert left(memory_bench) == []


def test_fault18_a_client_that_leaves_a_capture_leaves_nothing_behind(
    server: ServerProcess, memory_bench: MemoryBench
) -> None:
    """A machine that stands still for seconds may end the whole answer before its client is seen to have left: three
    of them.
    """
    kept = [_kept_of_one_that_left(server, memory_bench, name) for name in ("gone", "gone-too", "gone-as-well")]
    assert left(memory_bench) == []
    assert False in kept, "the ones that left were kept"


def _kept_of_one_that_left(server: ServerProcess, memory_bench: MemoryBench, name: str) -> bool:
    text, fields = tokens_of(62, 20), {"mem_capture": name}
    streamed = server.stream(text, 4000, fields=fields)
    next(streamed)
    busy = server.complete(text, 1, fields=fields)
    assert busy.status_code == 400 and "being captured" in busy.text
    streamed.close()

    def free() -> bool:
        return server.complete(text, 1, fields={**fields, "mem_replace": 1}).status_code == 200

    until(free, "its name is taken by nobody")
    with Bank.open(memory_bench.prefixes) as bank:
        return bank.resolve(f"capture:{name}", any_tenant=True).version > 1
