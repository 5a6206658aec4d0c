"""The real HTTP server: sessions over /v1, bad fields answered with 400, a server that survives everything."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support import server_scenarios as scenarios
from tests.support.server_scenarios import session
from tests.vllm_engine.server import Server, memory_flags

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("sessions")


@pytest.fixture(scope="module")
def server(bench, folder, tmp_path_factory) -> Iterator[Server]:
    flags = memory_flags({**bench.memory, "session_dir": str(folder)})
    server = Server(str(bench.model), str(tmp_path_factory.mktemp("server") / "log"), flags, fresh=True)
    try:
        yield server.wait()
    finally:
        server.stop()


def test_sessions_over_http(server, bench, prompts):
    scenarios.sessions_carry_over(server, bench, prompts)


def test_many_sessions_at_once(server, bench, prompts):
    scenarios.many_sessions_at_once(server, bench, prompts)


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
    scenarios.bad_fields_are_400(server, prompts[0], fields, message)


def test_two_answers_of_one_session_are_refused(server, prompts):
    response = server.complete(prompts[0], n=2, temperature=0.5, fields=session("n"))
    assert response.status_code == 400 and "set n to 1" in response.text


def test_a_busy_session_is_400_and_an_aborted_one_commits_nothing(server, bench, prompts):
    scenarios.a_busy_session_is_refused_and_an_aborted_one_commits_nothing(server, bench, prompts)


def test_stop_strings_end_normally(server, bench, prompts):
    scenarios.stop_strings_end_normally(server, bench, prompts)


def test_chat_and_a_client_salt(server):
    scenarios.chat_has_sessions_too(server, cache_salt="tenant")


def test_a_session_file_of_another_adapter_is_400(server, folder, prompts):
    scenarios.a_session_file_of_another_adapter_is_400(server, folder, prompts)


def test_fault13_servers_that_share_a_folder_lose_no_commit(server, bench, prompts, folder, tmp_path):
    other = Server(str(bench.model), str(tmp_path / "log"), memory_flags({**bench.memory, "session_dir": str(folder)}))
    try:
        scenarios.servers_that_share_a_folder_lose_no_commit(server, other.wait(), bench, prompts, folder)
    finally:
        other.stop()
