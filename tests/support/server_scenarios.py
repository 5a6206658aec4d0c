"""What every engine's HTTP server must do with memory, written once. server: an engine's ``Server``, see ``server.py``.

The oracles are those of ``session_scenarios`` and ``memory_scenarios``.
"""

from __future__ import annotations

import concurrent.futures
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from safetensors import safe_open

from tests.support.bench import Bench
from tests.support.memory_bench import SECRET, MemoryBench, tokens_of
from tests.support.memory_scenarios import PROMPTS
from tests.support.server import ServerProcess

Prompts = list[list[int]]


def session(name: str, **more: Any) -> dict[str, Any]:
    """The fields of a request with a session."""
    return {"mem_session": name, **more}


def ids(*names: str, **more: Any) -> dict[str, Any]:
    """The fields of a request that reads entries."""
    return {"mem_ids": list(names), **more}


def whole(*names: str) -> list[dict[str, Any]]:
    """The report of a request that reads entries from its first token on."""
    return [{"first_token": 0, "end_token": None, "entries": [{"id": f"{name}@1"} for name in names]}]


def at_once(count: int, visit: Callable[[int], Any]) -> list[Any]:
    """``visit(0)`` ... at the same time."""
    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        return list(pool.map(visit, range(count)))


def until(condition: Callable[[], bool], message: str, seconds: float = 30) -> None:
    """Wait until it holds; fails with ``message`` if it never does."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, message
        time.sleep(0.05)


# Sessions.


def sessions_carry_over(server: ServerProcess, bench: Bench, prompts: Prompts) -> None:
    bench.forget()
    commits = server.metric("mem_triton:session_commits_total")
    expected = [bench.generate(prompts[0]), bench.generate(prompts[3])]
    assert [server.tokens(p, fields=session("http")) for p in (prompts[0], prompts[3])] == expected
    frozen = bench.generate(prompts[1], write=False)
    answers = at_once(4, lambda _: server.tokens(prompts[1], fields=session("http", mem_write=0)))  # many readers
    assert answers == [frozen] * 4
    assert server.tokens(prompts[1]) == bench.fresh(prompts[1])
    assert server.metric("mem_triton:session_commits_total") == commits + 2


def many_sessions_at_once(server: ServerProcess, bench: Bench, prompts: Prompts) -> None:
    def ask(texts: Prompts) -> list[list[int]]:
        return at_once(8, lambda i: server.tokens(texts[i % 4], fields=session(f"many-{i}")))

    ask(prompts)
    for i, answer in enumerate(ask(prompts[::-1])):
        bench.forget()
        bench.generate(prompts[i % 4])
        assert answer == bench.generate(prompts[::-1][i % 4])


def a_busy_session_is_refused_and_an_aborted_one_commits_nothing(
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


def stop_strings_end_normally(server: ServerProcess, bench: Bench, prompts: Prompts) -> None:
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


def a_session_file_of_another_adapter_is_400(server: ServerProcess, folder: Any, prompts: Prompts) -> None:
    (folder / "broken.safetensors").write_bytes(b"not a file of ours")
    response = server.complete(prompts[0], fields=session("broken"))
    assert response.status_code == 400 and "cannot read" in response.text
    assert server.tokens(prompts[0], 1), "the server lives"


def bad_fields_are_400(server: ServerProcess, prompt: list[int], fields: Any, message: str) -> None:
    """Before anything runs: a stream, too, answers with the status."""
    for stream in (False, True):
        response = server.complete(prompt, fields=fields, stream=stream)
        assert response.status_code == 400 and message in response.text
    assert server.tokens(prompt, 1), "the server lives"


# Explicit memory, of a server with three pages.


def memory_beyond_the_context_is_400(server: ServerProcess, context: int = 4096) -> None:
    """Entry alpha has 40 tokens."""
    for stream in (False, True):
        response = server.complete([5] * (context - 36), 4, fields=ids("alpha"), stream=stream)
        assert response.status_code == 400, response.text
        assert "40 tokens" in response.text and f"{context} tokens" in response.text
    assert server.complete([5] * (context - 42), 4, fields=ids("alpha")).json()["usage"]["completion_tokens"] == 2


def many_requests_share_three_pages(server: ServerProcess, b: MemoryBench) -> None:
    names = ("alpha", "beta", "gamma")
    answers = at_once(12, lambda i: server.tokens(PROMPTS[i % 4], fields=ids(names[i % 3])))
    assert answers == [b.after(PROMPTS[i % 4], names[i % 3]) for i in range(12)]
    assert server.metric("mem_triton:pool_evictions_total") > 0


def a_tenant_reads_its_own(server: ServerProcess, b: MemoryBench) -> None:
    assert server.tokens(PROMPTS[0], fields=ids(SECRET, mem_tenant="acme")) == b.after(PROMPTS[0], "alpha")


def a_request_that_waits_for_pages_delays_nobody_and_a_client_that_leaves_frees_them(
    server: ServerProcess, b: MemoryBench
) -> None:
    plain, alpha, gamma = (b.after(PROMPTS[1], *names) for names in ((), ("alpha",), ("gamma",)))
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


def a_waiting_client_that_leaves_is_forgotten(server: ServerProcess, b: MemoryBench) -> None:
    holding = server.stream(PROMPTS[0], 3000, fields=ids("alpha"))
    next(holding)
    with pytest.raises(httpx.ReadTimeout):
        server.complete(PROMPTS[1], 4, fields=ids("gamma"), patience=1)
    until(lambda: not server.metric("mem_triton:pool_waiting_requests"), "it still waits, for nobody")
    holding.close()
    assert server.tokens(PROMPTS[1], fields=ids("beta")) == b.after(PROMPTS[1], "beta")


def a_prompt_is_captured(server: ServerProcess, b: MemoryBench) -> None:
    text = tokens_of(60, 37)
    answer = server.complete(text, 3, fields={"mem_capture": "http-note", "mem_tenant": "acme"})
    assert server.report(answer)["capture"] == {"id": f"{(note := 'capture.acme:http-note')}@1"}
    assert server.tokens(PROMPTS[0], fields=ids(note, mem_tenant="acme")) == b.generate(text + PROMPTS[0])
    assert server.complete(PROMPTS[0], fields=ids(note)).status_code == 400, "it is acme's"
    assert server.metric("mem_triton:captures_total") > 0


def captures_that_end_together_are_all_kept(server: ServerProcess, b: MemoryBench) -> None:
    texts = [tokens_of(70 + i, 16 + i) for i in range(8)]
    at_once(8, lambda i: server.tokens(texts[i], 2, fields={"mem_capture": f"together-{i}"}))
    for i in (0, 3, 7):
        assert server.tokens(PROMPTS[0], fields=ids(f"capture:together-{i}")) == b.generate(texts[i] + PROMPTS[0])
