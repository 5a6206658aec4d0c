"""What every engine's HTTP server must do with explicit memory: tests that each engine's file imports."""

from __future__ import annotations

import concurrent.futures

import httpx
import pytest

from tests.support.memory_bench import SECRET, MemoryBench, tokens_of
from tests.support.memory_scenarios import PROMPTS
from tests.support.server import ServerProcess, at_once, ids, until


def test_fault15_memory_beyond_the_context_is_400(server: ServerProcess, context: int = 4096) -> None:
    """Entry alpha has 40 tokens."""
    for stream in (False, True):
        response = server.complete([5] * (context - 36), 4, fields=ids("alpha"), stream=stream)
        assert response.status_code == 400, response.text
        assert "40 tokens" in response.text and f"{context} tokens" in response.text
    assert server.complete([5] * (context - 42), 4, fields=ids("alpha")).json()["usage"]["completion_tokens"] == 2


def test_many_requests_share_three_pages(server: ServerProcess, memory_bench: MemoryBench) -> None:
    names = ("alpha", "beta", "gamma")
    answers = at_once(12, lambda i: server.tokens(PROMPTS[i % 4], fields=ids(names[i % 3])))
    assert answers == [memory_bench.after(PROMPTS[i % 4], names[i % 3]) for i in range(12)]
    assert server.metric("mem_triton:pool_evictions_total") > 0


def test_a_tenant_reads_its_own(server: ServerProcess, memory_bench: MemoryBench) -> None:
    assert server.tokens(PROMPTS[0], fields=ids(SECRET, mem_tenant="acme")) == memory_bench.after(PROMPTS[0], "alpha")


def test_a_request_that_waits_for_pages_delays_nobody_and_a_client_that_leaves_frees_them(
    server: ServerProcess, memory_bench: MemoryBench
) -> None:
    plain, alpha, gamma = (memory_bench.after(PROMPTS[1], *names) for names in ((), ("alpha",), ("gamma",)))
    holding = server.stream(PROMPTS[0], 3900, fields=ids("alpha"))
    next(holding)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(server.tokens, PROMPTS[1], fields=ids("gamma"))
        assert server.tokens(PROMPTS[1]) == plain, "plain requests go on"
        assert server.tokens(PROMPTS[1], fields=ids("alpha")) == alpha, "and so do hits"
        assert not waiting.done(), waiting.exception() or waiting.result()
        holding.close()
        assert waiting.result(60) == gamma
    assert server.metric("mem_triton:pool_pinned_pages") == 0


def test_a_waiting_client_that_leaves_is_forgotten(server: ServerProcess, memory_bench: MemoryBench) -> None:
    holding = server.stream(PROMPTS[0], 3000, fields=ids("alpha"))
    next(holding)
    with pytest.raises(httpx.ReadTimeout):
        server.complete(PROMPTS[1], 4, fields=ids("gamma"), patience=1)
    until(lambda: not server.metric("mem_triton:pool_waiting_requests"), "it still waits, for nobody")
    holding.close()
    assert server.tokens(PROMPTS[1], fields=ids("beta")) == memory_bench.after(PROMPTS[1], "beta")


def test_capture_over_http(server: ServerProcess, memory_bench: MemoryBench) -> None:
    text = tokens_of(60, 37)
    answer = server.complete(text, 3, fields={"mem_capture": "http-note", "mem_tenant": "acme"})
    assert server.report(answer)["capture"] == {"id": f"{(note := 'capture.acme:http-note')}@1"}
    assert server.tokens(PROMPTS[0], fields=ids(note, mem_tenant="acme")) == memory_bench.generate(text + PROMPTS[0])
    assert server.complete(PROMPTS[0], fields=ids(note)).status_code == 400, "it is acme's"
    assert server.metric("mem_triton:captures_total") > 0


def test_captures_that_end_together_are_all_kept(server: ServerProcess, memory_bench: MemoryBench) -> None:
    texts = [tokens_of(70 + i, 16 + i) for i in range(8)]
    at_once(8, lambda i: server.tokens(texts[i], 2, fields={"mem_capture": f"together-{i}"}))
    for i in (0, 3, 7):
        assert server.tokens(PROMPTS[0], fields=ids(f"capture:together-{i}")) == memory_bench.generate(
            texts[i] + PROMPTS[0]
        )
