"""Installed but not asked for, SGLang is the stock engine; asked for wrongly, it says so before it starts anything."""

from __future__ import annotations

import json
import subprocess

import pytest

from tests.sglang_engine.engine import DEFAULTS, environment, run_python, write_config


def python(code: str, *arguments: str, fresh: bool = False, **env: str) -> subprocess.CompletedProcess[str]:
    return run_python(["-c", code, *arguments], environment(**env), fresh=fresh)


UNTOUCHED = """
import pytest
from sglang.srt.plugins import load_plugins
from sglang.srt.plugins.hook_registry import HookRegistry
load_plugins()
assert not HookRegistry._hooks and not HookRegistry._patched, HookRegistry._hooks
from sglang.srt.arg_groups.resolution_hooks import _HOOKS
assert not _HOOKS, _HOOKS
from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
from mem_triton.config import ConfigError
with pytest.raises(ConfigError, match="set MEM_TRITON_CONFIG to a YAML file"):
    ATTENTION_BACKENDS["mem_triton"](None)
"""


def test_without_the_variable_nothing_is_hooked():
    result = python(UNTOUCHED)
    assert result.returncode == 0, result.stderr[-3000:]


COUNTS = """
import sys
from sglang.srt.plugins import load_plugins
load_plugins()
from sglang.srt.plugins.hook_registry import HookRegistry
assert HookRegistry._hooks
assert "prometheus_client" not in sys.modules, "it decides at its import where counts are kept"
"""


def test_hooks_import_nothing_that_decides_where_counts_are_kept(tmp_path):
    """SGLang says that to ``prometheus_client`` when a server starts; a process that has it already shows no counts."""
    config = write_config({"delta": {"adapter": "a"}})
    result = python(COUNTS, fresh=True, MEM_TRITON_CONFIG=str(config))
    assert result.returncode == 0, result.stderr[-3000:]


FOREIGN = """
import pytest
from sglang.srt.mem_cache.memory_pool import ReqToTokenPool
ReqToTokenPool.release = ReqToTokenPool.free  # an SGLang that gave it another name
del ReqToTokenPool.free
from sglang.srt.plugins import load_plugins
load_plugins()
from mem_triton_sglang.hooks import check_hooks
from sglang.srt.managers.tokenizer_manager import TokenizerManager
del TokenizerManager._tokenize_texts
gone = r"ReqToTokenPool\\.free.*TokenizerManager\\._tokenize_texts"
with pytest.raises(RuntimeError, match=gone + r".* Supported: sglang>=0\\.5\\.23,<0\\.5\\.24"):
    check_hooks()
"""


def test_a_hook_that_sglang_only_logged_is_found(tmp_path):
    """SGLang goes on without a hook whose target is gone; the answers would be wrong."""
    config = write_config({"delta": {"adapter": "nobody/nothing"}}, tmp_path)
    result = python(FOREIGN, MEM_TRITON_CONFIG=str(config))
    assert result.returncode == 0, result.stderr[-3000:]
    assert "Failed to apply hooks" in result.stderr + result.stdout


RESOLVE = """
import json, os, sys
from sglang.srt.plugins import load_plugins
load_plugins()
from sglang.srt.server_args import ServerArgs
for options in json.loads(sys.argv[1]):
    os.environ.update(env := options.pop("env", {}))
    try:
        args = ServerArgs(**options)
        args.resolve_once()
        print("RESOLVED")
    except Exception as error:
        print(f"ERROR {type(error).__name__}: {error}")
    for name in env:
        del os.environ[name]
"""
REFUSED = {
    "--dp-size": {"dp_size": 2},
    "--tokenizer-worker-num": {"tokenizer_worker_num": 2},
    "--smg-grpc-mode": {"smg_grpc_mode": True},
    "--grpc-port": {"grpc_port": 30001},
    "SGLANG_RUST_SERVER": {"env": {"SGLANG_RUST_SERVER": "1"}},
    "--nnodes": {"nnodes": 2, "tp_size": 2, "dist_init_addr": "127.0.0.1:1"},
    "speculative decoding": {"speculative_algorithm": "NGRAM"},
    "--dcp-size": {"dcp_size": 2, "tp_size": 2},
    "--enable-hisparse": {"enable_hisparse": True},
    "--enable-hierarchical-cache": {"enable_hierarchical_cache": True},
    "--enable-two-batch-overlap": {"enable_two_batch_overlap": True},
    "disaggregation": {"disaggregation_mode": "prefill"},
    "--decode-attention-backend": {"decode_attention_backend": "torch_native"},
    "--attention-backend is None": {"attention_backend": None},
}


