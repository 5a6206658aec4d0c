"""Captures and tenants over real HTTP: who may keep and read what, and what becomes of captures that fail."""

from __future__ import annotations

import pytest

from tests.support.capture_scenarios import *  # noqa: F403
from tests.support.capture_scenarios import section

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def server(memory_bench, start_server):
    return start_server(memory_bench.model, section(memory_bench), ["--trust-request-chat-template"])


def test_fault07_a_chat_of_another_template_is_refused(server):
    response = server.chat(
        "hello", 2, fields={"mem_capture": "odd"}, chat_template="{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    assert response.status_code == 400 and "where they end is unknown" in response.text
