"""One scripted server for the tests of a file, and one that is slow."""

from __future__ import annotations

import pytest

from tests.support.memo import ScriptedServer


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    server = ScriptedServer(tmp_path_factory.mktemp("scripted"))
    yield server
    server.stop()


@pytest.fixture
def server(running):
    running.reset()
    return running


@pytest.fixture(scope="module")
def slow(tmp_path_factory):
    """Each request takes 0.3 s; schemas are refused; a key is wanted."""
    options = ("--delay", "0.3", "--no-schemas", "--key", "secret")
    server = ScriptedServer(tmp_path_factory.mktemp("slow"), *options)
    yield server
    server.stop()
