"""The command line, ``mem-triton``: one module a command or group of commands, put together in ``app``."""

from mem_triton.cli.app import main

__all__ = ["main"]
