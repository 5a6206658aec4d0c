"""``python -m benchmarks.plot``: figures of what the benchmarks have kept."""

from benchmarks.plot.app import main

main()
