"""State that a whole process shares stands in docs/architecture.md, or there is none."""

from __future__ import annotations

import ast
import itertools
import json
import os
import subprocess
import sys

import pytest

from tests.house.test_rules import ROOT, tracked

MAKERS = {"dict", "list", "set", "deque", "defaultdict", "OrderedDict", "WeakKeyDictionary", "WeakValueDictionary"}
MAKERS |= {"ContextVar", "local", "urandom", "count", "Event", "Lock", "RLock"}
"""What makes an object that changes, or differs from one process to the next."""

ENGINES = ("VLLM_", "SGLANG_")
"""How the variables begin that engines read."""

TABLES = {"mem_triton/ops/tuning/__init__.py"}
"""Constants that are empty so far."""


def shared(tree: ast.Module) -> list[str]:
    """Names of a module's objects that may change, and variables of the environment that it sets."""
    found = []
    for node in tree.body:
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None and _changes(node.value):
            name = ast.unparse(node.targets[0] if isinstance(node, ast.Assign) else node.target)
            found += [name] if name != "__all__" else []
    for node in ast.walk(tree):
        if isinstance(node, ast.Global):
            found += node.names
        targets = node.targets if isinstance(node, ast.Assign) else []
        found += [text for text in map(ast.unparse, targets) if text.startswith("os.environ[")]
    return found


def _changes(value: ast.expr) -> bool:
    if isinstance(value, ast.Call):
        called = value.func.attr if isinstance(value.func, ast.Attribute) else getattr(value.func, "id", "")
        return called in MAKERS
    return ast.unparse(value) in ("{}", "[]")


def test_what_a_process_shares_is_in_the_architecture():
    told = (ROOT / "docs/architecture.md").read_text().partition("## What a process shares")[2]
    files = itertools.chain(tracked("mem_triton/*.py"), tracked("integrations/*.py"))
    missing = {}
    for path in files:
        name = str(path.relative_to(ROOT))
        if name not in TABLES and (found := shared(ast.parse(path.read_text()))) and name not in told:
            missing[name] = found
    assert missing == {}, "make it an object's own, or say in docs/architecture.md what is shared and why"


def test_shared_state_would_be_seen():
    text = "import os\nA = {}\nB: list[int] = []\nC = set()\nD = ContextVar('d')\nE = {1: 2}\nF = (1,)\n"
    text += "G = os.urandom(3)\ndef f():\n    global A\n    os.environ['X'] = '1'\n"
    assert shared(ast.parse(text)) == ["A", "B", "C", "D", "G", "A", "os.environ['X']"]


WALK = """
for name in "mem_triton", "mem_triton_transformers":
    for module in pkgutil.walk_packages(importlib.import_module(name).__path__, f"{name}."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
"""
CHANGED = """
import importlib, json, os, pkgutil
before = dict(os.environ)
{}
print(json.dumps([key for key in before.keys() | os.environ.keys() if before.get(key) != os.environ.get(key)]))
"""


@pytest.mark.parametrize(
    ("imports", "expected"), [(WALK, []), ("import trl", ["VLLM_LOGGING_LEVEL"])], ids=["ours", "control"]
)
def test_an_import_leaves_the_engines_environment_as_it_was(imports, expected):
    """trl's own silences every vLLM that the process starts later, our warnings included."""
    env = {key: value for key, value in os.environ.items() if not key.startswith(ENGINES)}
    done = subprocess.run(
        [sys.executable, "-c", CHANGED.format(imports)], env=env, capture_output=True, text=True, check=True
    )
    assert [key for key in json.loads(done.stdout.splitlines()[-1]) if key.startswith(ENGINES)] == expected
