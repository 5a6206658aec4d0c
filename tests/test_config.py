"""The configuration schema and the version gate: every error names the key and the fix."""

from __future__ import annotations

import subprocess
import sys

import pytest

from mem_triton import compat
from mem_triton.config import ConfigError, parse_config


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
        ({"max_sessions": "many"}, r"mem_triton\.max_sessions: .*integer"),
        ("delta", r"mem_triton must be a JSON object, got str"),
    ],
)
def test_bad_config_names_the_key(section, message):
    with pytest.raises(ConfigError, match=message):
        parse_config(section)


def test_importing_mem_triton_imports_no_engine():
    code = (
        "import sys, mem_triton, mem_triton.config, mem_triton.compat, mem_triton.delta_mem, mem_triton.runtime.slots,"
        " mem_triton.runtime.sessions, mem_triton.ops.delta_rule;"
        "bad = {'vllm', 'sglang', 'transformers'} & set(sys.modules); assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_version_outside_the_range_is_refused(monkeypatch):
    monkeypatch.setattr(compat, "installed_version", lambda name: compat.Version("0.33.1"))
    with pytest.raises(compat.UnsupportedVersionError, match=r'vllm 0\.33\.1 .*pip install "vllm>=0\.32'):
        compat.require("vllm")
    monkeypatch.setattr(compat, "installed_version", lambda name: compat.Version("0.32.0+cpu"))
    assert compat.require("vllm").base_version == "0.32.0"
