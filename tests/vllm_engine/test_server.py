"""The real HTTP server: sessions over /v1, bad words answered with 400, a server that survives everything."""

from __future__ import annotations

import concurrent.futures
import time
from collections.abc import Iterator

import pytest

from tests.vllm_engine.server import Server, memory_flags

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def server(bench, tmp_path_factory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    flags = memory_flags({**bench.memory, "session_dir": str(folder / "sessions")})
    server = Server(str(bench.model), str(folder / "server.log"), flags)
    try:
        yield server.wait()
    finally:
        server.stop()


def words(name: str, **more: int) -> dict:
    return {"vllm_xargs": {"mem_session": name, **more}}


def test_sessions_over_http(server, bench, prompts):
    bench.forget()
    expected = [bench.generate(prompts[0]), bench.generate(prompts[3])]
    assert [server.tokens(p, **words("http")) for p in (prompts[0], prompts[3])] == expected
    frozen = bench.generate(prompts[1], write=False)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:  # many readers at once
        answers = list(pool.map(lambda _: server.tokens(prompts[1], **words("http", mem_write=0)), range(4)))
    assert answers == [frozen] * 4
    assert server.tokens(prompts[1]) == bench.fresh(prompts[1])
    assert server.metric("mem_triton:session_commits_total") == 2


def test_many_sessions_at_once(server, bench, prompts):
    names = [f"many-{i}" for i in range(8)]
    for round_prompts in (prompts, prompts[::-1]):
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            answers = list(
                pool.map(lambda i: server.tokens(round_prompts[i % 4], **words(names[i])), range(8))  # noqa: B023
            )
    for i, answer in enumerate(answers):
        bench.forget()
        bench.generate(prompts[i % 4])
        assert answer == bench.generate(prompts[::-1][i % 4])


def test_streaming_commits_before_the_last_chunk(server, bench, prompts):
    bench.forget()
    expected = [bench.generate(prompts[0]), bench.generate(prompts[1])]
    got = [token for part in server.stream(prompts[0], 12, **words("s")) for token in part]
    assert got == expected[0]
    assert server.tokens(prompts[1], **words("s")) == expected[1]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("xargs", "message"),
    [
        ({"mem_sesion": "a"}, 'Did you mean \\"mem_session\\"'),
        ({"mem_session": "../etc"}, "mem_session"),
        ({"mem_session": "a", "mem_write": 3}, "mem_write"),
        ({"mem_triton": "x"}, "reserved"),
    ],
)
def test_bad_words_are_400_before_anything_runs(server, prompts, xargs, message, stream):
    response = server.complete(prompts[0], vllm_xargs=xargs, stream=stream)
    assert response.status_code == 400 and message in response.text
    assert server.http.get("/health").status_code == 200


def test_two_answers_of_one_session_are_refused(server, prompts):
    response = server.complete(prompts[0], n=2, temperature=0.5, **words("n"))
    assert response.status_code == 400 and "set n to 1" in response.text


def slow_stream(server: Server, prompt: list[int], name: str):
    body = {"model": "m", "prompt": prompt, "max_tokens": 3900, "temperature": 0, "ignore_eos": True, "stream": True}
    return server.http.stream("POST", "/v1/completions", json={**body, **words(name)})


def test_a_busy_session_is_400_and_an_aborted_one_commits_nothing(server, bench, prompts):
    """The client hangs up in the middle of an answer: the session is free again and unchanged."""
    bench.forget()
    first, reading, second = (
        bench.generate(prompts[0]),
        bench.generate(prompts[1], write=False),
        bench.generate(prompts[1]),
    )
    assert server.tokens(prompts[0], **words("cut")) == first
    with slow_stream(server, prompts[2], "cut") as response:
        lines = response.iter_lines()
        next(lines)
        for stream in (True, False):
            refused = server.complete(prompts[1], 1, stream=stream, **words("cut"))
            assert refused.status_code == 400 and "being written by another request" in refused.text
        assert server.tokens(prompts[1], **words("cut", mem_write=0)) == reading
        commits = server.metric("mem_triton:session_commits_total")
    deadline = time.monotonic() + 30
    while (response := server.complete(prompts[1], **words("cut"))).status_code == 400:
        assert time.monotonic() < deadline, response.text
        time.sleep(0.1)
    assert server.metric("mem_triton:session_commits_total") == commits + 1, "the aborted request committed nothing"
    assert response.json()["choices"][0]["token_ids"] == second


def test_stop_strings_end_normally(server, bench, prompts):
    """A stop string is found by the front end, late; the state then ends a few tokens further, and says so."""
    text = server.complete(prompts[0], 12).json()["choices"][0]["text"]
    stop = text[4:6]
    response = server.complete(prompts[0], 12, stop=[stop], **words("stop"))
    assert response.status_code == 200 and response.json()["choices"][0]["finish_reason"] == "stop"
    assert server.tokens(prompts[1], **words("stop")) != bench.fresh(prompts[1]), "the session was committed"


def test_chat_and_a_client_salt(server, prompts):
    messages = [{"role": "user", "content": "remember this"}]
    body = {"model": "m", "messages": messages, "max_tokens": 4, "temperature": 0, "cache_salt": "tenant"}
    for _ in range(2):
        response = server.http.post("/v1/chat/completions", json={**body, **words("chat")})
        assert response.status_code == 200, response.text
    assert server.http.post("/v1/chat/completions", json={**body, "vllm_xargs": {"mem_nope": 1}}).status_code == 400
    assert server.metric("mem_triton:refusals_total") > 0


def test_a_session_file_of_another_adapter_is_400(server, bench, prompts):
    folder = next(p for p in (bench.model.parent.parent).glob("server*/sessions"))
    path = folder / "broken.safetensors"
    path.write_bytes(b"not a file of ours")
    response = server.complete(prompts[0], **words("broken"))
    assert response.status_code == 400 and "cannot read" in response.text
    assert server.http.get("/health").status_code == 200
