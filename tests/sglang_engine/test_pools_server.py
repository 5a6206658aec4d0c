"""MemoryLLM's pools over real HTTP on SGLang: writes while others read, tenants, and what fails on the way."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from mem_triton.systems.memoryllm.pools import Pools
from tests.sglang_engine.server import Server
from tests.support import pool_server_scenarios as scenarios
from tests.support.pool_bench import PoolBench, make_pool_bench

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def pool_bench(tmp_path_factory) -> PoolBench:
    return make_pool_bench(tmp_path_factory.mktemp("pools"))


@pytest.fixture(scope="module")
def store(pool_bench, tmp_path_factory) -> Path:
    """With a pool of a tenant's own, which no other finds."""
    store = pool_bench.store(tmp_path_factory.mktemp("store"))
    with Pools.open(store, writable=True) as pools:
        pools.add("hidden", pools.rows("main"), "secret")
    return store


@pytest.fixture(scope="module")
def server(pool_bench, store, tmp_path_factory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("server") / "server.log"
    section = pool_bench.section(store, chunk=32, versions=2, layers_per_step=1)
    server = Server(pool_bench.model, log, section)
    try:
        yield server.wait()
    finally:
        server.stop()


def test_c3_c8_a_text_is_written_and_read(server, pool_bench, store, tmp_path):
    scenarios.a_text_is_written_and_read(server, pool_bench, store, tmp_path)


def test_chats_write_and_read(server):
    scenarios.chats_write_and_read(server)


def test_streams_write(server, store):
    scenarios.streams_write(server, store)


@scenarios.bad_fields()
def test_bad_fields_are_400(server, store, fields, others, message):
    scenarios.bad_fields_are_400(server, store, fields, others, message)


def test_a_text_that_cannot_be_written_is_400(server):
    scenarios.a_text_that_cannot_be_written_is_400(server)


def test_c6_tenants_have_pools_of_their_own(server, pool_bench, store):
    scenarios.tenants_have_pools_of_their_own(server, pool_bench, store)


def test_running_requests_keep_their_version(server, pool_bench, store):
    scenarios.running_requests_keep_their_version(server, pool_bench, store)


def test_writes_come_one_after_the_other(server, pool_bench, store, tmp_path):
    scenarios.writes_come_one_after_the_other(server, pool_bench, store, tmp_path)


def test_a_client_that_leaves_loses_nothing(server, store):
    scenarios.a_client_that_leaves_loses_nothing(server, store)


def test_what_cannot_be_stored_is_not_acknowledged(server, pool_bench, store):
    scenarios.what_cannot_be_stored_is_not_acknowledged(server, pool_bench, store)


def test_others_change_the_store_between_writes(server, pool_bench, store):
    scenarios.others_change_the_store_between_writes(server, pool_bench, store)


def test_a_writer_waits_until_its_readers_have_ended(server, pool_bench, store):
    scenarios.a_writer_waits_until_its_readers_have_ended(server, pool_bench, store)


def test_a_killed_worker_takes_nothing_that_was_acknowledged(server, store):
    """The last test of this server."""

    def kill() -> None:
        for child in psutil.Process(server.process.pid).children(recursive=True):
            os.kill(child.pid, signal.SIGKILL)

    scenarios.a_killed_worker_takes_nothing_that_was_acknowledged(server, store, kill)
