"""Numbers that a kernel is compiled for, as Triton takes them in a tuple of arguments."""

from __future__ import annotations

import functools
from typing import TypeVar

import triton.language as tl

Group = TypeVar("Group", bound=tuple)


@functools.lru_cache(maxsize=4096, typed=True)  # typed, as True is 1 otherwise
def constant(number: int) -> tl.constexpr:
    return tl.constexpr(number)


@functools.lru_cache(maxsize=4096, typed=True)
def constants(kind: type[Group], *numbers: int) -> Group:
    """The named tuple ``kind`` of such numbers."""
    return kind(*map(tl.constexpr, numbers))
