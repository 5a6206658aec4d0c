"""``python -m benchmarks.engines``."""

from benchmarks.engines.app import main

main()
