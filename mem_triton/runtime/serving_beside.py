"""Makes the second server of a merged memory model: beside the first one, on the next port, asked by it alone."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mem_triton.config import ConfigError
from mem_triton.runtime.serving import Serving, option_of, program_of
from mem_triton.runtime.together import Program, Together

PORTS = {"vllm": 8000, "sglang": 30000}
"""Where the engines listen if nothing else is said."""
HOST, NAME = "127.0.0.1", "memo"
_FIRST_S_OWN = (
    "--host",
    "--port",
    "--uds",
    "--served-model-name",
    "--api-key",
    "--root-path",
    "--ssl-",
    "--chat-template",
)
_OF_ADAPTERS = ("--enable-lora", "--max-lora", "--max-cpu-loras", "--max-loaded-loras", "--lora-")
"""Beginnings of options that the second server does not get."""
_KEYS = ("VLLM_API_KEY", "MEM_TRITON_CONFIG")
"""Variables that it does not get: nobody but the first server reaches it, and it has no memory of ours."""


@dataclass(frozen=True)
class Beside:
    """A whole model that is served beside ``serving``. folder: the merged model's. adapter: what was merged into it."""

    engine: str
    folder: Path
    adapter: Path
    more: Sequence[str] = ()

    @property
    def port(self) -> int:
        """The one behind the first server's. Raises ConfigError."""
        said = option_of(self.more, "--port") or str(PORTS[self.engine])
        if not said.isdecimal() or not 0 < int(said) < 65535:
            raise ConfigError(f"--port {said}: must be a number from 1 to 65534; the memory model gets the next one")
        return int(said) + 1

    @property
    def spec(self) -> str:
        """The memory model, as the first server asks it."""
        return f"http://{HOST}:{self.port}/v1#{NAME}"

    def arguments(self) -> list[str]:
        """The engine's command. It has the options of the first server but those that are its own."""
        start = ["vllm", "serve"] if self.engine == "vllm" else [sys.executable, "-m", "sglang.launch_server"]
        start += [str(self.folder)] if self.engine == "vllm" else ["--model-path", str(self.folder)]
        own = ["--served-model-name", NAME, "--host", HOST, "--port", str(self.port)]
        return [*start, *own, *shared(self.more)]

    def printed(self, serving: Serving) -> str:
        """Lines for a shell that do what ``run`` does, but that both end together."""
        merge = ["mem-triton", "memo", "merge", str(self.adapter), "--into-base", "--base", serving.model]
        merge += ["--out", str(self.folder)]
        return f"{shlex.join(merge)}\n{shlex.join(self.arguments())} &\n{serving.printed()}"

    def run(self, serving: Serving) -> int:
        """Run both servers until one of them ends; returns the exit code."""
        file, command = program_of(self.engine, self.arguments())
        environment = {name: value for name, value in os.environ.items() if name not in _KEYS}
        memory = Program("the memory model's server", file, command, environment, f"http://{HOST}:{self.port}/health")
        return Together().run([memory, Program("the server", *serving.program())])


def shared(options: Sequence[str]) -> list[str]:
    """The options that both servers get, with their values."""
    kept, keeps = [], True
    for word in options:
        if word.startswith("--"):
            keeps = not word.startswith((*_FIRST_S_OWN, *_OF_ADAPTERS))
        if keeps:
            kept.append(word)
    return kept
