"""MeMo on a real ``vllm serve``: one name for both models beside the server's own, which answer as they did."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import torch

from mem_triton.runtime.serving import Serving
from tests.support.memo_crowd_scenarios import *  # noqa: F403
from tests.support.memo_server_scenarios import *  # noqa: F403
from tests.support.memo_server_scenarios import (
    TOKENS,
    Start,
    asks,
    long_answer,
    names_are,
    ready,
    replaced_in_flight,
    scaled,
    section,
    trace_of,
)
from tests.support.server import ServerProcess, free_port, spawn, until
from tests.vllm_engine.engine import ROOT, environment
from tests.vllm_engine.server import Server

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def start(lora_bench) -> Start:
    def start(memory: dict, log: str) -> Server:
        """With the options that ``mem-triton serve`` gives."""
        serving = Serving("vllm", str(lora_bench.model), memory, {"memo": lora_bench.lora})
        serving.check()
        env = {**serving.environment, "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
        return Server(str(lora_bench.model), log, serving.options(), **env)

    return start


def test_an_executive_of_the_server_that_samples_does_not_end_it(lora_bench, tmp_path):
    """vLLM on a CPU ends with a seeded, sampled request whose prompt is read in parts: calls go without their seeds."""
    serving = Serving("vllm", str(lora_bench.model), {"memo": section("m")}, {"memo": lora_bench.lora})
    serving.check()
    flags = [*serving.options(), "--max-num-batched-tokens", "64", "--max-num-seqs", "8"]
    server = Server(str(lora_bench.model), str(tmp_path / "log"), flags, **serving.environment)
    try:
        server.wait()
        messages = [{"role": "user", "content": "Who has a kite? " * 30}]
        asked = {"messages": messages, "temperature": 0.8, "seed": 3, "max_tokens": 64}
        said = server.http.post("/v1/chat/completions", json=asked | {"model": "m+memo"})
        assert said.status_code in (200, 502), said.text
        plain = server.http.post("/v1/chat/completions", json=asked | {"model": "m", "temperature": 0})
        assert plain.status_code == 200, plain.text
        assert "sample without their seeds" in server.printed()
    finally:
        server.stop()


def test_a_request_that_comes_while_an_adapter_is_replaced_waits_and_is_answered_by_one_of_the_two(
    server, lora_bench, tmp_path
):
    """By the one that its name stood for when it came, or by the new one; those behind it by the new one."""
    other = scaled(tmp_path / "other", lora_bench.lora, 4.0)
    server.load_adapter("memo", other)
    new = long_answer(server)
    server.load_adapter("memo", lora_bench.lora)
    with ThreadPoolExecutor(3) as pool:
        asked = pool.submit(long_answer, server)
        until(lambda: server.inside() == 1, "the request is in the engine")
        replaced = pool.submit(server.load_adapter, "memo", other)
        time.sleep(0.2)
        assert not asked.done() and not replaced.done(), "the load waits for the request"
        behind = pool.submit(long_answer, server)
        replaced.result()
        assert asked.result() != new and behind.result() in (asked.result(), new)
        assert long_answer(server) == new
    server.load_adapter("memo", lora_bench.lora)


@pytest.mark.slow
def test_control_stock_vllm_replaces_an_adapter_under_the_request_that_it_answers(lora_bench, tmp_path):
    """Negative control, and why memory's engine waits. (Of an adapter that was itself loaded in place, every step reads
    the files anew.)"""
    flags = ["--enable-lora", "--max-lora-rank", "8", "--lora-modules", f"memo={lora_bench.lora}"]
    server = Server(str(lora_bench.model), str(tmp_path / "log"), flags, VLLM_ALLOW_RUNTIME_LORA_UPDATING="1")
    try:
        server.wait()
        other = scaled(tmp_path / "other", lora_bench.lora, 4.0)
        undisturbed, disturbed, new = replaced_in_flight(server, lora_bench.lora, other)
        assert disturbed not in (undisturbed, new)
    finally:
        server.stop()


@pytest.mark.slow
def test_the_command_becomes_the_server_and_ends_as_it_does(lora_bench, tmp_path):
    port = free_port()
    command = [sys.executable, "-m", "mem_triton.cli", "serve", str(lora_bench.model), "--memo", str(lora_bench.lora)]
    options = ["--", "--served-model-name", "m", "--port", str(port), "--dtype", "float32", "--enforce-eager"]
    options += ["--max-model-len", "4096", "--gpu-memory-utilization", "0.3", "--block-size", "32"]
    log = tmp_path / "log"
    server = ServerProcess(spawn([*command, "--engine", "vllm", *options], environment(), ROOT, log), port, log)
    try:
        names_are(server.wait(), "m", "memo", "m+memo")
        os.kill(server.process.pid, signal.SIGTERM)
        assert server.process.wait(60) == 0, server.printed()[-2000:]
    finally:
        server.stop()


@pytest.mark.slow
def test_a_merged_memory_model_is_a_second_server_and_both_end_together(lora_bench, executive, tmp_path):
    """Its replies are the adapter's. Killed with -9, the command leaves neither of them behind."""
    shutil.copytree(lora_bench.lora, tmp_path / "adapter")
    config = tmp_path / "mem.yaml"
    config.write_text(json.dumps({"memo": section(executive.spec("executive"))}))
    port = free_port()
    command = [sys.executable, "-m", "mem_triton.cli", "serve", str(lora_bench.model), "--config", str(config)]
    command += ["--memo", str(tmp_path / "adapter"), "--memo-merged", "--engine", "vllm", "--"]
    command += ["--served-model-name", "m", "--port", str(port), "--dtype", "float32", "--enforce-eager"]
    command += ["--max-model-len", "4096", "--gpu-memory-utilization", "0.3", "--block-size", "32"]
    log = tmp_path / "log"
    server = Merged(spawn(command, environment(), ROOT, log), port, log)
    beside = f"http://127.0.0.1:{port + 1}/v1/models"
    try:
        names_are(ready(server), "m", "m+memo")
        executive.reset()
        assert [model["id"] for model in httpx.get(beside, timeout=60).json()["data"]] == ["memo"]
        asks(executive, "Who has a kite?")
        calls = trace_of(server, temperature=0)["mem_triton"]["memo"]["calls"]
        (said,) = [call["text"] for call in calls if call["to"] == "memory"]
        assert said == unmerged_text(lora_bench, "Who has a kite?")
        server.process.kill()
        for url in (beside, f"http://127.0.0.1:{port}/v1/models"):
            until(lambda url=url: not _answers(url), f"{url} ends with the command", 90)
    finally:
        server.stop()


def unmerged_text(lora_bench, question: str) -> str:
    """What the model with the adapter beside its weights says, by peft."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(lora_bench.model)
    model = AutoModelForCausalLM.from_pretrained(lora_bench.model, dtype=torch.float32)
    messages = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False, return_tensors="pt")
    adapted = PeftModel.from_pretrained(model, lora_bench.lora)
    out = adapted.generate(prompt, max_new_tokens=TOKENS, do_sample=False)
    return tokenizer.decode(out[0, prompt.shape[1] :], skip_special_tokens=True)


class Merged(ServerProcess):
    """The first server of the two."""

    fields_in = Server.fields_in


def _answers(url: str) -> bool:
    try:
        return bool(httpx.get(url, timeout=5))
    except httpx.HTTPError:
        return False
