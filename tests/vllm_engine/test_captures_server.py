"""Captures and tenants over real HTTP: who may keep and read what, and what becomes of captures that fail."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support import capture_scenarios as scenarios
from tests.support.memory_bench import MemoryBench, make_memory_bench
from tests.vllm_engine.server import Server, memory_flags

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def memory_bench(tmp_path_factory) -> MemoryBench:
    return make_memory_bench(tmp_path_factory.mktemp("memory"))


@pytest.fixture(scope="module")
def server(memory_bench, tmp_path_factory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("server") / "server.log"
    flags = [*memory_flags(scenarios.section(memory_bench)), "--trust-request-chat-template"]
    server = Server(str(memory_bench.model), str(log), flags)
    try:
        yield server.wait()
    finally:
        server.stop()


def test_fault08_a_tenant_is_its_api_key_s(server, memory_bench):
    scenarios.a_tenant_is_its_api_key_s(server, memory_bench)


def test_fault07_a_chat_is_kept_so_that_reading_it_is_sound(server, memory_bench):
    scenarios.a_chat_is_kept_so_that_reading_it_is_sound(server, memory_bench)


def test_fault07_fault17_a_capture_that_fails_is_an_http_error_with_its_reason(server, memory_bench):
    scenarios.a_capture_that_fails_is_an_http_error_with_its_reason(server, memory_bench)


def test_fault18_a_client_that_leaves_a_capture_leaves_nothing_behind(server, memory_bench):
    scenarios.a_client_that_leaves_a_capture_leaves_nothing_behind(server, memory_bench)


def test_fault07_a_chat_of_another_template_is_refused(server):
    response = server.chat(
        "hello", 2, fields={"mem_capture": "odd"}, chat_template="{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    assert response.status_code == 400 and "where they end is unknown" in response.text
