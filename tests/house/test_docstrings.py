"""Docstrings of what users and memory systems call: they are there, end, and begin with a verb."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest

PACKAGES = (
    "mem_triton.ops.attention_inputs",
    "mem_triton.ops.block_codec",
    "mem_triton.ops.delta_rule",
    "mem_triton.ops.memory_attention",
    "mem_triton.ops.memory_selection",
    "mem_triton.ops.reposition",
    "mem_triton.store.bank",
    "mem_triton.systems.delta_mem",
    "mem_triton.write",
    "mem_triton_transformers",
)
"""Those that say by ``__all__`` what they export; beside them stands the contract of memory systems."""
NO_VERB = re.compile(
    r"(The|An?|All|Its|Each|Every|One|Those|What|Which|Who|Whether|Where|When|How|Of|In|As|By|For|From|With|At|No|This"
    r"|That|These)\b|[^A-Z]"
)
"""How a sentence begins that says what a function returns, and not what it does."""


def functions_of(owner: type | ModuleType, names: list[str]) -> Iterator[tuple[str, Any, bool]]:
    """(name, object, whether it is called) of some attributes, and of the public ones of classes among them."""
    for name in names:
        value = inspect.getattr_static(owner, name)
        value = getattr(value, "__func__", value)
        if isinstance(value, property):
            yield name, value.fget, False
        elif inspect.isclass(value):
            yield name, value, False
            mine = [attribute for attribute in vars(value) if not attribute.startswith("_")]
            yield from ((f"{name}.{inner}", *rest) for inner, *rest in functions_of(value, mine))
        elif inspect.isfunction(value):
            yield name, value, True


def problem(value: Any, called: bool) -> str | None:
    """What is wrong with a docstring, None if nothing."""
    text = inspect.getdoc(value)
    if not text:
        return "has none"
    first = " ".join(text.split("\n\n")[0].split())
    if not re.search(r"[.:](\W|$)", first):
        return f"does not end: {first}"
    return f"begins without a verb: {first}" if called and NO_VERB.match(first) else None


def problems(owner: type | ModuleType, names: list[str]) -> dict[str, str]:
    found = ((name, problem(value, called)) for name, value, called in functions_of(owner, names))
    return {name: wrong for name, wrong in found if wrong}


@pytest.mark.parametrize("package", PACKAGES)
def test_what_packages_export_says_what_it_does(package):
    module = importlib.import_module(package)
    for name in module.__all__:
        getattr(module, name)  # those that are imported when they are asked for
    names = {name: getattr(module, name) for name in module.__all__}
    assert problems(type("Exported", (), names), module.__all__) == {}


def test_the_contract_says_what_its_methods_do():
    from mem_triton.systems import base

    mine = [name for name, value in vars(base).items() if getattr(value, "__module__", "") == base.__name__]
    assert len(mine) > 5
    assert problems(base, mine) == {}


def test_each_kind_of_problem_would_be_seen():
    class Wrong:
        """A class."""

        def silent(self) -> None: ...

        def endless(self) -> None:
            """Go on"""

        def noun(self) -> None:
            """The sum of two numbers."""

        def right(self) -> None:
            """Add two numbers."""

        @property
        def sum(self) -> int:
            """The sum."""
            return 0

    holder = type("Holder", (), {"Wrong": Wrong})
    assert set(problems(holder, ["Wrong"])) == {"Wrong.silent", "Wrong.endless", "Wrong.noun"}
