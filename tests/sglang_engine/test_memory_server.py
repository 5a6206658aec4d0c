"""Explicit memory over real HTTP: ids, tenants, captures, retrieval, streams; a server that survives its requests."""

from __future__ import annotations

import concurrent.futures
import json

import httpx
import pytest

from mem_triton.store.pool.plan import Attachment
from tests.sglang_engine.server import Server
from tests.support.memory_bench import SECRET, reference, tokens_of
from tests.support.memory_scenarios import PROMPTS, three_pages
from tests.support.memory_server_scenarios import *  # noqa: F403
from tests.support.models import tiny_tokenizer
from tests.support.server import at_once, bad_fields_are_400, ids, until, whole

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def server(memory_bench, start_server) -> Server:
    """The bank of whole texts behind three pages: whoever wants another entry waits for its turn."""
    return start_server(memory_bench.model, three_pages(memory_bench, capture="own"))


def test_memory_over_http_and_what_was_read_is_in_the_answer(server, memory_bench):
    b, (short, middle, *_) = memory_bench, PROMPTS
    assert server.tokens(short, fields=ids("alpha")) == b.after(short, "alpha")
    assert server.tokens(short) == b.after(short)
    answer = server.generate(middle, fields=ids("beta")).json()
    assert answer["output_ids"] == b.after(middle, "beta")
    assert answer["meta_info"]["mem_triton"] == {"references": whole("beta")}
    assert answer["meta_info"]["prompt_tokens"] == len(middle), "memory is no prompt"
    assert "mem_triton" not in server.generate(middle).json()["meta_info"]


def test_openai_answers_say_what_was_read(server, memory_bench):
    response = server.complete(PROMPTS[1], fields=ids("beta"))
    assert response.json()["choices"][0]["token_ids"] == memory_bench.after(PROMPTS[1], "beta")
    assert server.report(response) == {"references": whole("beta")}
    assert server.report(server.chat("who?", 4, fields=ids("beta"))) == {"references": whole("beta")}
    assert server.report(server.chat("who?", 4)) is None


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"mem_ids": ["alpha", "nobody"]}, "nobody"),
        ({"mem_ids": [SECRET]}, SECRET),
        ({"mem_ids": [SECRET], "mem_tenant": "other"}, SECRET),
        ({"mem_ids": ["delta"]}, "need 7 memory pages"),
        ({"mem_ids": ["a b"]}, "is no id"),
        ({"mem_ids": [["alpha"]]}, "is no id"),
        ({"mem_ids": ["cold"]}, "no keys and values yet"),
        ({"mem_top_k": 2}, "does not retrieve"),
        ({"mem_capture": "x@1"}, "mem_capture"),
        ({"mem_session": "alice"}, "without mem_triton.delta"),
    ],
)
def test_bad_fields_are_400_that_name_the_id(server, said, message):
    bad_fields_are_400(server, PROMPTS[0], said, message)
    response = server.generate(PROMPTS[0], fields=said)
    assert response.status_code == 400 and message in response.text


def test_what_explicit_memory_cannot_serve_is_refused(server, memory_bench):
    for fields, message in (
        ({"session_params": {"id": "s"}}, "session_params"),
        ({"sampling_params": {"beam_width": 2}}, "beam search"),
    ):
        response = server.generate(PROMPTS[0], fields=ids("alpha"), **fields)
        assert response.status_code == 400 and message in response.text
    response = server.generate(PROMPTS[0], fields={"mem_capture": "twice"}, sampling_params={"n": 2})
    assert response.status_code == 400 and "set n to 1" in response.text
    response = server.generate(PROMPTS[0], fields={"mem_capture": "tuned"}, lora_path="some-adapter")
    assert response.status_code == 400 and "LoRA" in response.text


def test_a_batch_and_several_answers_read_their_own(server, memory_bench):
    """One call: prompts with memories that do not fit at the same time, and one without; then two answers of one."""
    b = memory_bench
    params = {"max_new_tokens": 12, "temperature": 0, "ignore_eos": True}
    said = [ids("alpha"), ids("gamma"), None, ids("beta")]
    body = {"input_ids": PROMPTS, "sampling_params": [{**params, "custom_params": w} for w in said]}
    expected = [b.after(PROMPTS[0], "alpha"), b.after(PROMPTS[1], "gamma"), b.after(PROMPTS[2])]
    expected.append(b.after(PROMPTS[3], "beta"))
    answers = server.http.post("/generate", json=body).json()
    assert [answer["output_ids"] for answer in answers] == expected
    assert [answer["meta_info"].get("mem_triton", {}).get("references") for answer in answers] == [
        whole("alpha"),
        whole("gamma"),
        None,
        whole("beta"),
    ]
    two = server.generate(PROMPTS[0], fields=ids("alpha"), sampling_params={"n": 2}).json()
    assert [answer["output_ids"] for answer in two] == [expected[0]] * 2
    last = {}
    for out in server.stream(PROMPTS[:2], 12, ids("alpha")):
        last[out["index"]] = out["output_ids"]
    assert last == {0: expected[0], 1: b.after(PROMPTS[1], "alpha")}
    body["sampling_params"][3]["custom_params"] = ids("nobody")
    assert server.http.post("/generate", json=body).status_code == 400


