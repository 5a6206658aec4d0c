#!/usr/bin/env python3
"""Packs what a bare machine with one GPU lacks, and runs there the calls that a GPU session of 45 minutes is made of.

    python scripts/gpu_session.py pack --bundle DIR    # here: fills .bundle/, which travels; checks the size
    python scripts/gpu_session.py call 1               # there: each call ends within ten minutes; results in $OUT
    python scripts/gpu_session.py calls                # anywhere: what each call runs

A bare machine has Python 3.12, torch and Triton, and no package index. DIR holds vLLM as vllm-site.tar.xz with an
install.sh that unpacks it; without --bundle call 4 has no engine to test.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CARRIED = ROOT / ".bundle"
SITE = Path("/tmp/mem_triton_site")
LIMIT = 64 << 20  # bytes of tree and carried folder together
WHEELS = (
    "pydantic==2.14.4",
    "pydantic-core==2.50.5",
    "annotated-types==0.8.0",
    "typing-inspection==0.4.5",
    "usearch==2.26.6",
    "numkong==7.8.6",
    "hypothesis==6.170.17",
    "sortedcontainers==2.4.0",
)
"""What the tests and benchmarks of the kernels import and the machine lacks; pydantic's two must fit each other."""

PYTEST = ["{python}", "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu"]
BENCH = ["{python}", "-m", "benchmarks.kernels", "--limit-minutes", "8", "--save", "--folder", "{out}"]
KERNELS = [
    "tests/gpu/test_memory_attention_gpu.py",
    *(
        f"tests/ops/test_{name}.py"
        for name in (
            "delta_rule_paged",
            "attention_inputs",
            "memory_attention",
            "memory_cascade",
            "batch_invariance",
            "memory_selection",
            "reposition_pages",
        )
    ),
]
LONG = "tests/gpu/test_memory_attention_gpu.py::test_a_long_segment_is_split_and_merged_by_the_last_program"
SANITIZE = ["compute-sanitizer", "--error-exitcode", "1", "--target-processes", "all", "--tool"]
CALLS: dict[int, tuple[str, list[list[str]]]] = {
    1: ("right at all", [[*PYTEST, "{workers}", *KERNELS], [*PYTEST, "tests/gpu/test_wgmma_stress_gpu.py"]]),
    2: ("delta-mem", [[*BENCH, "--ops", "delta_rule,attention_inputs", "--models", "qwen3-4b"]]),
    3: ("attention", [[*BENCH, "--ops", "memory_attention", "--models", "qwen3-8b"]]),
    4: ("vLLM", [[*PYTEST, f"tests/gpu/test_{name}_gpu.py"] for name in ("warmup", "vllm", "vllm_memory")]),
    5: ("compute-sanitizer", [[*SANITIZE, tool, *PYTEST, LONG] for tool in ("memcheck", "racecheck")]),
}
MODELS = [f"benchmarks/recall/{name}/model.safetensors" for name in ("model", "model-memory")]
"""Tracked files that no call reads: 14 MB."""
SECONDS = 560  # of a call, all of its commands together


def commands(number: int, out: str) -> list[list[str]]:
    """Command lines of a call. Tests run in six processes where pytest-xdist is installed."""
    workers = ["-n", "6"] if importlib.util.find_spec("xdist") else []
    filled = []
    for line in CALLS[number][1]:
        words = [word.format(python=sys.executable, out=out, workers="{workers}") for word in line]
        place = words.index("{workers}") if "{workers}" in words else None
        filled.append(words if place is None else [*words[:place], *workers, *words[place + 1 :]])
    return filled


