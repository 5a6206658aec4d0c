"""The command::

    python -m benchmarks.kernels --ops memory_attention --save             # one operation, one command
    python -m benchmarks.kernels --ops delta_rule --official ~/delta-Mem   # with the official scan beside it

A row is one way to compute one case: ours, or a baseline of the same run. No time is given where the result was not
right. Without a GPU small shapes run on the ops' CPU paths in torch: such figures say nothing about the kernels.
"""

from __future__ import annotations

import platform
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress

from benchmarks.common import record
from benchmarks.kernels import registry, report, shapes
from benchmarks.kernels.runner import OK, Deadline, Effort, Row, broken, choose_cases, run_case

NOTES = {
    "cuda": "time per call of a CUDA graph, one call per layer, L2 flushed before",
    "cpu": "CPU figures, one thread, of the ops' torch paths: they say nothing about the GPU kernels",
}
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def kernels(
    ops: Annotated[str, typer.Option(help="Operations, with commas between.")] = ",".join(registry.NAMES),
    models: Annotated[str, typer.Option(help="Whose layers' shapes.")] = ",".join(shapes.MODELS),
    cases: Annotated[str, typer.Option(help="Words, only cases whose name contains one; default: all.")] = "",
    dtypes: Annotated[str, typer.Option(help="bf16, fp16, fp32; default: bf16 on a GPU, fp32 on a CPU.")] = "",
    device: Annotated[str | None, typer.Option(help="cuda or cpu; default: cuda if there is one.")] = None,
    official: Annotated[
        Path | None,
        typer.Option(
            envvar="MEM_TRITON_OFFICIAL", help="A checkout of declare-lab/delta-Mem, to measure its scan as well."
        ),
    ] = None,
    rounds: Annotated[int, typer.Option(min=3, help="Runs of each variant.")] = 50,
    seconds: Annotated[float, typer.Option(help="Of timing per case; rounds then stop early.")] = 4.0,
    limit_minutes: Annotated[float | None, typer.Option(help="Start no case that would end later.")] = None,
    save: Annotated[bool, typer.Option("--save", help="Keep JSON and CSV.")] = False,
    folder: Annotated[Path, typer.Option(help="Where --save writes.")] = record.RESULTS,
) -> None:
    """Time our operations beside their floors and baselines. Exit code 1 if any result was wrong."""
    console = Console(highlight=False)
    console = console if console.is_terminal else Console(highlight=False, width=180)  # a log has no edge
    try:
        setup = make_setup(device, official, console)
        whose, kinds = shapes.find(words(models)), words(dtypes) or ["bf16" if setup.gpu else "fp32"]
        planned = [
            (operation, case)
            for operation in map(registry.load, words(ops))
            for case in choose_cases(operation, whose, kinds, words(cases), setup.gpu)
        ]
    except ValueError as error:
        Console(stderr=True, highlight=False).print(str(error), style="bold red", markup=False)
        raise typer.Exit(2) from None
    head = record.about("time of our operations beside floors and baselines", "python -m benchmarks.kernels")
    head |= {"device": device_name(setup), "is_gpu": setup.gpu, "note": NOTES[setup.device]}
    rows: list[Row] = []
    left_out: list[str] = []
    deadline, effort, stopped = Deadline(limit_minutes), Effort(rounds, seconds), ""

    def result() -> dict[str, Any]:
        return head | {
            "correct": all(row["status"] == OK for row in rows),
            "stopped": stopped,
            "cases_left_out": left_out,
            "baselines_left_out": setup.missing,
            "rows": rows,
        }

    console.print(f"{head['device']}: {head['note']}")
    with torch.inference_mode(), Progress(console=console, transient=True) as progress:
        bar = progress.add_task("cases", total=len(planned))
        for operation, case in planned:
            label = f"{case.op}, {case.models[0]}, {case.name}, {case.dtype}"
            progress.update(bar, description=label, advance=1)
            if stopped or deadline.passed():
                stopped = stopped or f"the next case would end after --limit-minutes {limit_minutes:g}"
                left_out.append(label)
                continue
            begin = time.monotonic()
            rows += run_case(operation, case, setup, effort, head["device"])
            stopped = broken(setup)
            deadline.took(took := time.monotonic() - begin)
            if not console.is_terminal:
                console.print(f"{label}: {took:.1f} s")
            if save:  # after every case: a command that is killed leaves what it measured
                path = report.keep(result(), folder)
    for name in dict.fromkeys(row["op"] for row in rows):
        report.show(console, name, [row for row in rows if row["op"] == name])
    if left_out:
        console.print(f"[bold]stopped: {stopped}. Left out, {len(left_out)}:\n" + "\n".join(left_out))
    if save and rows:
        path = report.keep(result(), folder)
        console.print(f"kept in {path} and {path.with_suffix('.csv').name}")
    if not rows or any(row["status"] != OK for row in rows):
        raise typer.Exit(1)


def words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def make_setup(device: str | None, official: Path | None, console: Console) -> registry.Setup:
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device not in NOTES:
        raise ValueError(f"--device: {device!r}, expected cuda or cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device: cuda, but torch finds no GPU here")
    if device == "cpu":
        torch.set_num_threads(1)
    return registry.Setup(device, official, announce=lambda text: console.print(f"[yellow]{text}"))


def device_name(setup: registry.Setup) -> str:
    if setup.gpu:
        return torch.cuda.get_device_name()
    return f"CPU, 1 thread ({record.machine_facts()['cpu'] or platform.machine()})"


def main() -> None:
    """Entry point of ``python -m benchmarks.kernels``."""
    app(prog_name="python -m benchmarks.kernels")