def pinned(server: Server) -> float:
    return server.metric("mem_triton:pool_pinned_pages")


@pytest.mark.parametrize("stream", [False, True])
def test_a_waiting_request_can_be_aborted_by_its_id(server, memory_bench, stream):
    holding = server.stream(PROMPTS[0], 3000, ids("alpha"))
    next(holding)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(server.generate, PROMPTS[1], fields=ids("gamma"), rid="waits", stream=stream)
        until(lambda: server.metric("mem_triton:pool_waiting_requests") > 0, "it does not wait")
        twice = server.generate(PROMPTS[1], fields=ids("alpha"), rid="waits")
        assert twice.status_code == 400 and "Duplicate request ID" in twice.text
        server.http.post("/abort_request", json={"rid": "waits"})
        response = waiting.result(30)
    assert '"type":"abort"' in response.text and response.status_code == 200
    assert server.metric("mem_triton:pool_waiting_requests") == 0
    server.http.post("/abort_request", json={"abort_all": True})
    *_, last = holding
    assert last["meta_info"]["finish_reason"]["type"] == "abort"
    assert pinned(server) == 0, "nothing is held"


def test_clients_that_come_and_go_leave_nothing_behind(server, memory_bench):
    """Thirty requests for three pages: read to the end, left after a few tokens, left at once, aborted by their id."""
    b, names = memory_bench, ("alpha", "beta", "gamma")

    def visit(i: int) -> bool:
        prompt, name = PROMPTS[i % 4], names[i % 3]
        if i % 5 == 0:
            return server.tokens(prompt, fields=ids(name)) == b.after(prompt, name)
        stream = server.stream(prompt, 400, ids(name), rid=f"visitor-{i}")
        if i % 5 == 1:
            with pytest.raises(httpx.ReadTimeout):
                params = {"max_new_tokens": 3900, "ignore_eos": True, "custom_params": ids(name)}
                server.http.post("/generate", json={"input_ids": prompt, "sampling_params": params}, timeout=0.3)
            return True
        for _ in range(i % 5 - 1):
            next(stream, None)  # a slow reader gets many tokens in one piece, and may find the end
        if i % 2:
            server.http.post("/abort_request", json={"rid": f"visitor-{i}"})
        stream.close()
        return True

    with concurrent.futures.ThreadPoolExecutor(10) as pool:
        assert all(pool.map(visit, range(30)))

    def nothing_is_held() -> bool:
        return not pinned(server) and not server.metric("mem_triton:pool_waiting_requests")

    until(nothing_is_held, "pages are held for somebody who is gone")
    assert server.tokens(PROMPTS[2], fields=ids("alpha")) == b.after(PROMPTS[2], "alpha")
    text = server.printed()
    assert "Traceback" not in text, text[text.index("Traceback") :][:3000]


def test_fault28_an_entry_that_cannot_be_read_fails_its_request_alone(server, memory_bench):
    b, shards, text = memory_bench, memory_bench.prefixes / "shards", tokens_of(90, 20)
    server.tokens(text, 2, {"mem_capture": "far"})  # lies in a file of its own, which nobody has opened yet
    shards.rename(shards.with_name("away"))
    try:
        failed = server.generate(PROMPTS[1], fields=ids("capture:far"))
        assert failed.status_code == 500 and "capture:far@1" in failed.text and "missing" in failed.text
        (out,) = server.stream(PROMPTS[1], 12, ids("capture:far"))
        assert out["meta_info"]["finish_reason"]["type"] == "abort" and not out["output_ids"]
        assert server.tokens(PROMPTS[1]) == b.after(PROMPTS[1]), "others go on"
    finally:
        shards.with_name("away").rename(shards)
    assert server.tokens(PROMPTS[1], fields=ids("capture:far")) == b.generate(text + PROMPTS[1]), (
        "the next one tries again"
    )
    assert pinned(server) == 0


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("/generate", {"input_ids": [5], "mem_ids": ["alpha"]}, "belongs into sampling_params.custom_params"),
        ("/generate", {"input_ids": [5], "custom_params": {"mem_ids": []}}, "belongs into sampling_params.custom"),
        ("/v1/completions", {"prompt": "x", "mem_ids": ["alpha"]}, "belongs into custom_params"),
        ("/v1/chat/completions", {"messages": [], "vllm_xargs": {"mem_ids": []}}, "belongs into custom_params"),
        ("/v1/responses", {"input": "x", "custom_params": {"mem_ids": []}}, "/v1/responses has no memory"),
        ("/v1/messages", {"messages": [], "mem_session": "s"}, "/v1/messages has no memory"),
        ("/v1/embeddings", {"input": "x", "custom_params": {"mem_ids": []}}, "/v1/embeddings has no memory"),
        ("/api/generate", {"prompt": "x", "options": {"mem_ids": []}}, "/api/generate has no memory"),
    ],
)
def test_fault06_no_route_drops_a_field(server, path, body, message):
    for stream in (False, True):
        response = server.http.post(path, json={"model": "m", "stream": stream, **body})
        assert response.status_code == 400 and message in response.text, response.text


