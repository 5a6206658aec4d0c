"""A memory system of another distribution, on real SGLang: the integration knows the contract and nothing of it."""

from __future__ import annotations

import pytest

from tests.sglang_engine.engine import run_engine
from tests.support import toy_scenarios as scenarios

pytestmark = pytest.mark.engine


def test_a_foreign_system_answers_as_transformers_do(memory_bench):
    scenarios.a_foreign_system_answers_as_transformers_do(memory_bench, run_engine)


def test_without_its_distribution_its_section_is_unknown(memory_bench):
    scenarios.without_the_distribution_the_section_is_unknown(memory_bench, run_engine)
