"""The sources that the tests import, and the order of the tests."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.support import checkout

# Beside other files on a busy machine a slow draw says nothing of the test.
settings.register_profile("side by side", suppress_health_check=[HealthCheck.too_slow], deadline=None)
settings.load_profile("side by side")

checkout.prefer()

LONGEST = (
    "ops/test_in_interpreter",
    "ops/test_memory_attention_aot",
    "vllm_engine/test_launches",
    "vllm_engine/test_pools",
    "vllm_engine/test_memo_server",
    "vllm_engine/test_memory",
    "vllm_engine/test_correctness",
    "vllm_engine/test_memory_server",
    "vllm_engine/test_sessions",
    "demo/test_demo",
    "vllm_engine/test_real_model",
    "vllm_engine/test_warmup",
    "vllm_engine/test_memory_mix",
    "ops/test_memory_cascade_aot",
    "vllm_engine/test_mplus",
    "vllm_engine/test_stock_attention",
    "vllm_engine/test_refusals",
    "vllm_engine/test_off_switch",
    "vllm_engine/test_documents",
    "vllm_engine/test_session_server",
    "vllm_engine/test_pools_server",
    "vllm_engine/test_artifacts_server",
    "vllm_engine/test_captures_server",
    "vllm_engine/test_weights",
    "cli/test_cli",
    "cli/test_fuzz",
    "transformers/test_delta_training",
    "recall/test_explicit",
    "house/test_readme",
    "memoryllm/test_pools_kill",
    "sglang_engine/test_memory",
    "sglang_engine/test_sessions",
    "sglang_engine/test_graphs",
    "sglang_engine/test_memo_adapters",
    "sglang_engine/test_session_server",
    "sglang_engine/test_warmup",
    "sglang_engine/test_delta",
    "sglang_engine/test_memo_server",
    "sglang_engine/test_off_switch",
    "sglang_engine/test_memory_server",
    "sglang_engine/test_demo",
    "sglang_engine/test_kernels",
    "sglang_engine/test_memory_pools",
    "sglang_engine/test_pools",
    "sglang_engine/test_memory_capture",
    "sglang_engine/test_mplus",
    "sglang_engine/test_pools_server",
)
"""Files of tests that take longest, as a whole run with ``--durations`` shows, longest first."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files come first, then others that run an engine or kernels, then those of many tests: each of two workers
    takes the next file when it has done one, so both end at about the same time."""
    here = Path(__file__).parent
    rank = {here / f"{name}.py": number for number, name in enumerate(LONGEST)}
    long = {item.path for item in items if any(map(item.get_closest_marker, ("engine", "kernels")))}
    tests = Counter(item.path for item in items)
    items.sort(key=lambda item: (rank.get(item.path, len(rank)), item.path not in long, -tests[item.path], item.path))
