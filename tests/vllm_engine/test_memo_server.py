"""MeMo on a real ``vllm serve``: one name for both models beside the server's own, which answer as they did."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator

import pytest

from mem_triton.runtime.serving import Serving
from tests.support import memo_server_scenarios as scenarios
from tests.support.memo import ScriptedServer
from tests.support.server import ServerProcess, free_port, spawn
from tests.vllm_engine.engine import ROOT, environment
from tests.vllm_engine.server import Server

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def scripted(tmp_path_factory) -> Iterator[ScriptedServer]:
    server = ScriptedServer(tmp_path_factory.mktemp("scripted"))
    yield server
    server.stop()


@pytest.fixture
def executive(scripted):
    scripted.reset()
    return scripted


def start(lora_bench, memory: dict, log: str) -> Server:
    """With the options that ``mem-triton serve`` gives, and an adapter under the name "memo"."""
    serving = Serving("vllm", str(lora_bench.model), memory, {"memo": lora_bench.lora})
    serving.check()
    return Server(
        str(lora_bench.model),
        log,
        serving.options(),
        **{**serving.environment, "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"},
    )


@pytest.fixture(scope="module")
def server(lora_bench, scripted, tmp_path_factory) -> Iterator[Server]:
    """A model with δ-mem and an adapter; the executive is elsewhere."""
    memory = {**lora_bench.memory, "memo": scenarios.section(scripted.spec("executive"))}
    server = start(lora_bench, memory, str(tmp_path_factory.mktemp("server") / "log"))
    try:
        yield scenarios.ready(server)
    finally:
        server.stop()


@pytest.fixture(scope="module")
def stock(lora_bench, tmp_path_factory) -> Iterator[Server]:
    """The same without MeMo and without the plugin's routes."""
    server = start(lora_bench, lora_bench.memory, str(tmp_path_factory.mktemp("stock") / "log"))
    try:
        yield server.wait()
    finally:
        server.stop()


def test_d1_both_models_are_one_name_and_the_memory_model_is_an_adapter_of_this_server(server, executive, lora_bench):
    scenarios.both_models_are_one_name(server, executive, lora_bench)


def test_it_is_listed_and_the_server_s_models_too(server, stock):
    scenarios.it_is_listed(server, stock)


def test_a_stream_gives_progress_then_the_answer(server, executive):
    scenarios.a_stream_gives_progress_then_the_answer(server, executive)


@pytest.mark.parametrize("name", scenarios.OTHERS)
def test_answers_of_the_server_s_own_models_are_as_they_were(server, stock, name):
    scenarios.answers_of_other_models_are_as_they_were(server, stock, name)


def test_what_cannot_be_served_is_400_by_name(server, executive):
    scenarios.what_cannot_be_served_is_400_by_name(server, executive)


def test_other_routes_refuse_the_name(server):
    scenarios.other_routes_refuse_the_name(server)


def test_the_trace_s_field_is_for_that_model_alone(server):
    scenarios.the_trace_s_field_is_for_that_model_alone(server)


def test_an_executive_that_is_down_is_502_with_the_reason(server, executive):
    scenarios.an_executive_that_is_down_is_502(server, executive)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_cancels_the_calls_and_a_full_queue_is_429(server, executive, stream):
    scenarios.a_client_that_leaves_cancels_the_calls(server, executive, stream)


def test_a_world_is_answered_through_the_server(server, executive):
    scenarios.a_world_is_not_made_up(server)


def test_d2_a_trace_replays(server, executive, tmp_path):
    scenarios.a_trace_replays(server, executive, tmp_path)


def test_d3_budgets_hold(server, executive):
    scenarios.budgets_hold(server, executive)


def test_d4_malformed_json_ends_no_run(server, executive):
    scenarios.malformed_json_ends_no_run(server, executive)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_the_engine(server, executive, stream):
    scenarios.a_client_that_leaves_frees_the_engine(server, executive, stream)


def test_an_adapter_is_replaced_while_it_serves(server, executive, lora_bench, tmp_path):
    other = scenarios.adapter_of_nothing(tmp_path / "other", lora_bench.lora)
    scenarios.an_adapter_is_replaced_while_it_serves(server, executive, lora_bench, other)


@pytest.mark.slow
def test_the_command_becomes_the_server_and_ends_as_it_does(lora_bench, tmp_path):
    port = free_port()
    command = [sys.executable, "-m", "mem_triton.cli", "serve", str(lora_bench.model), "--memo", str(lora_bench.lora)]
    options = ["--", "--served-model-name", "m", "--port", str(port), "--dtype", "float32", "--enforce-eager"]
    options += ["--max-model-len", "4096", "--gpu-memory-utilization", "0.3", "--block-size", "32"]
    log = tmp_path / "log"
    server = ServerProcess(spawn([*command, "--engine", "vllm", *options], environment(), ROOT, log), port, log)
    try:
        scenarios.names_are(server.wait(), "m", "memo", "m+memo")
        os.kill(server.process.pid, signal.SIGTERM)
        assert server.process.wait(60) == 0, server.printed()[-2000:]
    finally:
        server.stop()
