"""Figures of this repository's results: ``python -m benchmarks.plot``."""
