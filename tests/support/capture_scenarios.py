"""What every engine's HTTP server must do with captures and tenants, written once: see ``server_scenarios``.

The servers serve the bank of whole texts with ``default`` ["beta"] and captures "own"; two API keys are tenants'.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from typing import Any

from mem_triton.store.bank import Bank
from tests.support.memory_bench import SECRET, MemoryBench, tokens_of
from tests.support.memory_scenarios import PROMPTS
from tests.support.models import tiny_tokenizer
from tests.support.server import ServerProcess
from tests.support.server_scenarios import ids, until

KEYS = {"acme-key": "acme", "globex-key": "globex"}
SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "The locker is falcon."}


def section(b: MemoryBench) -> dict[str, Any]:
    """The servers' configuration."""
    keys = {f"sha256:{hashlib.sha256(key.encode()).hexdigest()}": tenant for key, tenant in KEYS.items()}
    return {**b.section(capture="own", default=["beta"]), "tenants": {"keys": keys}}


@contextlib.contextmanager
def speaking_with(server: ServerProcess, key: str) -> Iterator[None]:
    """Requests with this API key."""
    server.http.headers["Authorization"] = f"Bearer {key}"
    try:
        yield
    finally:
        del server.http.headers["Authorization"]


def left(b: MemoryBench) -> list[str]:
    return [path.name for path in (b.prefixes / "incoming").iterdir()]


def a_tenant_is_its_api_key_s(server: ServerProcess, b: MemoryBench) -> None:
    with speaking_with(server, "acme-key"):
        for fields in (ids(SECRET), ids(SECRET, mem_tenant="acme")):
            assert server.tokens(PROMPTS[0], fields=fields) == b.after(PROMPTS[0], "alpha"), "the key says it"
    with speaking_with(server, "globex-key"):
        unknown, foreign = (server.complete(PROMPTS[0], fields=ids(id)) for id in ("nobody", SECRET))
        assert unknown.status_code == foreign.status_code == 400
        assert unknown.text.replace("nobody", SECRET) == foreign.text, "nobody can tell whether it exists"
        for fields in (ids(SECRET, mem_tenant="acme"), {"mem_tenant": "acme", "mem_capture": "x"}):
            for stream in (False, True):
                response = server.complete(PROMPTS[0], fields=fields, stream=stream)
                assert response.status_code == 400 and "mem_tenant" in response.text


def a_chat_is_kept_so_that_reading_it_is_sound(server: ServerProcess, b: MemoryBench) -> None:
    """While a default entry is read, which is no part of it: the oracle has what is kept as text before the prompt."""
    fields, id = {"mem_capture": "chat", "mem_capture_answer": 1}, "capture.acme:chat@1"
    body = {"messages": [SYSTEM, USER], "max_tokens": 6, "temperature": 0, "model": "m", server.fields_in: fields}
    with speaking_with(server, "acme-key"):
        response = server.http.post("/v1/chat/completions", json=body)
        assert server.report(response)["capture"] == {"id": id}
        with Bank.open(b.prefixes) as bank:
            kept = bank.token_ids(id)
        text = tiny_tokenizer().decode(kept)
        assert text.startswith("<|im_start|>user\nThe locker is falcon.<|im_end|>\n<|im_start|>assistant\n")
        assert text.endswith("<|im_end|>\n") and "brief" not in text
        assert server.tokens(PROMPTS[0], fields=ids(id)) == b.generate(kept + PROMPTS[0])
        again = server.http.post("/v1/chat/completions", json=body)
        assert again.status_code == 400 and "mem_replace" in again.text
    fields = {"mem_capture": "chat"}
    response = server.http.post("/v1/chat/completions", json={**body, server.fields_in: fields})
    assert server.report(response)["capture"] == {"id": "capture:chat@1"}
    with Bank.open(b.prefixes) as bank:
        text = tiny_tokenizer().decode(bank.token_ids("capture:chat@1"))
    assert text == "<|im_start|>user\nThe locker is falcon.<|im_end|>\n"


def a_capture_that_fails_is_an_http_error_with_its_reason(server: ServerProcess, b: MemoryBench) -> None:
    """Streamed, too; the answer is not lost, nothing is left behind, and the next one is kept."""
    incoming, text = b.prefixes / "incoming", tokens_of(61, 20)
    failures = server.metric("mem_triton:capture_failures_total")
    incoming.rename(away := incoming.with_name("away"))
    incoming.write_text("no folder")  # as a full disk: a worker cannot write there
    try:
        failed = server.complete(text, 4, fields={"mem_capture": "fails"})
        assert failed.status_code == 500 and 'mem_capture: \\"fails\\" was not kept' in failed.text
        assert "The answer was: " in failed.text
        streamed = server.complete(text, 4, fields={"mem_capture": "fails"}, stream=True).text
        assert '"choices"' in streamed and '"error"' in streamed and "was not kept" in streamed
        assert server.tokens(text, 4) == b.after(text, "beta", count=4), "others go on"
    finally:
        incoming.unlink()
        away.rename(incoming)
    counted = server.metric("mem_triton:capture_failures_total") - failures
    assert counted == 2
    kept = server.complete(text, 4, fields={"mem_capture": "fails"})
    assert server.report(kept)["capture"] == {"id": "capture:fails@1"}
    assert left(b) == []


def a_client_that_leaves_a_capture_leaves_nothing_behind(server: ServerProcess, b: MemoryBench) -> None:
    """A machine that stands still for seconds may end the whole answer before its client is seen to have left: three
    of them.
    """
    kept = [_kept_of_one_that_left(server, b, name) for name in ("gone", "gone-too", "gone-as-well")]
    assert left(b) == []
    assert False in kept, "the ones that left were kept"


def _kept_of_one_that_left(server: ServerProcess, b: MemoryBench, name: str) -> bool:
    text, fields = tokens_of(62, 20), {"mem_capture": name}
    streamed = server.stream(text, 4000, fields=fields)
    next(streamed)
    busy = server.complete(text, 1, fields=fields)
    assert busy.status_code == 400 and "being captured" in busy.text
    streamed.close()

    def free() -> bool:
        return server.complete(text, 1, fields={**fields, "mem_replace": 1}).status_code == 200

    until(free, "its name is taken by nobody")
    with Bank.open(b.prefixes) as bank:
        return bank.resolve(f"capture:{name}", any_tenant=True).version > 1
