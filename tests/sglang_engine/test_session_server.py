"""The real HTTP server: sessions over both of SGLang's APIs, bad words answered with 400, a server that lives on."""

from __future__ import annotations

import concurrent.futures
import time

import pytest

from tests.sglang_engine.server import Server

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("sessions")


@pytest.fixture(scope="module")
def server(bench, folder, start_server) -> Server:
    return start_server(bench.model, {**bench.memory, "session_dir": str(folder)})


def words(name: str, **more: int) -> dict:
    return {"mem_session": name, **more}


def test_sessions_over_http(server, bench, prompts):
    bench.forget()
    expected = [bench.generate(prompts[0]), bench.generate(prompts[3])]
    assert [server.tokens(p, words=words("http")) for p in (prompts[0], prompts[3])] == expected
    frozen = bench.generate(prompts[1], write=False)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:  # many readers at once
        answers = list(pool.map(lambda _: server.tokens(prompts[1], words=words("http", mem_write=0)), range(4)))
    assert answers == [frozen] * 4
    assert server.tokens(prompts[1]) == bench.fresh(prompts[1])
    assert server.metric("mem_triton:session_commits_total") == 2


def test_many_sessions_at_once(server, bench, prompts):
    names = [f"many-{i}" for i in range(8)]
    for round_prompts in (prompts, prompts[::-1]):
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            answers = list(
                pool.map(lambda i: server.tokens(round_prompts[i % 4], words=words(names[i])), range(8))  # noqa: B023
            )
    for i, answer in enumerate(answers):
        bench.forget()
        bench.generate(prompts[i % 4])
        assert answer == bench.generate(prompts[::-1][i % 4])


def test_a_batch_has_words_of_its_own_for_each_prompt(server, bench, prompts):
    """A list of prompts in one call: two sessions, one frozen zero state, one plain."""
    params = {"max_new_tokens": 12, "temperature": 0, "ignore_eos": True}
    said = [words("batch-0"), words("batch-1"), {"mem_write": 0}, None]
    body = {"input_ids": prompts, "sampling_params": [{**params, "custom_params": w} for w in said]}
    answers = [answer["output_ids"] for answer in server.http.post("/generate", json=body).json()]
    bench.forget()
    assert answers[2] == bench.generate(prompts[2], write=False)
    assert [answers[i] for i in (0, 1, 3)] == [bench.fresh(prompts[i]) for i in (0, 1, 3)]
    bench.fresh(prompts[1])
    assert server.tokens(prompts[0], words=words("batch-1")) == bench.generate(prompts[0])
    body["sampling_params"][1]["custom_params"] = {"mem_session": "batch-0"}
    refused = server.http.post("/generate", json=body)
    assert refused.status_code == 400 and '\\"batch-0\\" is being written' in refused.text
    assert server.tokens(prompts[3], words=words("batch-0")), "the refused call holds nothing"


@pytest.mark.parametrize("api", ["sglang", "openai"])
def test_streaming_commits_before_the_last_chunk(server, bench, prompts, api):
    bench.forget()
    expected = [bench.generate(prompts[0]), bench.generate(prompts[1])]
    if api == "sglang":
        *_, last = server.stream(prompts[0], 12, words(api))
        assert last["output_ids"] == expected[0]
    else:
        assert server.complete(prompts[0], words=words(api), stream=True).text.endswith("data: [DONE]\n\n")
    assert server.tokens(prompts[1], words=words(api)) == expected[1]


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
def test_bad_words_are_400_before_anything_runs(server, prompts, said, message):
    for response in (server.generate(prompts[0], words=said), server.complete(prompts[0], words=said)):
        assert response.status_code == 400 and message in response.text
    streamed = server.complete(prompts[0], words=said, stream=True)
    assert streamed.status_code == 400 and message in streamed.text
    (error,) = server.stream(prompts[0], 12, said)  # SGLang's own streams have begun when they fail
    assert error["error"]["code"] == 400 and message.replace("\\", "") in error["error"]["message"]
    assert server.tokens(prompts[0], 1), "the server lives"


def test_words_that_are_no_table_are_400(server, prompts):
    response = server.generate(prompts[0], words="alice")
    assert response.status_code == 400 and "custom_params" in response.text
    assert server.tokens(prompts[0], 1), "the server lives"


def test_what_cannot_have_a_session_is_refused(server, prompts):
    response = server.complete(prompts[0], n=2, temperature=0.5, words=words("n"))
    assert response.status_code == 400 and "set n to 1" in response.text
    response = server.generate(prompts[0], words=words("n"), session_params={"id": "s"})
    assert response.status_code == 400 and "session_params" in response.text


