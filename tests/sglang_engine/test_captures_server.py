"""Captures and tenants over real HTTP: who may keep and read what, and what becomes of captures that fail."""

from __future__ import annotations

import pytest

from tests.support.capture_scenarios import *  # noqa: F403

pytestmark = pytest.mark.engine
