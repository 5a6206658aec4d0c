"""Whether this environment has what a run needs, and what to install if not."""

from __future__ import annotations

import importlib.util
import sys

from benchmarks.common.server import BenchmarkError

NEEDS = {
    "vllm": ("vllm", "mem_triton_vllm", "transformers"),
    "sglang": ("sglang", "mem_triton_sglang", "transformers", "datasets"),  # its client imports all of its data sets
}
MAKES = {"vllm": "make env", "sglang": "make env-sglang"}


def require(engine: str) -> None:
    """Raise BenchmarkError naming the packages that are missing, and the command that installs them."""
    missing = [name for name in NEEDS[engine] if importlib.util.find_spec(name) is None]
    if not missing:
        return
    if missing == ["datasets"]:
        raise BenchmarkError(
            "sglang.bench_serving imports the package datasets, which this environment lacks. Install it with\n"
            f"  {sys.executable} -m pip install -e '.[bench]'"
        )
    raise BenchmarkError(
        f"This Python ({sys.executable}) has no {', '.join(missing)}. `{MAKES[engine]}` makes an environment that has; "
        "run this with its Python."
    )
