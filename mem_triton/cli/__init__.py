"""The command line: ``mem-triton bank``, ``mem-triton write``, ``mem-triton doctor``,
``mem-triton model``."""

from mem_triton.cli.app import main

__all__ = ["main"]
