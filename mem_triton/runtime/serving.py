"""Makes the command that starts an engine's server with memory: vLLM's or SGLang's own, with their own options."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mem_triton.config import ConfigError, parse_config
from mem_triton.systems.lora_files import AdapterFiles, check_base, read_adapter_files

ENGINES = {"vllm": "vLLM", "sglang": "SGLang"}
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks that vLLM takes for ``--max-lora-rank``."""
PLUGINS = "VLLM_PLUGINS"
CONFIG = "MEM_TRITON_CONFIG"
CONFIG_FILE = "mem.yaml"
"""The file that a printed command writes for SGLang."""
_OURS = {
    "vllm": ("--load-format", "--additional-config", "--lora-modules"),
    "sglang": ("--model-path", "--model", "--attention-backend", "--lora-paths"),
}


@dataclass(frozen=True)
class Serving:
    """What is to be served. model: a folder, or a name on a hub. section: of the configuration. adapters: LoRA
    adapters' folders, by the name under which each is served. more: options for the engine.
    """

    engine: str
    model: str
    section: Mapping[str, Any]
    adapters: Mapping[str, Path] = field(default_factory=dict)
    more: Sequence[str] = ()

    def check(self) -> None:
        """Raise ConfigError for what cannot start: a missing folder, an adapter of another base or of too high a rank,
        an option that is set here."""
        if not Path(self.model).is_dir() and (self.model.startswith((".", "/", "~")) or self.model.count("/") > 1):
            raise ConfigError(f"{self.model}: there is no such folder; give the model's")
        for option in self.more:
            name = option.partition("=")[0]
            if name in _OURS[self.engine]:
                raise ConfigError(
                    f"{name} is set by mem-triton serve; start the engine by a printed command to change it"
                )
        parse_config(self.section)
        limit = option_of(self.more, "--max-lora-rank")
        if limit is not None and not limit.isdecimal():
            raise ConfigError(f"--max-lora-rank {limit}: must be a whole number")
        for adapter in self.files:
            folder = adapter.folder
            check_base(adapter, self.model)
            if limit is not None and adapter.rank > int(limit):
                raise ConfigError(
                    f"{folder}: has rank {adapter.rank}, and --max-lora-rank is {limit}; raise it, or leave it out"
                )
            if self.engine == "vllm" and adapter.rank > RANKS[-1]:
                raise ConfigError(f"{folder}: has rank {adapter.rank}, and vLLM serves at most {RANKS[-1]}")

    @cached_property
    def files(self) -> list[AdapterFiles]:
        """What the adapters' files say. Raises ConfigError."""
        return [read_adapter_files(folder) for folder in self.adapters.values()]

    @property
    def environment(self) -> dict[str, str]:
        """Variables that the engine needs. vLLM loads plugins' routes only where this list names them."""
        if self.engine != "vllm" or "memo" not in self.section:
            return {}
        named = [name for name in os.environ.get(PLUGINS, "").split(",") if name]
        return {PLUGINS: ",".join([*named, *({"mem_triton"} - set(named))])}

    def arguments(self) -> list[str]:
        """The engine's command, without its configuration file's variable."""
        start = (
            ["vllm", "serve"]
            if self.engine == "vllm"
            else [sys.executable, "-m", "sglang.launch_server", "--model-path"]
        )
        return [*start, self.model, *self.options()]

    def options(self) -> list[str]:
        """The command's options behind the model."""
        lora = [f"{name}={folder}" for name, folder in self.adapters.items()]
        options = ["--enable-lora"] if lora and "--enable-lora" not in self.more else []
        if lora and option_of(self.more, "--max-lora-rank") is None:
            rank = max(adapter.rank for adapter in self.files)
            served = next((r for r in RANKS if r >= rank), rank) if self.engine == "vllm" else rank
            options += ["--max-lora-rank", str(served)]
        if len(lora) > 1 and self.engine == "vllm" and option_of(self.more, "--max-loras") is None:
            options += ["--max-loras", str(len(lora))]  # one step's requests may use all of them
        if self.engine == "vllm":
            said = json.dumps({"mem_triton": self.section}, ensure_ascii=False)
            start = ["--load-format", "mem_triton", "--additional-config", said]
            options += ["--lora-modules", *lora] if lora else []
        else:
            start = ["--attention-backend", "mem_triton"]
            options += ["--lora-paths", *lora] if lora else []
        return [*start, *options, *self.more]

    def printed(self) -> str:
        """Lines for a shell that do what ``run`` does."""
        set_first = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        before = ""
        if self.engine == "sglang":
            before = f"cat > {CONFIG_FILE} <<'END'\n{json.dumps(self.section, ensure_ascii=False, indent=2)}\nEND\n"
            set_first.append(f"{CONFIG}={CONFIG_FILE}")
        return before + " ".join([*set_first, shlex.join(self.arguments())])

    def program(self) -> tuple[str, list[str], dict[str, str]]:
        """(file, arguments, environment) of the engine's server."""
        environment = {**os.environ, **self.environment}
        if self.engine == "sglang":
            environment[CONFIG] = _in_memory(json.dumps(self.section))
        return *program_of(self.engine, self.arguments()), environment

    def run(self) -> None:
        """Become the engine's server: signals and the exit code are its own. Returns only by an exception."""
        program = self.program()
        sys.stdout.flush()
        sys.stderr.flush()
        os.execve(*program)


def program_of(engine: str, command: list[str]) -> tuple[str, list[str]]:
    """(file, arguments) that run an engine's command in this environment, whatever is first in PATH."""
    if engine == "sglang":
        return sys.executable, command
    program = str(Path(sys.executable).with_name("vllm"))
    if Path(program).is_file():
        return program, command
    return sys.executable, [sys.executable, "-m", "vllm.entrypoints.cli.main", *command[1:]]


def engine_of(named: str | None) -> str:
    """The engine to start. Raises ConfigError naming what is not known, or not installed."""
    if named is not None and named not in ENGINES:
        raise ConfigError(f"--engine {named}: one of {', '.join(ENGINES)}")
    for engine in [named] if named else ENGINES:
        if find_spec(engine) is not None:
            return engine
    told = f"{ENGINES[named]} is not" if named else "neither vLLM nor SGLang is"
    raise ConfigError(f"{told} installed in this environment: pip install 'mem-triton[{named or 'vllm'}]'")


def option_of(options: Sequence[str], name: str) -> str | None:
    """The value of an option among an engine's, the last one that is given."""
    found = None
    for place, option in enumerate(options):
        if option == name and place + 1 < len(options):
            found = options[place + 1]
        elif option.startswith(f"{name}="):
            found = option.partition("=")[2]
    return found


def _in_memory(text: str) -> str:
    """A file without a place on a disk, which is there for this process and those that it starts."""
    descriptor = os.memfd_create("mem_triton", 0)
    os.write(descriptor, text.encode())
    os.set_inheritable(descriptor, True)
    return f"/proc/{os.getpid()}/fd/{descriptor}"
