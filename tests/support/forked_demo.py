"""``python -m benchmarks.demo`` in a process that has imported an engine.

Its servers are forks of it, with the arguments, environments and process groups of those that a person starts.
"""

from __future__ import annotations

import signal
from pathlib import Path

from benchmarks.common.running import ENDINGS
from benchmarks.common.server import Server
from benchmarks.demo.app import main
from tests.support.zygote import Child

COMMANDS = {
    "vllm": "import sys; from vllm.entrypoints.cli.main import main; sys.exit(main())",
    "sglang": "import sys; from sglang.cli.main import main; sys.exit(main())",
}
"""What an installed command runs."""


def start(server: Server) -> None:
    """In the place of ``Server.start``."""
    kept = {number: signal.signal(number, signal.SIG_DFL) for number in ENDINGS}  # as in any program that begins
    try:
        command, *arguments = server.command
        files = ["/dev/null", str(server.log), str(server.log)]
        server.process = Child(["-c", COMMANDS[Path(command).name], *arguments], server.environment(), files)
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    Server.start = start
    main()
