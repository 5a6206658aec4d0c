"""``mem-triton doctor``: which versions are here, what Triton can compile for, the GPU's tables, what is off."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from mem_triton import __version__, compat
from mem_triton.cli import output
from mem_triton.cli.doctor_kernels import examine_kernels, examine_plugins

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
EXTRAS = ("usearch", "faiss-cpu", "sentence-transformers", "openai", "safetensors")


def doctor(
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    architecture: Annotated[
        str | None, typer.Option(help="Tell of this one, such as sm90 or gfx942, instead of the GPU that is here.")
    ] = None,
    pools: Annotated[
        Path | None, typer.Option(metavar="MEMORY", help="Tell of this store of MemoryLLM's pools, too: its sizes.")
    ] = None,
) -> None:
    """Versions of Triton, its compilers, the engines and the GPU; which tables it gets, what is off and why.

    Exit code 1 if something will not work."""
    report = examine(architecture, pools)
    if json:
        output.print_json(report)
    else:
        kernels = report["kernels"]
        output.print_table(["", "version", "tested with", ""], [_row(v) for v in report["versions"]])
        print()
        output.print_fields({**report["triton"], **report["gpu"], "architecture": kernels["architecture"]})
        if kernels["tables"]:
            print()
            rows = [[t["op"], t["entry"], t["measured"] or "not measured"] for t in kernels["tables"]]
            output.print_table(["tuning table", "entry", "measured"], rows)
        print()
        output.print_table(["off", "why"], [[o["what"], o["why"]] for o in kernels["off"]])
        print()
        output.print_fields({f"{engine} sees": what for engine, what in report["plugins"].items()})
        if report["pools"]:
            print()
            sizes = {k: output.size(v) if k.endswith("bytes") else v for k, v in report["pools"].items()}
            output.print_fields({f"pool {name}": value for name, value in sizes.items()})
        print()
        print("\n".join(report["problems"]) or "all well")
    if report["problems"]:
        raise typer.Exit(1)


def examine(architecture: str | None = None, pools: Path | None = None) -> dict[str, Any]:
    """All findings; "problems" are sentences that name what is wrong and what to do. architecture: None = the GPU's.

    pools: a store whose sizes are told.
    """
    problems: list[str] = []
    versions: list[dict[str, Any]] = [
        {"name": "mem_triton", "version": __version__, "tested": None, "ok": True},
        {
            "name": "python",
            "version": platform.python_version(),
            "tested": compat.PYTHON,
            "ok": compat.lies_in(platform.python_version(), compat.PYTHON),
        },
    ]
    for name, tested in compat.TESTED_VERSIONS.items():
        version = compat.installed_version(name)
        try:
            ok = version is None or bool(compat.require(name))
        except compat.UnsupportedVersionError as error:
            ok = False
            problems.append(str(error))
        versions.append({"name": name, "version": version and str(version), "tested": tested, "ok": ok})
    for name in EXTRAS:
        version = compat.installed_version(name)
        versions.append({"name": name, "version": version and str(version), "tested": None, "ok": True})
    return {
        "versions": versions,
        "triton": _triton(problems),
        "gpu": _gpu(problems),
        "kernels": examine_kernels(architecture),
        "plugins": examine_plugins(problems),
        "pools": _pools(pools, problems) if pools is not None else {},
        "problems": problems,
    }


def _row(version: dict[str, Any]) -> list[str]:
    return [
        version["name"],
        version["version"] or "not installed",
        version["tested"] or "",
        "" if version["ok"] else "!",
    ]


def _pools(path: Path, problems: list[str]) -> dict[str, Any]:
    """What a version of a store's pools takes, on the host and, in the store's precision, on one device."""
    from mem_triton.systems.memoryllm.convert import describe
    from mem_triton.systems.memoryllm.pools import Pools
    from mem_triton.systems.memoryllm.records import PoolError

    try:
        return describe(Pools.open(path))
    except PoolError as error:
        problems.append(str(error))
        return {}


def _triton(problems: list[str]) -> dict[str, str]:
    """Version of each ptxas, and for each architecture whether a kernel compiles; needs no GPU."""
    try:
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        from mem_triton.cli.probe_kernels import scale
    except ImportError as error:
        problems.append(f"triton cannot be imported ({error}); GPUs are not served, CPUs are")
        return {"triton": "not importable"}
    found: dict[str, str] = {}
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    for tool in sorted(tools.glob("ptxas*")):
        version = _output([str(tool), "--version"])
        match = re.search(r"release ([\d.]+), V([\d.]+)", version or "")
        found[tool.name] = match[2] if match else "does not run"
    for name, target in TARGETS.items():
        source = ASTSource(scale, {"x": "*fp32", "factor": "fp32", "BLOCK": "constexpr"}, {(2,): 64}, {})
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                triton.compile(source, target=GPUTarget(*target))
            found[name] = "compiles"
        except Exception as error:  # whatever a compiler says
            found[name] = f"does not compile: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return found


def _gpu(problems: list[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    if shutil.which("nvidia-smi"):
        fields = "name,driver_version,memory.total,compute_cap"
        listed = _output(["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"])
        for i, line in enumerate((listed or "nvidia-smi does not answer").strip().splitlines()):
            found[f"GPU {i}"] = line
    import torch

    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(i)
            found[f"torch cuda:{i}"] = f"{torch.cuda.get_device_name(i)}, sm_{major}{minor}, CUDA {torch.version.cuda}"
            if (major, minor) < (8, 0):
                problems.append(f"cuda:{i} is sm_{major}{minor}; kernels are tested from sm_80 on")
    elif found:
        problems.append("there is a GPU that torch cannot use; install a CUDA build of torch for this driver")
    return found or {"GPU": "none (kernels run on the CPU through torch)"}


def _output(command: list[str]) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