def test_a_busy_session_is_400_and_an_aborted_one_commits_nothing(server, bench, prompts):
    """The client hangs up in the middle of an answer: the session is free again and unchanged."""
    bench.forget()
    first, reading, second = (
        bench.generate(prompts[0]),
        bench.generate(prompts[1], write=False),
        bench.generate(prompts[1]),
    )
    assert server.tokens(prompts[0], words=words("cut")) == first
    running = server.stream(prompts[2], 3900, words("cut"))
    next(running)
    for stream in (True, False):
        refused = server.complete(prompts[1], 1, words("cut"), stream=stream)
        assert refused.status_code == 400 and "being written by another request" in refused.text
    assert server.tokens(prompts[1], words=words("cut", mem_write=0)) == reading
    commits = server.metric("mem_triton:session_commits_total")
    running.close()
    assert free(server, prompts[1], words("cut")) == second
    assert server.metric("mem_triton:session_commits_total") == commits + 1, "the aborted request committed nothing"


def free(server: Server, prompt: list[int], said: dict) -> list[int]:
    """Tokens of a request that gets its session as soon as it is free."""
    deadline = time.monotonic() + 30
    while (response := server.generate(prompt, words=said)).status_code == 400:
        assert time.monotonic() < deadline, response.text
        time.sleep(0.1)
    return response.json()["output_ids"]


def test_an_abort_by_id_frees_the_session_and_commits_nothing(server, bench, prompts):
    bench.forget()
    assert server.tokens(prompts[0], words=words("stopped")) == bench.generate(prompts[0])
    running = server.stream(prompts[2], 3900, words("stopped"), rid="to-stop")
    next(running)
    assert server.http.post("/abort_request", json={"rid": "to-stop"}).status_code == 200
    *_, last = running
    assert last["meta_info"]["finish_reason"]["type"] == "abort"
    assert server.tokens(prompts[1], words=words("stopped")) == bench.generate(prompts[1]), "free at once, unchanged"


def test_stop_strings_end_normally(server, bench, prompts):
    text = server.complete(prompts[0], 12).json()["choices"][0]["text"]
    response = server.complete(prompts[0], 12, words("stop"), stop=[text[4:6]])
    assert response.status_code == 200 and response.json()["choices"][0]["finish_reason"] == "stop"
    assert server.tokens(prompts[1], words=words("stop")) != bench.fresh(prompts[1]), "the session was committed"


def test_chat_and_a_client_key(server, bench, prompts):
    messages = [{"role": "user", "content": "remember this"}]
    body = {"model": "m", "messages": messages, "max_tokens": 4, "temperature": 0, "extra_key": "tenant"}
    for _ in range(2):
        response = server.http.post("/v1/chat/completions", json={**body, "custom_params": words("chat")})
        assert response.status_code == 200, response.text
    bad = server.http.post("/v1/chat/completions", json={**body, "custom_params": {"mem_nope": 1}})
    assert bad.status_code == 400 and "mem_nope" in bad.text
    assert server.metric("mem_triton:refusals_total") > 0


def test_a_client_key_cannot_pass_for_a_memory(server, bench, prompts):
    """A plain request whose extra key is the one of a session's request must not find that session's prefix."""
    from mem_triton.delta_mem import load_adapter
    from mem_triton.runtime.request import MemoryRequest
    from mem_triton.runtime.sessions import SessionStore, StateLayout
    from mem_triton_sglang.identity import extra_key_of

    assert server.tokens(prompts[2], words=words("forged")) == bench.fresh(prompts[2])
    lease = SessionStore(StateLayout(("l",), 1, 1, load_adapter(bench.adapter).fingerprint, "m")).open(
        MemoryRequest("forged")
    )
    key = extra_key_of(None, lease.key, None, None)
    response = server.generate(prompts[2], extra_key=key).json()
    assert response["output_ids"] == bench.fresh(prompts[2])
    assert response["meta_info"]["cached_tokens"] == 0
    honest = server.generate(prompts[2], words=words("forged", mem_write=0)).json()
    assert honest["meta_info"]["cached_tokens"] == 0, "another version, whose key the first one was"


def test_a_session_file_of_another_adapter_is_400(server, folder, prompts):
    (folder / "broken.safetensors").write_bytes(b"not a file of ours")
    response = server.generate(prompts[0], words=words("broken"))
    assert response.status_code == 400 and "cannot read" in response.text
    assert server.tokens(prompts[0], 1), "the server lives"


def test_sessions_survive_a_restart(server, bench, prompts, folder, start_server):
    bench.fresh(prompts[2])
    expected = bench.generate(prompts[3])
    server.tokens(prompts[2], words=words("lasting"))
    again = start_server(bench.model, {**bench.memory, "session_dir": str(folder)})
    assert again.tokens(prompts[3], words=words("lasting")) == expected
