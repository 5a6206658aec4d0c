"""A memory system of another distribution, on real vLLM: the integration knows the contract and nothing of it."""

from __future__ import annotations

import pytest

from tests.support.toy_scenarios import *  # noqa: F403

pytestmark = pytest.mark.engine
