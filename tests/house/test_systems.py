"""Memory systems are packages that the rest of the house does not know by name; their two parts stay apart."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from tests.house.test_rules import ROOT, imports, tracked

SYSTEMS = tuple(f"mem_triton.systems.{path.name}" for path in sorted((ROOT / "mem_triton/systems").glob("*/")))
STATE = {
    "vllm": {"attach", "fused_inputs", "kv_spec", "layers", "state_cache", "warmup"},
    "sglang": {"attach", "states", "warmup"},
}
"""Where an engine gives the capability STATE: states of sequences and corrections around projections."""
_WORKERS = ("worker", "worker_captures", "slots", "attach", "layer_memory", "folding", "warmup", "projections")
_FRONT_ENDS = ("frontend", "plans", "captures", "injections", "residents")
WORKER = ("mem_triton.runtime.worker", *(f"{system}.{part}" for system in SYSTEMS for part in _WORKERS))


def named(names: Iterable[str]) -> list[str]:
    return sorted(name for name in names if name.startswith(SYSTEMS))


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_engines_know_the_contract_and_no_system(engine):
    for path in tracked(f"integrations/mem_triton_{engine}/*.py"):
        if path.stem not in STATE[engine]:
            assert named(imports(path)) == [], path


def test_what_systems_share_knows_none_of_them():
    shared = [*tracked("mem_triton/runtime/**/*.py", "mem_triton/runtime/*.py"), *tracked("mem_triton/systems/*.py")]
    for path in [ROOT / "mem_triton/config.py", ROOT / "mem_triton/schema.py", *shared]:
        if path.parent.name in ("systems", "mem_triton", "runtime", "frontend", "worker"):
            assert named(imports(path)) == [], path


def reached(start: str) -> set[str]:
    """Every module of mem_triton that a module imports, or one that it imports."""
    found, new = set(), [start]
    while new:
        path = ROOT / (new.pop().replace(".", "/") + ".py")
        names = imports(path) if path.exists() else set()
        for name in names:
            if name.startswith("mem_triton.") and name not in found:
                found.add(name)
                new.append(name)
    return found


FRONT_ENDS = (
    "runtime.frontend.memory",
    *(f"systems.{name}.frontend" for name in ("delta_mem", "explicit", "memoryllm")),
)


@pytest.mark.parametrize("part", FRONT_ENDS)
def test_front_ends_import_no_worker_s_code(part):
    assert [name for name in reached(f"mem_triton.{part}") if name.startswith(WORKER)] == []


@pytest.mark.parametrize("part", [part.replace("frontend", "worker") for part in FRONT_ENDS])
def test_workers_import_no_front_end_s_code(part):
    front = ("mem_triton.runtime.frontend", *(f"{s}.{p}" for s in SYSTEMS for p in _FRONT_ENDS))
    assert [name for name in reached(f"mem_triton.{part}") if name.startswith(front)] == []


def test_an_import_of_the_other_side_would_be_seen():
    assert any(name.startswith(WORKER) for name in reached("mem_triton.systems.explicit.worker"))
