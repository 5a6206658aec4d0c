"""The real HTTP server: sessions over /v1, bad fields answered with 400, a server that survives everything."""

from __future__ import annotations

import pytest

from tests.support import session_server_scenarios as scenarios
from tests.support.server import bad_fields_are_400, session
from tests.support.session_server_scenarios import *  # noqa: F403
from tests.vllm_engine.server import Server, with_memory

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def server(bench, folder, start_server) -> Server:
    return start_server(bench.model, {**bench.memory, "session_dir": str(folder)})


def test_streaming_commits_before_the_last_chunk(server, bench, prompts):
    bench.forget()
    expected = [bench.generate(prompts[0]), bench.generate(prompts[1])]
    assert [token for part in server.stream(prompts[0], 12, session("s")) for token in part] == expected[0]
    assert server.tokens(prompts[1], fields=session("s")) == expected[1]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mem_sesion": "a"}, 'Did you mean \\"mem_session\\"'),
        ({"mem_session": "../etc"}, "mem_session"),
        ({"mem_session": "a", "mem_write": 3}, "mem_write"),
        ({"mem_triton": "x"}, "reserved"),
    ],
)
def test_bad_fields_are_400_before_anything_runs(server, prompts, fields, message):
    bad_fields_are_400(server, prompts[0], fields, message)


def test_two_answers_of_one_session_are_refused(server, prompts):
    response = server.complete(prompts[0], n=2, temperature=0.5, fields=session("n"))
    assert response.status_code == 400 and "set n to 1" in response.text


def test_chat_and_a_client_salt(server):
    scenarios.chat_has_sessions_too(server, cache_salt="tenant")


def test_fault13_servers_that_share_a_folder_lose_no_commit(server, bench, prompts, folder, tmp_path):
    other = with_memory(bench.model, tmp_path / "log", {**bench.memory, "session_dir": str(folder)})
    try:
        scenarios.servers_that_share_a_folder_lose_no_commit(server, other.wait(), bench, prompts, folder)
    finally:
        other.stop()