def pack(bundle: Path | None, without_models: bool) -> int:
    """Fill the carried folder and return the bytes that would travel. ValueError if they are too many.

    without_models: take MODELS out of the working tree; ``git checkout`` puts them back, so none of them may be
    changed.
    """
    if without_models:
        if subprocess.run(["git", "diff", "--quiet", "--diff-filter=M", "HEAD", "--", *MODELS], cwd=ROOT).returncode:
            raise ValueError(f"{' or '.join(MODELS)}: changed, and only what is committed can be put back")
        for name in MODELS:
            (ROOT / name).unlink(missing_ok=True)
        print("left out until you run: git checkout --", *MODELS)
    shutil.rmtree(CARRIED, ignore_errors=True)
    (CARRIED / "wheels").mkdir(parents=True)
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "download",
            "-q",
            "--no-deps",
            "--only-binary=:all:",
            "--python-version",
            "3.12",
            *(f"--platform=manylinux_{old}_x86_64" for old in ("2_28", "2_27", "2_17")),
            "--platform=manylinux2014_x86_64",
            "-d",
            CARRIED / "wheels",
            *WHEELS,
        ],
        check=True,
    )
    for name in ("vllm-site.tar.xz", "install.sh") if bundle else ():
        shutil.copy(bundle / name, CARRIED / name)
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    files = {ROOT / name for name in listed.split("\0") if name} | set(CARRIED.rglob("*"))
    sizes = {path: path.stat().st_size for path in files if path.is_file()}
    total = sum(sizes.values())
    if total > LIMIT:
        largest = sorted(sizes, key=sizes.get, reverse=True)[:4]
        raise ValueError(
            f"{total >> 20} MiB would travel, at most {LIMIT >> 20}: give --without-models or move something away; "
            f"the largest are {', '.join(f'{path.relative_to(ROOT)} ({sizes[path] >> 20} MiB)' for path in largest)}"
        )
    return total


def install() -> dict[str, str]:
    """Unpack what was carried, and return the environment in which it is found."""
    SITE.mkdir(exist_ok=True)
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", SITE, "--upgrade"]
    subprocess.run([*pip, *sorted((CARRIED / "wheels").glob("*.whl"))], check=True)
    subprocess.run([*pip, "--no-build-isolation", ROOT], check=True)  # the entry points of the plugin
    environment = dict(os.environ)
    if (CARRIED / "install.sh").exists():
        printed = subprocess.run(
            ["bash", "-c", f'. "{CARRIED}/install.sh" >&2 && env -0'], capture_output=True, text=True, check=True
        ).stdout
        environment |= dict(pair.split("=", 1) for pair in printed.split("\0") if "=" in pair)
    # The checkout first, then what it was installed with: benchmarks and tests are in the checkout alone.
    paths = [str(ROOT), str(ROOT / "integrations"), str(SITE), environment.get("PYTHONPATH", "")]
    return environment | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


def call(number: int) -> int:
    """Run a call's commands one after the other, each with its log in $OUT; returns how many failed."""
    out = Path(os.environ.get("OUT", "/tmp"))
    environment, end, failed = install(), time.monotonic() + SECONDS, 0
    for index, line in enumerate(commands(number, str(out))):
        log = out / f"call{number}-{index}.log"
        print("+", " ".join(line), flush=True)
        with log.open("wb") as file:
            try:
                left = max(1.0, end - time.monotonic())
                code = subprocess.run(
                    line, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, timeout=left
                ).returncode
            except (subprocess.TimeoutExpired, FileNotFoundError) as error:
                code = f"{type(error).__name__}: {error}"
        failed += code != 0
        print(*log.read_text(errors="replace").splitlines()[-12:], f"-> {code}", sep="\n", flush=True)
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    packing = verbs.add_parser("pack")
    packing.add_argument("--bundle", type=Path)
    packing.add_argument("--without-models", action="store_true")
    verbs.add_parser("call").add_argument("number", type=int, choices=CALLS)
    verbs.add_parser("calls")
    given = parser.parse_args()
    if given.verb == "pack":
        print(f"{pack(given.bundle, given.without_models) / 2**20:.1f} MiB travel; run with carry=['{CARRIED.name}']")
    elif given.verb == "calls":
        for number, (what, _) in CALLS.items():
            print(f"{number}: {what}", *(" ".join(line) for line in commands(number, "$OUT")), sep="\n   ")
    else:
        return call(given.number)
    return 0


if __name__ == "__main__":
    sys.exit(main())
