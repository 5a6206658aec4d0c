"""Compile a Triton kernel for GPUs that are not here, and read from what comes out what a run of it would take.

Triton's wheels carry ptxas, cuobjdump and the AMD linker, so neither a GPU nor a driver is needed. TRITON_INTERPRET
must not be set when the kernel's module is imported. Example::

    resources = compile_for("sm90", kernel, {"x": "*fp32", "n": "i32"}, {"BLOCK": 64}, num_warps=1)
    assert resources.spills == 0
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tests.support.sass import Loop, loops
from tests.support.traffic import Bytes, read_traffic, total

TARGETS = {
    "sm80": GPUTarget("cuda", 80, 32),
    "sm90": GPUTarget("cuda", 90, 32),
    "sm100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_MEMORY = {"sm80": 164 << 10, "sm90": 228 << 10, "sm100": 228 << 10, "gfx942": 64 << 10}  # of a multiprocessor

MATRIX_INSTRUCTIONS = {  # in PTX, and in AMD's assembly
    "wgmma": r"\bwgmma\.mma_async",
    "tcgen05": r"\btcgen05\.mma",
    "mma": r"\bmma\.sync",
    "mfma": r"\bv_s?mfmac?_",
}


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel uses.

    registers: a thread's. spills: bytes of local memory a thread; registers on AMD. shared: bytes a program.
    occupancy: warps of programs that a multiprocessor (a compute unit on AMD) holds at a time. local: instructions that
    address local memory, and bytes of it. matrix: kinds of matrix instruction among "wgmma", "tcgen05", "mma", "mfma".
    traffic: see ``traffic.py``. in_flight: of each loop that copies asynchronously, the copies that it leaves on their
    way when it waits (0: it waits for what it has just asked for). loops: see ``sass.py``; on request, on NVIDIA.
    """

    registers: int
    spills: int
    shared: int
    occupancy: int
    local: int
    matrix: frozenset[str]
    traffic: dict[str, Bytes]
    in_flight: tuple[int, ...]
    loops: tuple[Loop, ...] = ()


def compile_for(
    target: str,
    kernel: Any,
    arguments: dict[str, Any],
    constants: dict[str, Any],
    machine_code: bool = False,
    **options: Any,
) -> Resources:
    """Compile ``kernel`` for a target of TARGETS.

    arguments: Triton type per runtime argument ("*bf16", "i32"), or a tuple of such, in which all that is no string is
    a constant. Pointers are taken as 16-byte aligned, as the caching allocator's are; "i32:16" says the same of an
    integer. constants: the tl.constexpr arguments, and arguments that are None. machine_code: read the
    loops, too, which takes half a second. options: num_warps, num_stages, ...
    """
    unknown = (set(arguments) | set(constants)) - set(kernel.arg_names)
    if unknown:
        raise ValueError(f"{kernel.__name__} has no argument {sorted(unknown)}")
    values, attributes, names = {}, {}, []

    def typed(value: Any, path: tuple[int, ...], name: str) -> Any:
        """The signature of an argument; fills the three collections."""
        if isinstance(value, tuple):
            fields = getattr(value, "_fields", range(len(value)))
            return type(value)(*(typed(x, (*path, i), f"{name}.{fields[i]}") for i, x in enumerate(value)))
        if not isinstance(value, str):
            values[path] = getattr(value, "value", value)
            return "constexpr"
        kind, _, alignment = value.partition(":")
        if alignment or kind.startswith("*"):
            attributes[path] = [["tt.divisibility", 16]]
        names.append(name)
        return kind

    signature = {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], values[(index,)] = "constexpr", constants[name]
        else:
            signature[name] = typed(arguments[name], (index,), name)
    source = ASTSource(kernel, signature, values, attributes)
    compiled = triton.compile(source, target=TARGETS[target], options=options)
    result = _measure(target, compiled, names)
    return replace(result, loops=loops(_cuobjdump(compiled.asm["cubin"], "-sass"))) if machine_code else result


def types_of(value: Any, integer: Callable[[str, int], str], name: str = "") -> Any:
    """What ``compile_for`` takes for an argument of a launch: tensors become pointers, numbers stay numbers.

    integer: the type of an integer by its name, "table.stride" for one in a tuple, and its value.
    """
    if isinstance(value, tuple):
        return type(value)(*(types_of(x, integer, f"{name}.{field}") for field, x in value._asdict().items()))
    if isinstance(value, torch.Tensor):
        return POINTERS[value.dtype]
    if isinstance(value, float):
        return "fp32"
    return integer(name, value) if isinstance(value, int) and not isinstance(value, bool) else value


POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.int32: "*i32",
}


def _measure(target: str, compiled: Any, names: Sequence[str]) -> Resources:
    shared, warps = int(compiled.metadata.shared), int(compiled.metadata.num_warps)
    amd = target.startswith("gfx")
    assembly = compiled.asm["amdgcn" if amd else "ptx"]
    if amd:
        registers, spills = _field(assembly, ".vgpr_count"), _field(assembly, ".vgpr_spill_count")
        local = r"\bscratch_(?:load|store)"
    else:
        registers, spills = _read_cubin(compiled.asm["cubin"])
        local = r"\b(?:ld|st)\.local\b"
    return Resources(
        registers,
        spills,
        shared,
        occupancy=warps * programs_at_a_time(target, registers, shared, warps),
        local=len(re.findall(local, assembly)) + (0 if amd else spills),
        matrix=frozenset(kind for kind, pattern in MATRIX_INSTRUCTIONS.items() if re.search(pattern, assembly)),
        traffic=read_traffic(compiled.asm["ttgir"], names),
        in_flight=_copies_in_flight(compiled.asm["ttgir"]),
    )


