"""What Triton would compile a launch for, recorded in the interpreter, which compiles nothing.

Triton makes a kernel anew for other constants, options and types of arguments, for integers that are 1 or multiples of
16, and for pointers that are aligned to 16 bytes or not; but for the names in ``do_not_specialize`` only for types. So
it does for each part of a tuple.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

Key = tuple[Any, ...]
CHUNKS = ("activate_kernel", "chunk_maps_kernel", "chunk_scan_kernel")
OURS = ("attention_kernel", "shared_kernel", "recurrent_kernel", *CHUNKS, "inputs_kernel")


def key_of(kernel: InterpretedFunction, args: tuple, kwargs: dict[str, Any]) -> Key:
    """Of a launch ``kernel[grid](*args, **kwargs)``: kernel, arguments by name, options."""
    parameters = inspect.signature(kernel.fn).parameters
    plain = kernel.kwargs.get("do_not_specialize") or ()
    given = dict(zip(parameters, args, strict=False)) | {n: v for n, v in kwargs.items() if n in parameters}
    found = [(name, _kind(parameters[name].annotation, value, name in plain)) for name, value in given.items()]
    options = sorted((n, v) for n, v in kwargs.items() if n not in parameters)
    return kernel.fn.__name__, *sorted(found), *options


def _kind(annotation: Any, value: Any, plain: bool) -> str:
    if annotation is tl.constexpr or annotation == "tl.constexpr" or value is None or isinstance(value, tl.constexpr):
        return repr(value)
    if isinstance(value, tuple):  # each of its parts, whatever the name is in
        return f"({', '.join(_kind(None, part, False) for part in value)})"
    if isinstance(value, torch.Tensor):
        return f"*{value.dtype}{'' if value.data_ptr() % 16 else ' aligned'}"
    if isinstance(value, int) and not isinstance(value, bool):
        width = "i32" if -(2**31) <= value < 2**31 else "i64"
        if plain:
            return width
        return "1" if value == 1 else f"{width} of 16" if value % 16 == 0 else width
    return type(value).__name__


@contextmanager
def recorded(seen: Callable[[Key], None], launch: bool) -> Iterator[None]:
    """While it lasts every launch of one of our kernels is shown to ``seen``, and done if ``launch``."""
    stock = InterpretedFunction.run

    def run(self: InterpretedFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        ours = self.fn.__name__ in OURS
        if ours:
            seen(key_of(self, args, kwargs))
        return stock(self, *args, grid=grid, warmup=warmup, **kwargs) if launch or not ours else None

    InterpretedFunction.run = run
    try:
        yield
    finally:
        InterpretedFunction.run = stock
