"""Every change of an engine stands in its integration's register, and every entry of a register is a change."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from mem_triton.patches import KINDS, EnginePatch, names
from scripts.make_docs import registers
from tests.support.patch_sites import Own, Site, private_names, sites

ROOT = Path(__file__).parents[2]
ENGINES = ("vllm", "sglang", "transformers")
every = pytest.mark.parametrize("engine", ENGINES)


def sources(engine: str) -> list[Path]:
    """Files that may change an engine: its integration's, and those of mem_triton that are handed a model's modules."""
    shared = [path for path in (ROOT / "mem_triton").rglob("*.py") if "nn.Module" in path.read_text()]
    return [*sorted((ROOT / "integrations" / f"mem_triton_{engine}").glob("*.py")), *sorted(shared)]


@pytest.fixture(scope="module")
def own() -> Own:
    return Own([*(ROOT / "integrations").rglob("*.py"), *(ROOT / "mem_triton").rglob("*.py")])


def register(engine: str) -> tuple[EnginePatch, ...]:
    """Read from its file: to import the package would import the engine."""
    return registers()[engine].PATCHES


def unnamed(found: list[Site], patches: tuple[EnginePatch, ...]) -> list[str]:
    return [f"{site} (line {site.line})" for site in found if not any(names(patch, str(site)) for patch in patches)]


@every
def test_every_change_of_an_engine_is_in_the_register(engine, own):
    found = [site for path in sources(engine) for site in sites(path, own)]
    if engine == "transformers":  # it calls nothing that moves weights, or runs an engine's layers
        found = [site for site in found if not site.where.startswith(("folding.", "own_layers."))]
    missing = unnamed(found, register(engine))
    assert missing == [], (
        f"add an entry to integrations/mem_triton_{engine}/patches.py, or change nothing of the engine"
    )


@every
def test_every_entry_is_a_change_and_says_all(engine, own):
    found = [str(site) for path in sources(engine) for site in sites(path, own)]
    for patch in register(engine):
        assert patch.kind in KINDS
        stale = [one for one in patch.sites if not any(names(_only(patch, one), site) for site in found)]
        assert patch.sites and stale == [], f"{patch.target} names {stale}, and nothing is changed there any more"
        for said in (patch.target, patch.what, patch.why, patch.upstream, patch.until):
            assert len(said) > 5
        assert all(said.endswith(".") for said in (patch.what, patch.why, patch.upstream, patch.until)), patch.target


def _only(patch: EnginePatch, site: str) -> EnginePatch:
    return EnginePatch(patch.target, patch.kind, (site,), *4 * ("",))


@every
def test_every_private_name_of_an_engine_is_in_the_register(engine):
    """The start-up checks look for names; what is private may go with any release."""
    ours = [*(ROOT / "integrations").rglob("*.py"), *(ROOT / "mem_triton").rglob("*.py")]
    used = private_names(sorted((ROOT / "integrations" / f"mem_triton_{engine}").glob("*.py")), ours)
    told = registers()[engine].PRIVATE
    assert used == set(told), f"PRIVATE in integrations/mem_triton_{engine}/patches.py"
    assert list(told) == sorted(told)


def test_a_private_name_would_be_seen(tmp_path):
    path = tmp_path / "uses.py"
    path.write_text(
        "from vllm.x import _imported\nclass A:\n    def f(self, engine):\n        self._own = 1\n"
        "        self._own, self._inherited(), engine.a._looked_up, getattr(engine, '_by_name'), engine.__class__\n"
    )
    assert private_names([path], [path]) == {"_imported", "_inherited", "_looked_up", "_by_name"}


@every
def test_no_two_entries_have_one_target(engine):
    targets = [patch.target for patch in register(engine)]
    assert len(set(targets)) == len(targets)


def test_every_hook_of_sglang_has_an_entry():
    tree = ast.parse((ROOT / "integrations/mem_triton_sglang/hooks.py").read_text())
    (hooks,) = [n.value for n in tree.body if isinstance(n, ast.AnnAssign) and n.target.id == "HOOKS"]
    hooked = {key.value for key in hooks.keys}
    named = {patch.target for patch in register("sglang") if patch.kind == "hook"}
    assert hooked and hooked <= named, hooked - named
    assert {target for target in named if target.startswith("sglang.")} == hooked


PATCHED = """
import sys
from importlib import import_module
import vllm.envs as envs
from vllm import engine
from vllm.core import Scheduler, HOOKS, register_thing

class Mine:
    def __init__(self, model):
        self.model = model            # own
        self.model.forward = print    # 0: through an own object into one of the engine's
    def fine(self, other: Mine):
        self.a = other.b = 1

def install(model, undo, config):
    Scheduler.step = print                                  # 1
    setattr(engine, "name", 1)                              # 2
    undo.callback(setattr, engine, "name", 1)               # 3
    import_module("vllm.x").f = print                       # 4
    HOOKS["a"] = print                                      # 5
    HOOKS.update(a=1)                                       # 6
    register_thing(print)                                   # 7
    model.layers[0].register_forward_hook(print)            # 8
    for layer in model.layers:
        layer.proj, layer.norm = 1, 2                       # 9, 10
    first = model.layers[0]
    first.__class__ = Mine                                  # 11
    layers = config.context
    layers.clear()                                          # 12
    del engine.name                                         # 13
    sys.modules["vllm"].f = print                           # 14
    def inner(request):
        request.field = 1                                   # 15
    module = getattr(model, "proj")
    module.weight.data = 1                                  # 16
    envs.FLAG = True                                        # 17

def fine(model, params, given: Mine):
    import copy
    mine = Mine(model)
    mine.a = given.a = 1
    params = copy.copy(params)
    x = {}
    x["a"] = 1
    x.update(b=2)

@register_thing("name")                                     # 18
class Registered: ...
"""


def test_a_monkeypatch_would_be_seen(tmp_path):
    """Whatever way it is written; what is the repository's own is left alone."""
    path = tmp_path / "patched.py"
    path.write_text(PATCHED)
    found = [site.line for site in sites(path, Own([path]))]
    lines = PATCHED.splitlines()
    wanted = [i + 1 for i, line in enumerate(lines) if "# " in line and line.split("# ")[1][0].isdigit()]
    assert sorted(set(found)) == wanted
    assert len(found) == 19  # two on one line
    entry = EnginePatch("Scheduler.step", "patch", ("patched.install: Scheduler.*",), *4 * ("",))
    left = unnamed(sites(path, Own([path])), (entry,))
    assert len(left) == 18 and not any("Scheduler" in site for site in left)