MOVED = """
import pytest, sys
sys.modules["sglang.srt.mem_cache.memory_pool"] = None  # an SGLang that moved it: importing it raises ImportError
from mem_triton_sglang import _factory
with pytest.raises(RuntimeError, match=r"lacks what mem_triton builds on.* Supported: sglang>=0\\.5\\.23"):
    _factory()(None)
"""


def test_a_foreign_sglang_keeps_working_and_refuses_the_backend(tmp_path):
    config = write_config({"delta": {"adapter": "nobody/nothing"}}, tmp_path)
    result = python(MOVED, fresh=True, MEM_TRITON_CONFIG=str(config))
    assert result.returncode == 0 and "mem_triton is off" in result.stderr, result.stderr[-3000:]


BROKEN = """
import os, pytest, sys
from sglang.srt.arg_groups import resolution_hooks
from sglang.srt.layers.attention import attention_registry
from sglang.srt.plugins.hook_registry import HookRegistry
import mem_triton_sglang
BACKENDS = attention_registry.ATTENTION_BACKENDS

class Raises:
    error = None
    def find_spec(self, name, path=None, target=None):
        if name == "mem_triton_sglang.radix_keys":  # in the middle of the table of hooks
            raise self.error

def stock():
    return not HookRegistry._hooks and not any(resolution_hooks._HOOKS.values())

def refuses(*said):
    mem_triton_sglang.register()
    assert stock(), (HookRegistry._hooks, resolution_hooks._HOOKS)
    with pytest.raises(RuntimeError) as refusal:
        BACKENDS["mem_triton"](None)
    assert all(word in str(refusal.value) for word in (*said, "sglang>=0.5.23")), refusal.value
    del BACKENDS["mem_triton"]

sys.meta_path.insert(0, Raises())
for error in (RuntimeError("a"), SyntaxError("b"), AttributeError("c"), OSError("d"), SystemExit(3), MemoryError()):
    Raises.error = error
    refuses(type(error).__name__, str(error))
del sys.meta_path[0]

steps = resolution_hooks._OVERRIDABLE_HOOKS
resolution_hooks._OVERRIDABLE_HOOKS = frozenset({"handle_cuda_graph_config"})
refuses("not an overridable resolution hook")  # after all hooks and the first step

resolution_hooks._OVERRIDABLE_HOOKS = steps
register_backend, attention_registry.register_attention_backend = attention_registry.register_attention_backend, None
mem_triton_sglang.register()  # nothing to hang a refusal on: it is logged
assert "mem_triton" not in BACKENDS

attention_registry.register_attention_backend = register_backend
mem_triton_sglang.register()  # control: without the fault there is a backend with its hooks
assert not stock() and "mem_triton" in BACKENDS
"""


def test_fault_versions_no_failure_of_ours_reaches_sglang(tmp_path):
    config = write_config({"delta": {"adapter": "nobody/nothing"}}, tmp_path)
    result = python(BROKEN, fresh=True, SGLANG_PLUGINS="other", MEM_TRITON_CONFIG=str(config))
    assert result.returncode == 0, result.stderr[-3000:]
    assert "mem_triton is off, --attention-backend mem_triton cannot be used" in result.stderr


@pytest.fixture(scope="module")
def resolved(bench, tmp_path_factory) -> list[str]:
    """What SGLang says to each of REFUSED, and to plain options."""
    memo = {"memory": "m", "executive": "m", "name": "m+memo"}  # --grpc-port is refused beside it alone
    memory = {"delta": {"adapter": str(bench.adapter)}, "memo": memo}
    config = write_config(memory, tmp_path_factory.mktemp("config"))
    base = {"model_path": str(bench.model), **DEFAULTS, "attention_backend": "mem_triton"}
    result = python(
        RESOLVE,
        json.dumps([base, *({**base, **options} for options in REFUSED.values())]),
        MEM_TRITON_CONFIG=str(config),
    )
    lines = [line for line in result.stdout.splitlines() if line.startswith(("RESOLVED", "ERROR"))]
    assert len(lines) == 1 + len(REFUSED), result.stdout + result.stderr[-3000:]
    return lines


def test_plain_options_are_accepted(resolved):
    assert resolved[0] == "RESOLVED"


@pytest.mark.parametrize("option", REFUSED)
def test_options_under_which_memory_would_be_wrong_are_refused(resolved, option):
    line = resolved[1 + list(REFUSED).index(option)]
    assert line.startswith("ERROR ConfigError: ") and option in line, line


def test_a_bad_file_is_named(tmp_path):
    config = write_config({"delta": {"adaptor": "x"}}, tmp_path)
    code = "from mem_triton_sglang.configuration import configured; configured()"
    result = python(code, MEM_TRITON_CONFIG=str(config))
    assert 'Did you mean "adapter"' in result.stderr and str(config) in result.stderr
