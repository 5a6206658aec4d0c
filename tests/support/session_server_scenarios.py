"""What every engine's HTTP server must do with sessions: tests that each engine's file imports, and scenarios that its
own tests run."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import httpx
import pytest
from safetensors import safe_open

from tests.support.bench import Bench
from tests.support.server import ServerProcess, at_once, session, until

Prompts = list[list[int]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the server's sessions."""
    return tmp_path_factory.mktemp("sessions")


def test_sessions_over_http(server: ServerProcess, bench: Bench, prompts: Prompts) -> None:
    bench.forget()
    commits = server.metric("mem_triton:session_commits_total")
    expected = [bench.generate(prompts[0]), bench.generate(prompts[3])]
    assert [server.tokens(p, fields=session("http")) for p in (prompts[0], prompts[3])] == expected
    frozen = bench.generate(prompts[1], write=False)
    answers = at_once(4, lambda _: server.tokens(prompts[1], fields=session("http", mem_write=0)))  # many readers
    assert answers == [frozen] * 4
    assert server.tokens(prompts[1]) == bench.fresh(prompts[1])
    assert server.metric("mem_triton:session_commits_total") == commits + 2


def test_many_sessions_at_once(server: ServerProcess, bench: Bench, prompts: Prompts) -> None:
    def ask(texts: Prompts) -> list[list[int]]:
        return at_once(8, lambda i: server.tokens(texts[i % 4], fields=session(f"many-{i}")))

    ask(prompts)
    for i, answer in enumerate(ask(prompts[::-1])):
        bench.forget()
        bench.generate(prompts[i % 4])
        assert answer == bench.generate(prompts[::-1][i % 4])


def test_a_busy_session_is_400_and_an_aborted_one_commits_nothing(
    server: ServerProcess, bench: Bench, prompts: Prompts
) -> None:
    """The client hangs up in the middle of an answer: the session is free again and unchanged."""
    bench.forget()
    first = bench.generate(prompts[0])
    reading = bench.generate(prompts[1], write=False)
    second = bench.generate(prompts[1])
    assert server.tokens(prompts[0], fields=session("cut")) == first
    running = server.stream(prompts[2], 3900, fields=session("cut"))
    next(running)
    for stream in (True, False):
        refused = server.complete(prompts[1], 1, fields=session("cut"), stream=stream)
        assert refused.status_code == 400 and "being written by another request" in refused.text
    assert server.tokens(prompts[1], fields=session("cut", mem_write=0)) == reading
    commits = server.metric("mem_triton:session_commits_total")
    running.close()
    answers: list[httpx.Response] = []

    def answered() -> bool:
        answers.append(server.complete(prompts[1], fields=session("cut")))
        return answers[-1].status_code != 400

    until(answered, "the session is still being written")
    assert server.metric("mem_triton:session_commits_total") == commits + 1, "the aborted request committed nothing"
    assert answers[-1].json()["choices"][0]["token_ids"] == second


def servers_that_share_a_folder_lose_no_commit(
    one: ServerProcess, other: ServerProcess, bench: Bench, prompts: Prompts, folder: Path
) -> None:
    """Both serve the same ``session_dir``: one goes on from what the other has committed, one alone writes at a time,
    and a server that is killed holds nothing. Ends ``other``."""
    bench.forget()
    for server, prompt in zip((one, other, one, other), prompts, strict=True):
        assert server.tokens(prompt, fields=session("shared")) == bench.generate(prompt), "what the other has committed"

    def tell(i: int) -> int:
        return (one, other)[i % 2].complete(prompts[0], 4, fields=session("shared")).status_code

    answers = [status for _ in range(3) for status in at_once(4, tell)]
    assert set(answers) <= {200, 400} and answers.count(200) >= 3
    with safe_open(folder / "shared.safetensors", "pt") as file:
        header = file.metadata()
    assert int(header["version"]) == 4 + answers.count(200), "whatever was answered is committed, once"
    bench.forget()
    told = [(prompt, 12) for prompt in prompts] + [(prompts[0], 4)] * answers.count(200)
    assert int(header["tokens"]) == sum(len(prompt) + count - 1 for prompt, count in told)
    for prompt, count in told:
        bench.generate(prompt, count)
    asked = bench.generate(prompts[1], write=False)
    running = other.stream(prompts[2], 3900, fields=session("shared"))
    next(running)
    refused = one.complete(prompts[1], fields=session("shared"))
    assert refused.status_code == 400 and "being written by another request" in refused.text
    for server in (one, other):
        assert server.tokens(prompts[1], fields=session("shared", mem_write=0)) == asked, "readers wait for nobody"
    os.killpg(other.process.pid, signal.SIGKILL)
    other.process.wait(30)
    assert one.tokens(prompts[1], fields=session("shared")) == bench.generate(prompts[1]), "free, and as it was"


def test_stop_strings_end_normally(server: ServerProcess, bench: Bench, prompts: Prompts) -> None:
    """A stop string is found by the front end, late; the state then ends a few tokens further, and says so."""
    text = server.complete(prompts[0]).json()["choices"][0]["text"]
    response = server.complete(prompts[0], fields=session("stop"), stop=[text[4:6]])
    assert response.status_code == 200 and response.json()["choices"][0]["finish_reason"] == "stop"
    assert server.tokens(prompts[1], fields=session("stop")) != bench.fresh(prompts[1]), "the session was committed"


def chat_has_sessions_too(server: ServerProcess, **salt: str) -> None:
    """salt: what a client separates its own prefixes by."""
    for _ in range(2):
        response = server.chat("remember this", 4, fields=session("chat"), **salt)
        assert response.status_code == 200, response.text
    bad = server.chat("remember this", 4, fields={"mem_nope": 1}, **salt)
    assert bad.status_code == 400 and "mem_nope" in bad.text
    assert server.metric("mem_triton:refusals_total") > 0


def test_a_session_file_of_another_adapter_is_400(server: ServerProcess, folder: Path, prompts: Prompts) -> None:
    (folder / "broken.safetensors").write_bytes(b"not a file of ours")
    response = server.complete(prompts[0], fields=session("broken"))
    assert response.status_code == 400 and "cannot read" in response.text
    assert server.tokens(prompts[0], 1), "the server lives"
