"""``mem-triton doctor`` about kernels and plugins: the architecture, the tables it gets, what is off and why."""

from __future__ import annotations

import os
from importlib.metadata import entry_points
from typing import Any

from mem_triton import compat
from mem_triton.ops import denylist
from mem_triton.ops.tuning.overview import tables_for

PLUGINS = {  # engine -> entry-point group, the variable that may shut plugins out
    "vllm": ("vllm.general_plugins", "VLLM_PLUGINS"),
    "sglang": ("sglang.srt.plugins", "SGLANG_PLUGINS"),
}


def examine_kernels(architecture: str | None) -> dict[str, Any]:
    """What runs on an architecture; None = that of the first GPU, or the CPU where there is none.

    "tables": per op, whether the architecture has an entry of its own, and what that was measured by.
    """
    off: list[dict[str, str]] = []
    triton = compat.installed_version("triton")
    if architecture is None:
        architecture = _first_gpu()
    if architecture is None:
        off.append({"what": "Triton kernels", "why": "no GPU that torch can use: every op runs in torch on the CPU"})
    elif triton is None:
        off.append({"what": "Triton kernels", "why": "Triton is not installed: only CPUs are served"})
    else:
        off += [
            {
                "what": f"{', '.join(entry.kernels)}: tiles from {entry.block_m} rows and {entry.warps} warps on"
                + (", for heads of two parts (80, 96)" if entry.rest else ""),
                "why": f"{entry.what} under Triton {triton} ({entry.issue}); smaller tiles run",
            }
            for entry in denylist.denials(str(triton), architecture)
        ]
    for engine in PLUGINS:
        if compat.installed_version(engine) is None:
            off.append({"what": f"serving with {engine}", "why": f"{engine} is not installed in this environment"})
    return {
        "architecture": architecture or "cpu",
        "tables": [use._asdict() for use in tables_for(architecture)] if architecture else [],
        "off": off,
    }


def examine_plugins(problems: list[str]) -> dict[str, str]:
    """What each installed engine will find of mem_triton; adds to ``problems`` what keeps it from looking."""
    found = {}
    for engine, (group, variable) in PLUGINS.items():
        if compat.installed_version(engine) is None:
            continue
        if "mem_triton" not in entry_points(group=group).names:
            found[engine] = "no entry point"
            problems.append(f"{engine} does not see mem_triton in {group}: install it in the environment of {engine}")
            continue
        found[engine] = f"mem_triton in {group}"
        names = os.environ.get(variable)
        shut_out = names is not None if engine == "vllm" else bool(names)  # SGLang takes "" for "all"
        if shut_out and "mem_triton" not in [name.strip() for name in names.split(",")]:
            problems.append(
                f"{variable}={names!r} keeps {engine} from loading mem_triton: add it, or unset the variable"
            )
    return found


def _first_gpu() -> str | None:
    import torch

    from mem_triton.ops.common.architecture import architecture

    return architecture(torch.device("cuda", 0)) if torch.cuda.is_available() else None
