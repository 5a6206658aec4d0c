"""The configuration schema and the version gate: every error names the key and the fix."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from mem_triton import compat
from mem_triton.config import ConfigError, parse_config

ROOT = Path(__file__).parents[1]


def test_defaults():
    config = parse_config({"delta": {"adapter": "somewhere"}})
    assert (config.delta.adapter, config.delta.tokens_per_state, config.session_dir) == ("somewhere", None, None)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"dleta": {"adapter": "x"}}, r'mem_triton\.dleta: unknown key\. Did you mean "delta"\?'),
        (
            {"delta": {"adaptor": "x", "adapter": "y"}},
            r'mem_triton\.delta\.adaptor: unknown key\. Did you mean "adapter"',
        ),
        ({"delta": {}}, r"mem_triton\.delta\.adapter: Field required"),
        ({"delta": {"adapter": "x", "tokens_per_state": 0}}, r"mem_triton\.delta\.tokens_per_state: .*greater than"),
        ({"delta": {"adapter": "x", "scope": "session"}}, r"mem_triton\.delta\.scope: .*'all' or 'sessions'"),
        ({"max_sessions": "many"}, r"mem_triton\.max_sessions: .*integer"),
        ("delta", r"mem_triton must be a JSON object, got str"),
    ],
)
def test_bad_config_names_the_key(section, message):
    with pytest.raises(ConfigError, match=message):
        parse_config(section)


def test_fault16_the_scope_is_the_adapter_s_unless_the_configuration_says_one():
    said = [parse_config({"delta": {"adapter": "x", **more}}).delta.scope for more in ({}, {"scope": "sessions"})]
    assert said == [None, "sessions"]


def test_importing_mem_triton_imports_no_engine():
    code = (
        "import sys, mem_triton, mem_triton.config, mem_triton.compat, mem_triton.systems.delta_mem,"
        " mem_triton.systems.delta_mem.slots, mem_triton.systems.delta_mem.sessions, mem_triton.ops.delta_rule;"
        "bad = {'vllm', 'sglang', 'transformers'} & set(sys.modules); assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_version_outside_the_range_is_refused(monkeypatch):
    monkeypatch.setattr(compat, "installed_version", lambda name: compat.Version("0.31.1"))
    with pytest.raises(compat.UnsupportedVersionError, match=r'vllm 0\.31\.1 .*pip install "vllm>=0\.32'):
        compat.require("vllm")
    monkeypatch.setattr(compat, "installed_version", lambda name: None)
    with pytest.raises(compat.UnsupportedVersionError, match=r'not installed.*pip install "vllm>=0\.32'):
        compat.require("vllm")
    for version in ("0.32.0+cpu", "0.33.1"):
        monkeypatch.setattr(compat, "installed_version", lambda name, v=version: compat.Version(v))
        assert str(compat.require("vllm")) == version


def test_fault_versions_a_newer_version_starts_with_one_warning(monkeypatch, caplog):
    compat._warn.cache_clear()
    for version in ("0.33.0", "0.34.0rc1", "0.34.0rc1"):
        monkeypatch.setattr(compat, "installed_version", lambda name, v=version: compat.Version(v))
        assert str(compat.require("vllm")) == version
    (warning,) = caplog.messages
    assert "vllm 0.34.0rc1 is newer" in warning and 'pip install "vllm>=0.32.0,<0.34"' in warning


def test_fault_versions_one_range_of_each_package_and_of_python():
    """What is tested, what pip may install and what the scripts take are the same ranges."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"]
    tested = SpecifierSet(compat.TESTED_VERSIONS["transformers"])
    asked = [Requirement(line) for lines in extras.values() for line in lines]
    ranges = {str(r.specifier) for r in asked if r.name == "transformers"}
    assert ranges == {str(tested)}, ranges
    (vllm,) = (r.specifier for r in asked if r.name == "vllm")
    for version in ("0.31.9", "0.32.0", "0.32.5", "0.33.0", "0.33.9", "0.34.0", "0.40"):
        assert vllm.contains(version) == compat.lies_in(version, compat.TESTED_VERSIONS["vllm"]), version
    assert SpecifierSet(project["project"]["requires-python"]) == SpecifierSet(compat.PYTHON)
    assert project["tool"]["ruff"]["target-version"] == "py311"
    for file in ("README.md", "Makefile", "scripts/environment_common.sh"):
        text = (ROOT / file).read_text()
        assert "3.11 to 3.13" in text, file
        assert not re.search(r"Python 3\.10|python3\.10|3, 10", text), file
