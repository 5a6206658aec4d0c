"""The real HTTP server: sessions over both of SGLang's APIs, bad fields answered with 400, a server that lives on."""

from __future__ import annotations

import pytest

from tests.sglang_engine.server import Server
from tests.support import session_server_scenarios as scenarios
from tests.support.server import bad_fields_are_400, session
from tests.support.session_server_scenarios import *  # noqa: F403

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def server(bench, folder, start_server) -> Server:
    return start_server(bench.model, {**bench.memory, "session_dir": str(folder)}, fresh=True)


def test_a_batch_has_fields_of_its_own_for_each_prompt(server, bench, prompts):
    """A list of prompts in one call: two sessions, one frozen zero state, one plain."""
    params = {"max_new_tokens": 12, "temperature": 0, "ignore_eos": True}
    said = [session("batch-0"), session("batch-1"), {"mem_write": 0}, None]
    body = {"input_ids": prompts, "sampling_params": [{**params, "custom_params": w} for w in said]}
    answers = [answer["output_ids"] for answer in server.http.post("/generate", json=body).json()]
    bench.forget()
    assert answers[2] == bench.generate(prompts[2], write=False)
    assert [answers[i] for i in (0, 1, 3)] == [bench.fresh(prompts[i]) for i in (0, 1, 3)]
    bench.fresh(prompts[1])
    assert server.tokens(prompts[0], fields=session("batch-1")) == bench.generate(prompts[0])
    body["sampling_params"][1]["custom_params"] = {"mem_session": "batch-0"}
    refused = server.http.post("/generate", json=body)
    assert refused.status_code == 400 and '\\"batch-0\\" is being written' in refused.text
    assert server.tokens(prompts[3], fields=session("batch-0")), "the refused call holds nothing"


@pytest.mark.parametrize("api", ["sglang", "openai"])
def test_streaming_commits_before_the_last_chunk(server, bench, prompts, api):
    bench.forget()
    expected = [bench.generate(prompts[0]), bench.generate(prompts[1])]
    if api == "sglang":
        *_, last = server.stream(prompts[0], 12, session(api))
        assert last["output_ids"] == expected[0]
    else:
        assert server.complete(prompts[0], fields=session(api), stream=True).text.endswith("data: [DONE]\n\n")
    assert server.tokens(prompts[1], fields=session(api)) == expected[1]


BAD = [
    ({"mem_sesion": "a"}, 'Did you mean \\"mem_session\\"'),
    ({"mem_session": "../etc"}, "mem_session"),
    ({"mem_session": ["a", "b"]}, "mem_session"),
    ({"mem_session": "a", "mem_write": 3}, "mem_write"),
    ({"mem_reset": 1}, "mem_reset"),
    ({"mem_triton": "x"}, "reserved"),
    ({"mem_ids": ["x"]}, "without mem_triton.memory"),
]


@pytest.mark.parametrize(("said", "message"), BAD)
def test_bad_fields_are_400_before_anything_runs(server, prompts, said, message):
    bad_fields_are_400(server, prompts[0], said, message)
    response = server.generate(prompts[0], fields=said)
    assert response.status_code == 400 and message in response.text
    (error,) = server.stream(prompts[0], 12, said)  # SGLang's own streams have begun when they fail
    assert error["error"]["code"] == 400 and message.replace("\\", "") in error["error"]["message"]
    assert server.tokens(prompts[0], 1), "the server lives"


def test_fields_that_are_no_table_are_400(server, prompts):
    response = server.generate(prompts[0], fields="alice")
    assert response.status_code == 400 and "custom_params" in response.text
    assert server.tokens(prompts[0], 1), "the server lives"


def test_what_cannot_have_a_session_is_refused(server, prompts):
    response = server.complete(prompts[0], n=2, temperature=0.5, fields=session("n"))
    assert response.status_code == 400 and "set n to 1" in response.text
    response = server.generate(prompts[0], fields=session("n"), session_params={"id": "s"})
    assert response.status_code == 400 and "session_params" in response.text


def test_an_abort_by_id_frees_the_session_and_commits_nothing(server, bench, prompts):
    bench.forget()
    assert server.tokens(prompts[0], fields=session("stopped")) == bench.generate(prompts[0])
    running = server.stream(prompts[2], 3900, session("stopped"), rid="to-stop")
    next(running)
    assert server.http.post("/abort_request", json={"rid": "to-stop"}).status_code == 200
    *_, last = running
    assert last["meta_info"]["finish_reason"]["type"] == "abort"
    assert server.tokens(prompts[1], fields=session("stopped")) == bench.generate(prompts[1]), "free at once, unchanged"


def test_chat_and_a_client_key(server):
    scenarios.chat_has_sessions_too(server, extra_key="tenant")


def test_a_client_key_cannot_pass_for_a_memory(server, bench, prompts):
    """A plain request whose extra key is the one of a session's request must not find that session's prefix."""
    from mem_triton.systems.delta_mem import load_adapter
    from mem_triton.systems.delta_mem.request import SessionRequest
    from mem_triton.systems.delta_mem.sessions import SessionStore, StateLayout
    from mem_triton_sglang.identity import extra_key_of

    assert server.tokens(prompts[2], fields=session("forged")) == bench.fresh(prompts[2])
    lease = SessionStore(StateLayout(("l",), 1, 1, load_adapter(bench.adapter).fingerprint, "m")).open(
        SessionRequest("forged")
    )
    key = extra_key_of(None, lease.key)
    response = server.generate(prompts[2], extra_key=key).json()
    assert response["output_ids"] == bench.fresh(prompts[2])
    assert response["meta_info"]["cached_tokens"] == 0
    honest = server.generate(prompts[2], fields=session("forged", mem_write=0)).json()
    assert honest["meta_info"]["cached_tokens"] == 0, "another version, whose key the first one was"


@pytest.mark.slow  # a second server, and vLLM's tests have it each time
def test_fault13_servers_that_share_a_folder_lose_no_commit(server, bench, prompts, folder, tmp_path):
    other = Server(bench.model, tmp_path / "log", {**bench.memory, "session_dir": str(folder)})
    try:
        scenarios.servers_that_share_a_folder_lose_no_commit(server, other.wait(), bench, prompts, folder)
    finally:
        other.stop()


def test_sessions_survive_a_restart(server, bench, prompts, folder, start_server):
    bench.fresh(prompts[2])
    expected = bench.generate(prompts[3])
    server.tokens(prompts[2], fields=session("lasting"))
    again = start_server(bench.model, {**bench.memory, "session_dir": str(folder)})
    assert again.tokens(prompts[3], fields=session("lasting")) == expected