def programs_at_a_time(target: str, registers: int, shared: int, warps: int) -> int:
    """Programs of ``warps`` warps that one multiprocessor holds, by registers a thread, shared bytes and its limits.

    From the makers' occupancy tables: 65,536 registers in units of 256 a warp, 64 warps and 32 programs; AMD has 512
    registers a lane in each of four SIMDs, in units of 8, for at most eight waves.
    """
    if target.startswith("gfx"):
        waves = min(8, 512 // max(8, -(-registers // 8) * 8))
        return min(4 * waves // warps, SHARED_MEMORY[target] // max(1, shared))
    by_registers = 65536 // (max(1, -(-registers * 32 // 256)) * 256 * warps)
    return min(by_registers, SHARED_MEMORY[target] // (shared + 1024), 64 // warps, 32)


# ptxas before 13, which Triton had for Hopper up to 3.8, spills up to six registers where one more program then fits a
# multiprocessor.
SPILLS = 24 if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9) else 0


def check_budget(result: Resources | str, registers: int, shared: int, *, spills: int = 0, occupancy: int = 1) -> None:
    """Fail if a kernel did not compile, takes more registers, shared memory or spills (bytes) than it may, or if fewer
    than ``occupancy`` warps of it run at a time."""
    assert isinstance(result, Resources), result
    spills = max(spills, SPILLS)
    assert result.spills <= spills and result.local <= spills, result
    assert result.registers <= registers, result
    assert result.shared <= shared, result
    assert result.occupancy >= occupancy, result


EXCESS = 1.1  # bytes asked for, of the fewest that will do


def check_traffic(
    result: Resources | str, least: dict[str, tuple[int, int]], turns: int = 16, excess: float = EXCESS
) -> None:
    """Fail if a program asks for more than ``excess`` times the bytes that it needs.

    least: argument -> (bytes once, bytes a turn of its loop), of the arguments that matter; others, the tables, count
    as excess. An argument of which less is read than it takes means that the reading went unnoticed.
    """
    assert isinstance(result, Resources), result
    needed = 0
    for argument, (once, each) in least.items():
        asked, wanted = total({argument: result.traffic.get(argument, Bytes())}, turns), once + turns * each
        assert wanted <= asked <= excess * wanted, f"{argument}: {asked} bytes for {wanted}: {result.traffic}"
        needed += wanted
    asked = total(result.traffic, turns)
    assert asked <= excess * needed, f"{asked} bytes for {needed}: {result.traffic}"


def check_no_padding(result: Resources | str) -> None:
    """Fail if lanes stand for channels that the head does not have."""
    assert isinstance(result, Resources), result
    assert not any(one.padding for one in result.traffic.values()), result.traffic


def check_matrix(result: Resources | str, target: str, rows: int, item_bytes: int) -> None:
    """Fail unless products of ``rows`` rows run on the widest matrix instruction that takes so many."""
    assert isinstance(result, Resources), result
    wide = {"sm90": "wgmma", "sm100": "tcgen05"}.get(target, "mma") if rows >= 64 else "mma"
    expected = {"mfma"} if target.startswith("gfx") else {wide} if item_bytes < 4 else set()  # exact fp32 has none
    assert result.matrix == expected, result


def check_prefetch(result: Resources | str, *copies: int) -> None:
    """Fail unless so many loops copy ahead as numbers are given, each with at least so many copies on their way."""
    assert isinstance(result, Resources), result
    assert len(result.in_flight) == len(copies), result
    assert all(found >= wanted for found, wanted in zip(result.in_flight, copies, strict=True)), result


def _copies_in_flight(ttgir: str) -> tuple[int, ...]:
    """The smallest wait in each loop; those behind a loop, which wait for the last turns, do not count."""
    opened: list[list[int] | None] = []  # per open brace: the waits of a loop, None = no loop
    found = []
    for line in ttgir.splitlines():
        line = re.sub(r" loc\([^ ]*\)$", "", line.strip())
        if line.startswith("}") and opened:
            waits = opened.pop()
            found += [min(waits)] if waits else []
        wait = re.search(r"ttg\.async_wait .*\{num = (\d+)", line)
        if wait and any(waits is not None for waits in opened):
            next(waits for waits in reversed(opened) if waits is not None).append(int(wait[1]))
        if line.endswith("{"):
            opened.append([] if re.search(r"\bscf\.(for|while)\b", line) or line == "} do {" else None)
    return tuple(found)


def _field(assembly: str, name: str) -> int:
    return int(re.search(rf"{re.escape(name)}:\s+(\d+)", assembly)[1])


def _read_cubin(cubin: bytes) -> tuple[int, int]:
    """Registers, and bytes of local memory: the kernels use no local arrays, so any of it is a spill."""
    report = _cuobjdump(cubin, "--dump-resource-usage")
    registers, stack, local = map(int, re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", report).groups())
    return registers, stack + local


def _cuobjdump(cubin: bytes, option: str) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        return subprocess.run([tool, option, path], capture_output=True, text=True, check=True).stdout
