"""Which memory systems there are, and what an engine refuses at start."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from mem_triton.schema import ConfigError
from mem_triton.systems import registry
from mem_triton.systems.base import Capability, MemorySystem
from tests.support.host import host
from tests.support.toy import SYSTEM, Toy


@pytest.fixture
def install(monkeypatch):
    """Systems of other distributions, as their entry points."""

    def set(*points) -> None:
        monkeypatch.setattr(registry, "entry_points", lambda group: points)
        registry.systems.cache_clear()

    yield set
    monkeypatch.undo()
    registry.systems.cache_clear()


def point(name: str, system: MemorySystem | Exception):
    def load():
        if isinstance(system, Exception):
            raise system
        return system

    return SimpleNamespace(name=name, value="package:SYSTEM", load=load)


def test_systems_of_other_distributions_are_found_behind_our_own(install):
    assert list(registry.systems()) == ["delta", "memory", "memo", "memoryllm"] and "mem_toy" not in registry.fields()
    install(point("toy", SYSTEM))
    assert (
        list(registry.systems()) == ["delta", "memory", "memo", "memoryllm", "toy"] and "mem_toy" in registry.fields()
    )
    assert registry.parse_request({"mem_toy": 1}).systems["toy"] is True


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "memory"}, "memory belongs to another"),
        ({"fields": {"mem_ids": ""}}, "mem_ids belongs to another"),
        ({"fields": {"mem_tenant": ""}}, "mem_tenant belongs to another"),
    ],
)
def test_a_name_belongs_to_one_system(install, changes, message):
    install(point("other", type("Other", (Toy,), changes)()))
    with pytest.raises(ConfigError, match=message):
        registry.systems()


def test_a_system_that_cannot_be_loaded_is_named(install):
    install(point("broken", ImportError("no module named numpy2")))
    with pytest.raises(ConfigError, match=r"memory system broken \(package:SYSTEM\) cannot be loaded: no module"):
        registry.systems()


def test_an_engine_without_a_capability_refuses_the_system_by_name():
    registry.check_capabilities(["delta", "memory"], set(Capability), "vLLM")
    with pytest.raises(ConfigError, match=r"mem_triton\.delta: vLLM lacks what δ-mem needs: a recurrent state"):
        registry.check_capabilities(["delta"], {Capability.SEGMENTS}, "vLLM")
    without = host(read_kv=None).capabilities
    with pytest.raises(ConfigError, match=r"explicit memory needs: copies of a request's own"):
        registry.check_capabilities(["memory"], without, "SGLang")


def test_two_systems_cannot_both_have_the_segments(install):
    install(point("toy", SYSTEM))
    with pytest.raises(ConfigError, match=r"mem_triton\.toy: a toy and explicit memory both need keys and values"):
        registry.check_capabilities(["memory", "toy"], set(Capability), "vLLM")