def test_fault04_every_answer_of_several_comes_whole(server, memory_bench):
    prompt, expected = PROMPTS[1], memory_bench.after(PROMPTS[1], "beta")
    found = server.complete(prompt, fields=ids("beta"), n=3, temperature=0).json()
    assert [choice["token_ids"] for choice in found["choices"]] == [expected] * 3
    assert found["usage"]["completion_tokens"] == 36
    parts = list(server.stream(prompt, 12, ids("beta", mem_tenant="acme")))
    assert parts[-1]["output_ids"] == expected


def test_retrieval_over_http_streams_one_answer(memory_bench, start_server):
    b, prompt = memory_bench, reference(3) + reference(9)
    section = b.section(b.references, retrieval={"top_k": 2, "every": 32})
    server = start_server(b.model, section)
    expected, plan = b.retrieving(prompt, 70, top_k=2, every=32)
    *parts, last = server.stream(prompt, 70)
    assert last["output_ids"] == expected and last["meta_info"]["completion_tokens"] == 70
    assert last["meta_info"]["finish_reason"] == {"type": "length", "length": 70}
    assert all(part["meta_info"]["finish_reason"] is None for part in parts)
    assert all(last["text"].startswith(part["text"].rstrip("\ufffd")) for part in parts)
    assert last["meta_info"]["prompt_tokens"] == len(prompt)
    read = [e["id"] for part in last["meta_info"]["mem_triton"]["references"] for e in part["entries"]]
    assert sorted(read) == sorted(a.ref for a in plan)
    assert at_once(4, lambda _: server.tokens(prompt, 70)) == [expected] * 4
    assert server.tokens(prompt, fields={"mem_top_k": 0}) == b.generate(prompt)
    scored = server.generate(prompt, 70, return_logprob=True).json()["meta_info"]["output_token_logprobs"]
    assert [token for _, token, _ in scored] == expected
    assert server.report(server.chat("who?", 40))["references"]
    for seed in range(3):  # fault05: the tiny model says bytes, and few of them are characters of their own
        asked = {"temperature": 1.0, "sampling_seed": seed}
        answer = server.generate(prompt, 70, sampling_params=asked).json()
        assert answer["text"] == tiny_tokenizer().decode(answer["output_ids"], skip_special_tokens=True)
    sampled = server.generate(prompt, 40, sampling_params={"n": 2, "temperature": 1.0, "frequency_penalty": 0.1})
    assert sampled.status_code == 200 and "penalties" in sampled.json()[0]["meta_info"]["mem_triton"]["refresh"]
    assert server.metric("mem_triton:refresh_off_total") > 0


def test_a_server_whose_settings_ask_for_memory_and_whose_streams_are_incremental(memory_bench, start_server):
    """Words that the server's own ``--preferred-sampling-params`` say, for requests that say none."""
    b, prompt = memory_bench, reference(3) + reference(9)
    server = start_server(
        b.model,
        b.section(b.references, retrieval={"top_k": 1, "every": 32}, default=["ref-5"]),
        flags=[
            "--incremental-streaming-output",
            "--preferred-sampling-params",
            '{"custom_params": {"mem_top_k": 2, "mem_ids": []}}',
        ],
    )
    expected, _ = b.retrieving(prompt, 70, top_k=2, every=32)
    params = {"max_new_tokens": 70, "temperature": 0, "ignore_eos": True}
    body = {"input_ids": prompt, "sampling_params": params}
    answer = server.http.post("/generate", json=body).json()
    assert answer["output_ids"] == expected
    parts = []
    with server.http.stream("POST", "/generate", json={**body, "stream": True}) as lines:
        parts = [json.loads(line[6:]) for line in lines.iter_lines() if line.startswith("data: {")]
    assert len(parts) > 3 and [token for part in parts for token in part["output_ids"]] == expected
    assert "".join(part["text"] for part in parts) == answer["text"]
    default = [Attachment("ref-5@1")]
    assert server.tokens(prompt, fields={"mem_top_k": 0}) == b.with_plan(prompt, default), "the configured default"
    assert server.tokens(prompt, fields={"mem_top_k": 0, "mem_ids": []}) == b.generate(prompt)
