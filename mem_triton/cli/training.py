"""What the commands of ``mem-triton train`` share: modules of the integration, progress, and how a run ends."""

from __future__ import annotations

import importlib
import shlex
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import typer

from mem_triton.cli import output
from mem_triton.cli.stopping import Stop

EVERY = 5.0
"""Seconds between two lines about steps."""


class TrainingLines:
    """Takes the lines of a run's log. evaluation: what is said of an evaluation, None for a line of another kind; step:
    what is said of a step, now and then. quiet: nothing is said."""

    def __init__(
        self,
        quiet: bool,
        evaluation: Callable[[Mapping[str, Any]], str | None],
        step: Callable[[Mapping[str, Any]], str],
    ) -> None:
        self.quiet, self.evaluation, self.step, self.said = quiet, evaluation, step, 0.0

    def __call__(self, line: Mapping[str, Any]) -> None:
        if (text := self.evaluation(line)) is not None:
            return self.say(text)
        if "loss" not in line or time.monotonic() - self.said < EVERY:
            return None
        self.said = time.monotonic()
        return self.say(self.step(line))

    def say(self, text: str) -> None:
        """Say a sentence."""
        if not self.quiet:
            print(output.plain(text), file=sys.stderr, flush=True)


def integration(name: str, needs: str, extra: str) -> Any:
    """Import a module of the transformers integration by its name, since this package does not depend on it.

    Raises ImportError naming what is missing and the extra that has it.
    """
    try:
        found = importlib.import_module(f"mem_triton_transformers.{name}")
    except ImportError as error:
        raise ImportError(f'training needs {needs} ({error}): pip install "mem-triton[{extra}]"') from None
    importlib.import_module("transformers.utils.logging").disable_progress_bar()
    return found


def run(train: Callable[..., dict[str, Any] | None], out: Path, lines: TrainingLines, **options: Any) -> dict[str, Any]:
    """Train into ``out`` and give the report. A run that the user stops ends the command with exit code 130."""
    with Stop() as stopping:
        report = train(
            out=out,
            command=shlex.join(["mem-triton", *sys.argv[1:]]),
            stop=stopping,
            tell=lines,
            say=lines.say,
            **options,
        )
    if report is None:
        print(f"mem-triton: stopped; {out} holds a checkpoint, the same command goes on from there", file=sys.stderr)
        raise typer.Exit(130)
    return report
