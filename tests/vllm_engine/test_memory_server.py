"""Explicit memory over real HTTP: ids, tenants, captures, retrieval, streams; a server that survives its requests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support import server_scenarios as scenarios
from tests.support.memory_bench import SECRET, MemoryBench, make_memory_bench, reference
from tests.support.memory_scenarios import PROMPTS, three_pages
from tests.support.server_scenarios import at_once, ids, whole
from tests.vllm_engine.server import Server, memory_flags

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def memory_bench(tmp_path_factory) -> MemoryBench:
    return make_memory_bench(tmp_path_factory.mktemp("memory"))


@pytest.fixture(scope="module")
def server(memory_bench, tmp_path_factory) -> Iterator[Server]:
    """The bank of whole texts behind three pages: whoever wants another entry waits for its turn."""
    log = tmp_path_factory.mktemp("server") / "server.log"
    server = Server(str(memory_bench.model), str(log), memory_flags(three_pages(memory_bench)))
    try:
        yield server.wait()
    finally:
        server.stop()


def test_memory_over_http_and_what_was_read_is_in_the_answer(server, memory_bench):
    b, (short, middle, *_) = memory_bench, PROMPTS
    assert server.tokens(short, words=ids("alpha")) == b.after(short, "alpha")
    assert server.tokens(short) == b.after(short)
    response = server.complete(middle, words=ids("beta"))
    assert response.json()["choices"][0]["token_ids"] == b.after(middle, "beta")
    assert server.report(response) == {"references": whole("beta")}
    assert response.json()["usage"]["prompt_tokens"] == len(middle), "memory is no prompt"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"mem_ids": ["alpha", "nobody"]}, "nobody"),
        ({"mem_ids": [SECRET]}, SECRET),
        ({"mem_ids": [SECRET], "mem_tenant": "other"}, SECRET),
        ({"mem_ids": ["delta"]}, "need 7 memory pages"),
        ({"mem_ids": ["a b"]}, "is no id"),
        ({"mem_capture": "x@1"}, "mem_capture"),
    ],
)
def test_bad_words_are_400_that_name_the_id(server, words, message):
    scenarios.bad_words_are_400(server, PROMPTS[0], words, message)


def test_many_requests_share_three_pages(server, memory_bench):
    scenarios.many_requests_share_three_pages(server, memory_bench)


def test_a_tenant_reads_its_own(server, memory_bench):
    scenarios.a_tenant_reads_its_own(server, memory_bench)


def test_a_request_that_waits_for_pages_delays_nobody_and_a_client_that_leaves_frees_them(server, memory_bench):
    scenarios.a_request_that_waits_for_pages_delays_nobody_and_a_client_that_leaves_frees_them(server, memory_bench)


def test_a_waiting_client_that_leaves_is_forgotten(server, memory_bench):
    scenarios.a_waiting_client_that_leaves_is_forgotten(server, memory_bench)


def test_capture_over_http(server, memory_bench):
    scenarios.a_prompt_is_captured(server, memory_bench)


def test_captures_that_end_together_are_all_kept(server, memory_bench):
    scenarios.captures_that_end_together_are_all_kept(server, memory_bench)


def test_retrieval_over_http_streams_one_answer(memory_bench, tmp_path):
    b, prompt = memory_bench, reference(3) + reference(9)
    section = b.section(b.references, retrieval={"top_k": 2, "every": 32})
    server = Server(str(b.model), str(tmp_path / "server.log"), memory_flags(section))
    try:
        server.wait()
        expected, _ = b.retrieving(prompt, 70, top_k=2, every=32)
        assert [t for part in server.stream(prompt, 70) for t in part] == expected
        assert at_once(4, lambda _: server.tokens(prompt, 70)) == [expected] * 4
        assert server.tokens(prompt, words={"mem_top_k": 0}) == b.generate(prompt)
        assert server.report(server.chat("who?", 40))["references"]
        assert server.complete(prompt, 12, n=2, temperature=1.0).status_code == 200
        assert server.metric("mem_triton:refresh_off_total") > 0
    finally:
        server.stop()
