"""Compile a Triton kernel for GPUs that are not here, and read registers and spills from what comes out.

Triton's wheels carry ptxas, cuobjdump and the AMD linker, so neither a GPU nor a driver is needed. TRITON_INTERPRET
must not be set when the kernel's module is imported. Example::

    resources = compile_for("sm90", kernel, {"x": "*fp32", "n": "i32"}, {"BLOCK": 64}, num_warps=1)
    assert resources.spills == 0
"""

from __future__ import annotations

import multiprocessing
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

Case = TypeVar("Case")

TARGETS = {
    "sm80": GPUTarget("cuda", 80, 32),
    "sm90": GPUTarget("cuda", 90, 32),
    "sm100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel uses: registers a thread, spills (bytes; registers on AMD), bytes shared per program."""

    registers: int
    spills: int
    shared: int


def compile_for(
    target: str, kernel: Any, arguments: dict[str, str], constants: dict[str, Any], **options: Any
) -> Resources:
    """Compile ``kernel`` for a target of TARGETS.

    arguments: Triton type per runtime argument ("*bf16", "i32"). Pointers are taken as 16-byte aligned, as the caching
    allocator's are; "i32:16" says the same of an integer. constants: the tl.constexpr arguments, and arguments that are
    None. options: num_warps, num_stages, ...
    """
    signature, values, attributes = {}, {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], values[(index,)] = "constexpr", constants[name]
            continue
        signature[name], _, alignment = arguments[name].partition(":")
        if alignment or signature[name].startswith("*"):
            attributes[(index,)] = [["tt.divisibility", 16]]
    unknown = (set(arguments) | set(constants)) - set(kernel.arg_names)
    if unknown:
        raise ValueError(f"{kernel.__name__} has no argument {sorted(unknown)}")
    source = ASTSource(kernel, signature, values, attributes)
    compiled = triton.compile(source, target=TARGETS[target], options=options)
    shared = int(compiled.metadata.shared)
    if target.startswith("gfx"):
        assembly = compiled.asm["amdgcn"]
        return Resources(_field(assembly, ".vgpr_count"), _field(assembly, ".vgpr_spill_count"), shared)
    return Resources(*_read_cubin(compiled.asm["cubin"]), shared)


def compile_all(compile_case: Callable[[Case], Resources], cases: Sequence[Case]) -> dict[Case, Resources | str]:
    """Compile every case in two processes. A failure is carried over the process border as text: Triton's errors do not
    pickle."""
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        return dict(zip(cases, pool.map(_Guarded(compile_case), cases, chunksize=4), strict=True))


@dataclass(frozen=True)
class _Guarded:
    compile_case: Callable[..., Resources]

    def __call__(self, case: Any) -> Resources | str:
        try:
            return self.compile_case(case)
        except Exception as error:
            return f"{type(error).__name__}: {error}"


def check_budget(result: Resources | str, registers: int, shared: int, spills: int = 0) -> None:
    """Fail if a kernel did not compile, or takes more registers, shared memory or spills (bytes) than it may."""
    assert isinstance(result, Resources), result
    assert result.spills <= spills, result
    assert result.registers <= registers, result
    assert result.shared <= shared, result


def _field(assembly: str, name: str) -> int:
    return int(re.search(rf"{re.escape(name)}:\s+(\d+)", assembly)[1])


def _read_cubin(cubin: bytes) -> tuple[int, int]:
    """Registers, and bytes of local memory: the kernels use no local arrays, so any of it is a spill."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "kernel.cubin")
        Path(path).write_bytes(cubin)
        report = subprocess.run(
            [tool, "--dump-resource-usage", path], capture_output=True, text=True, check=True
        ).stdout
    registers, stack, local = map(int, re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", report).groups())
    return registers, stack + local
