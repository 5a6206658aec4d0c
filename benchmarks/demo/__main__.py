"""``python -m benchmarks.demo``: tell facts to a model, ask for them later, without memory and with it."""

from __future__ import annotations

import importlib.util
import sys

if missing := [name for name in ("httpx", "psutil", "rich", "typer") if importlib.util.find_spec(name) is None]:
    sys.exit(
        f"The demo needs {', '.join(missing)}: run `make demo`, or `pip install -e '.[demo]'` in this environment."
    )

from benchmarks.demo.app import main

main()
