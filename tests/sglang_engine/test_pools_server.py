"""MemoryLLM's pools over real HTTP on SGLang: writes while others read, tenants, and what fails on the way."""

from __future__ import annotations

import pytest

from tests.support.pool_server_scenarios import *  # noqa: F403

pytestmark = pytest.mark.engine
