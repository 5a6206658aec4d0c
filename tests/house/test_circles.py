"""No circle of imports: neither between modules nor between packages.

Every import counts, wherever it stands: at the top of a module, in a function, under ``TYPE_CHECKING``. A module that
is imported runs its package's ``__init__`` too, but that is Python's way of finding it and no import of this graph:
else each package whose ``__init__`` offers the names of its modules would be a circle.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.house.test_rules import ROOT, tracked

Graph = Mapping[str, set[str]]

OPEN: dict[str, set[frozenset[str]]] = {"module": set(), "package": set()}
"""Circles that are known and not broken yet, each as its members. An entry without a circle fails, too."""


def sources() -> dict[str, Path]:
    """Module -> its file. The integrations are packages of their own, beside ``mem_triton``."""
    found = {}
    for path in tracked("mem_triton/*.py", "integrations/*.py", "benchmarks/*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        parts = parts[1:] if parts[0] == "integrations" else parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(name: str, path: Path, known: Mapping[str, Path]) -> set[str]:
    """The modules of ``known`` that the module ``name`` imports; ``from package import module`` names the module."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = name.split(".")[: len(name.split(".")) - node.level + (path.name == "__init__.py")]
                base = ".".join([*package, *([base] if base else [])])
            found |= {whole if (whole := f"{base}.{alias.name}") in known else base for alias in node.names}
    return found & known.keys() - {name}


def module_graph(known: Mapping[str, Path]) -> Graph:
    return {name: imported(name, path, known) for name, path in known.items()}


def package_of(name: str, known: Mapping[str, Path]) -> str:
    """The package in which a module lies; one directly under ``mem_triton`` or ``benchmarks`` stands for itself."""
    package = name if known[name].name == "__init__.py" else name.rpartition(".")[0]
    return name if package in ("mem_triton", "benchmarks") else package


def package_graph(known: Mapping[str, Path]) -> Graph:
    """Imports between packages, subpackages counting as packages of their own."""
    found: dict[str, set[str]] = {}
    for name, others in module_graph(known).items():
        mine = package_of(name, known)
        found.setdefault(mine, set()).update({package_of(other, known) for other in others} - {mine})
    return found


def reached(graph: Graph, start: str) -> set[str]:
    """What can be come to from ``start``; ``start`` itself if there is a way back."""
    found: set[str] = set()
    new = list(graph[start])
    while new:
        if (name := new.pop()) not in found:
            found.add(name)
            new += graph[name]
    return found


def circles(graph: Graph) -> set[frozenset[str]]:
    """The largest sets of members that all come to each other."""
    reach = {name: reached(graph, name) for name in graph}
    return {frozenset(other for other in ways if name in reach[other]) for name, ways in reach.items() if name in ways}


GRAPHS = {"module": module_graph, "package": package_graph}


@pytest.mark.parametrize("kind", GRAPHS)
def test_no_circle_of_imports(kind):
    found = circles(GRAPHS[kind](sources()))
    assert sorted(map(sorted, found - OPEN[kind])) == []
    assert sorted(map(sorted, OPEN[kind] - found)) == [], "these circles are gone: take them out of OPEN"


IMPORTS = {
    "top": "from mem_triton.b import B",
    "module": "from mem_triton import b",
    "plain": "import mem_triton.b",
    "function": "def f():\n    from mem_triton.b import B",
    "typing": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from mem_triton.b import B",
    "relative": "from .b import B",
    "relative module": "from . import b",
}


def written(folder: Path, **files: str) -> dict[str, Path]:
    """A tree of sources; "a__b" is the module ``mem_triton.a.b``."""
    found = {}
    for name, text in files.items():
        module = "mem_triton." + name.replace("__", ".") if name != "init" else "mem_triton"
        path = folder / ("__init__.py" if name == "init" else f"{name}.py")
        path.write_text(text)
        found[module] = path
    return found


@pytest.mark.parametrize("way", IMPORTS)
def test_each_way_to_import_closes_a_circle(way, tmp_path):
    known = written(tmp_path, init="", a=IMPORTS[way], b="from mem_triton.c import C", c="import mem_triton.a, json")
    there = frozenset({"mem_triton.a", "mem_triton.b", "mem_triton.c"})
    assert circles(module_graph(known)) == {there}
    known["mem_triton.c"].write_text("import json")
    assert circles(module_graph(known)) == set()


def test_two_packages_that_import_each_other_are_a_circle_of_packages_alone(tmp_path):
    files = {"a__x": "import mem_triton.b.x", "a__y": "", "b__x": "", "b__y": "from mem_triton.a import y"}
    known = written(tmp_path, **files)
    assert circles(module_graph(known)) == set()
    assert circles(package_graph(known)) == {frozenset({"mem_triton.a", "mem_triton.b"})}


def test_a_circle_must_be_open_and_an_open_one_a_circle(tmp_path, monkeypatch):
    known = written(tmp_path, a="import mem_triton.b", b="import mem_triton.a")
    monkeypatch.setitem(globals(), "sources", lambda: known)
    with pytest.raises(AssertionError, match=r"mem_triton\.a"):
        test_no_circle_of_imports("module")
    monkeypatch.setitem(OPEN, "module", {frozenset({"mem_triton.a", "mem_triton.b"})})
    test_no_circle_of_imports("module")
    known["mem_triton.a"].write_text("")
    with pytest.raises(AssertionError, match="these circles are gone"):
        test_no_circle_of_imports("module")


def test_the_graph_sees_the_whole_house():
    """An empty graph has no circle either."""
    known = sources()
    assert {"mem_triton", "mem_triton_vllm", "mem_triton_sglang", "mem_triton_transformers"} <= known.keys()
    graph = module_graph(known)
    assert "mem_triton.store.bank.opened" in graph["mem_triton.store.bank.writing"]
    assert len(known) > 200 and sum(map(len, graph.values())) > 600
