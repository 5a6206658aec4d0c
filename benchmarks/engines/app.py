"""Stock engines against the same engines with memory, by the engines' own benchmark tools.

    python -m benchmarks.engines latency throughput --memory delta explicit --batches 1 16 --contexts 128 --save
    python -m benchmarks.engines pool --model qwen3-8b --batches 1 16 64 --limit-minutes 9 --save
    python -m benchmarks.engines serve --engine sglang --memory delta

Parts: latency and throughput run ``vllm bench latency`` and ``vllm bench throughput`` on engines that stay up (see
``toolhost``); serve runs ``vllm bench serve`` or ``sglang.bench_serving`` against servers; pool compares one shared
pool with the same pool read by each request for itself; rag is ``python -m benchmarks.rag``, recall questions with
memory and with text. Both sides have the same command but memory's flags. They run in turns, stock, memory, memory,
stock, ...; what is said is the ratio of pairs. No speed is said of an engine whose greedy answers are not those of
transformers with the same memory (see ``gate``). Exit code 1 if a gate is red.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.common.record import RESULTS, ROOT, about, digests, save
from benchmarks.common.running import REST, deaf, end_by_interrupt
from benchmarks.common.server import (
    BenchmarkError,
    Launch,
    MemoryFlags,
    Server,
    choose_ports,
    has_gpu,
    spare_cores,
    usual_dtype,
)
from benchmarks.engines import commands, made_up, memories, report, usage
from benchmarks.engines.commands import Cell, Setting
from benchmarks.engines.floor import Machine, decode_floor_ms, measure_machine
from benchmarks.engines.gate import TOKENS, Oracle
from benchmarks.engines.memories import STOCK, Comparison, Memory
from benchmarks.engines.pairs import Deadline, run_pairs
from benchmarks.engines.requirements import require
from benchmarks.engines.sides import SglangServed, Side, ToolHost, VllmServed, VllmTools

PARTS = {"vllm": ("latency", "throughput", "serve", "pool", "rag"), "sglang": ("serve", "pool")}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    gpu = has_gpu()
    parser = argparse.ArgumentParser(
        "python -m benchmarks.engines", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("parts", nargs="*", default=["latency"], help=f"vllm: {', '.join(PARTS['vllm'])}; sglang: serve, pool")
    add("--engine", choices=tuple(PARTS), default="vllm")
    add(
        "--memory",
        nargs="+",
        default=["delta"],
        metavar="KIND",
        help="delta, explicit, pool, text, memoryllm, memoryllm-unread",
    )
    add("--batches", nargs="+", type=int, default=[1, 4, 16, 64, 256] if gpu else [1, 16], metavar="N")
    add("--contexts", nargs="+", type=int, default=[1024] if gpu else [128], metavar="N", help="prompt tokens")
    add("--output", type=int, default=128 if gpu else 32, help="output tokens of a request")
    add("--repeats", type=int, default=5 if gpu else 9, help="pairs of runs")
    add("--iterations", type=int, default=3 if gpu else 1, help="of a batch in a run of vllm bench latency")
    add(
        "--model",
        default="qwen3-4b" if gpu else "qwen3-100m",
        help=f"folder, Hugging Face id, or a random model: {', '.join(made_up.SHAPES)}",
    )
    add("--dtype", default=usual_dtype(), help="the engines' --dtype")
    add("--pool-tokens", type=int, default=12800 if gpu else 2048, help="length of the shared pool")
    add("--eager", action="store_true", help="vLLM without graphs and compilation, both sides")
    add("--engine-args", default="", help='more arguments of the engines, both sides: "--block-size 32"')
    add("--limit-minutes", type=float, help="stop in time, keep what there is, and say what is missing")
    add("--keep", type=Path, help="folder for models, banks and logs; by default a temporary one")
    add("--save", action="store_true", help="keep the figures under benchmarks/results")
    args = parser.parse_args(argv)
    for part in args.parts:
        if part not in PARTS[args.engine]:
            parser.error(f"{part!r} is no part on {args.engine}: choose from {', '.join(PARTS[args.engine])}")
        try:
            memories.comparisons(args.memory, part)
        except ValueError as error:
            parser.error(str(error))
    if args.output < 2:
        parser.error("--output: a decode step is what lies between the first and the last token; give at least 2")
    return args


class Course:
    """One run: what is made, which engines are up, and what was found."""

    def __init__(self, args: argparse.Namespace, folder: Path, console: Console) -> None:
        import torch

        self.args, self.folder, self.console = args, folder, console
        self.head = about("stock engines and the same with memory, in pairs of runs", "python -m benchmarks.engines")
        self.deadline = Deadline(args.limit_minutes)
        self.gpu = has_gpu()
        self.made = made_up.make_model(args.model, folder, getattr(torch, args.dtype))
        self.weights = digests(self.made.folder) if self.made.facts["parameters"] < 1e9 else {}
        self.memories: dict[str, Memory] = {}
        for name in self._names():
            folder = self.folder / name.replace(" ", "-")
            self.memories[name] = memories.make_memory(name, self.made, folder, args.pool_tokens)
        self.made.make_oracle()
        self.oracle = Oracle(self.made.model, exact=self.made.dtype == torch.float32)
        self.up: dict[tuple[bool, str], Side] = {}
        self.client: ToolHost | None = None
        self.gates: dict[str, dict[str, Any]] = {}
        self.held: dict[str, dict[str, float]] = {}
        self.rows: list[dict[str, Any]] = []
        self.missing: list[str] = []
        self.commands: dict[str, str] = {}
        threads = int(os.environ.get("OMP_NUM_THREADS") or spare_cores())
        self.machine: Machine = measure_machine(self.made.dtype, threads)
        self.setting = self._setting()
        self.start_seconds = 0.0

    def _names(self) -> list[str]:
        """The engines that this run needs."""
        parts = [part for part in self.args.parts if part != "rag"]
        pairs = [comparison for part in parts for comparison in memories.comparisons(self.args.memory, part)]
        return list(dict.fromkeys([STOCK, *(name for pair in pairs for name in (pair.baseline, pair.memory))]))

    def _setting(self) -> Setting:
        a, text = self.args, made_up.REFERENCES * made_up.REFERENCE_TOKENS
        longest = max(a.contexts) + a.output + (text if "text" in a.memory else 0) + 16
        longest = max(longest, 256)  # the gate's prompts
        kv = max(a.batches) * (longest + 64) * memories.kv_bytes_per_token(self.made)
        if "pool" in (*a.parts, *a.memory):
            longest += a.pool_tokens  # named memory counts against the context
        return Setting(
            self.made.folder,
            a.dtype,
            longest,
            max(a.batches),
            self.gpu,
            kv_gib=-(-kv // 2**30),
            eager=a.eager,
            extra=tuple(a.engine_args.split()),
            iterations=a.iterations,
        )

    def run(self) -> None:
        for part in self.args.parts:
            if part == "rag":
                self._rag()
                continue
            for comparison in memories.comparisons(self.args.memory, part):
                self._compare(part, comparison)
                self.keep()

    def _compare(self, part: str, comparison: Comparison) -> None:
        tool = ("latency" if self.args.engine == "vllm" else "serve") if part == "pool" else part
        cells = [Cell(b, c, self.args.output) for c in self.args.contexts for b in self.args.batches]
        what = f"{part}, {comparison.name}: {comparison.memory} against {comparison.baseline}"
        names = (comparison.baseline, comparison.memory)
        if not self.deadline.allows(2 * self.start_seconds):
            self.missing.append(f"{what}: no time was left")
            return
        baseline, memory = self._sides(names, tool == "serve")
        verdicts = [self.gates[name] for name in names]
        if any(v["gate"] != "green" for v in verdicts):  # say it, and measure nothing
            red = next(v for v in verdicts if v["gate"] != "green")
            nothing = {"baseline": [], "memory": []}
            self.rows += [report.row(part, comparison, cell, nothing, red, 0.0) for cell in cells]
            return
        for cell in cells:
            if reason := self._misfit(cell, comparison, (baseline, memory)):
                self.missing.append(f"{what}, batch {cell.batch}, context {cell.context}: {reason}")
                continue
            self.console.print(f"[dim]{what}: batch {cell.batch}, context {cell.context}")
            run = {
                "baseline": partial(self._measure, baseline, tool, cell.longer(comparison.more)),
                "memory": partial(self._measure, memory, tool, cell),
            }
            found, _ = run_pairs(run, self.args.repeats, self.deadline)
            if (pairs := len(found["memory"])) < self.args.repeats:
                left = f"{pairs} of {self.args.repeats} pairs; the time was over"
                self.missing.append(f"{what}, batch {cell.batch}, context {cell.context}: {left}")
            if pairs:
                floor = decode_floor_ms(self.made, cell, self.machine)
                self.rows.append(report.row(part, comparison, cell, found, verdicts[1], floor))

    def _measure(self, side: Side, tool: str, cell: Cell, repeat: int) -> dict[str, float]:
        time.sleep(0 if self.gpu else REST)
        figures = side.measure(tool, cell, repeat)
        self.commands.setdefault(f"{side.name}, {tool}", side.shown(tool, cell))
        held = self.held.setdefault(side.name, {})
        held["resident_gib"] = max(held.get("resident_gib", 0), usage.resident_gib(side.server.process.pid))
        return figures

    def _misfit(self, cell: Cell, comparison: Comparison, sides: tuple[Side, Side]) -> str:
        """Why a cell cannot be measured; a batch that does not fit would be served in parts."""
        for side, more in zip(sides, (comparison.more, 0), strict=True):
            needs, has = cell.batch * (cell.context + more + cell.output), side.kv_tokens
            if has is not None and needs > has:
                return f"needs {needs} tokens of KV cache, {side.name} has {has}"
        return ""

    def _sides(self, names: tuple[str, str], served: bool) -> list[Side]:
        """The engines, up and through their gate; others are stopped, for they hold memory and cores."""
        for key in [key for key in self.up if key not in [(served, name) for name in names]]:
            self.up.pop(key).server.stop()
        for name in names:
            if (served, name) not in self.up:
                begin = time.monotonic()
                self._start(name, served)
                self.start_seconds = time.monotonic() - begin
        return [self.up[served, name] for name in names]

    def _start(self, name: str, served: bool) -> None:
        if served and self.client is None:
            self.client = ToolHost("client", self._client(), MemoryFlags(), self.folder / "client.log")
            self.client.start()
            self.client.wait()
        if name != STOCK and STOCK not in self.gates and not self.oracle.exact:
            self._stock_error(served)
        side = self._side(name, served)
        before = usage.gpu_gib()
        self.up[served, name] = side
        with self.console.status(f"starting {name}"):
            side.server.start()
            side.server.wait(lambda line: None)
        verdict = self.oracle.judge(side.greedy(self.oracle.prompts, TOKENS), self.memories[name]).as_json()
        if self.gates.get(name, {}).get("gate") != "red":  # red once is red
            self.gates[name] = verdict
        self.console.print(f"[dim]{name} is up, its gate is {verdict['gate']}. {verdict['reason']}")
        held = self.held.setdefault(name, {})
        held["kv_cache_tokens"] = side.kv_tokens
        if before is not None:
            held["gpu_gib"] = usage.gpu_gib() - before

    def _stock_error(self, served: bool) -> None:
        """In 16 bits the stock engine's error is the measure of others'."""
        self._start(STOCK, served)
        self.up.pop((served, STOCK)).server.stop()

    def _client(self) -> Launch:
        return Launch([sys.executable, "-m", "benchmarks.engines.toolhost", f"{self.args.engine}-client"], {})

    def _side(self, name: str, served: bool) -> Side:
        section, setting = self.memories[name].section, self.setting
        log = self.folder / f"{name.replace(' ', '-')}-{'served' if served else 'tools'}.log"
        if self.args.engine == "sglang":
            flags = commands.sglang_memory(section, log.with_suffix(".yaml"))
            server = Server(name, commands.sglang_server(setting), flags, choose_ports(None, 1)[0], log)
            return SglangServed(server, setting, self.folder, self.client)
        flags = commands.vllm_memory(section)
        if not served:
            return VllmTools(ToolHost(name, commands.vllm_host(setting), flags, log), setting, self.folder)
        server = Server(name, commands.vllm_server(setting), flags, choose_ports(None, 1)[0], log)
        return VllmServed(server, setting, self.folder, self.client)

    def _rag(self) -> None:
        """Recall questions with memory and with text, on the small model that has been trained for them."""
        self.stop()
        command = [sys.executable, "-m", "benchmarks.rag", "--repeats", str(self.args.repeats)]
        command += ["--save"] if self.args.save else []
        with suppress(subprocess.TimeoutExpired):
            if subprocess.run(command, cwd=ROOT, timeout=min(self.deadline.left, 3600)).returncode == 0:
                return
        self.missing.append("rag: it did not end well, or not in time")

    def stop(self) -> None:
        """All processes that were started are down."""
        with deaf():
            servers = [side.server for side in self.up.values()] + ([self.client] if self.client else [])
            self.up, self.client = {}, None
            for server in servers:
                server.ask_to_stop()
            for server in servers:
                server.stop()

    def keep(self) -> Path | None:
        """Write what there is, if it is to be kept: a command that is killed leaves what it measured before."""
        if not (self.args.save and self.rows):
            return None
        path = save(self.report(), f"engines-{self.args.engine}", RESULTS)
        report.save_csv(self.report(), path.with_suffix(".csv"))
        return path

    def report(self) -> dict[str, Any]:
        return self.head | {
            "engine": self.args.engine,
            "model": self.made.facts,
            "dtype": self.args.dtype,
            "pool_tokens": self.args.pool_tokens,
            "commands": self.commands,
            "measured_machine": asdict(self.machine),
            "gates": self.gates,
            "memory_held": self.held,
            "rows": self.rows,
            "missing": self.missing,
            "weights_sha256": self.weights,
        }


def main(argv: list[str] | None = None) -> None:
    """Entry point of ``python -m benchmarks.engines``."""
    args = parse(argv)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 150)
    end_by_interrupt()
    with tempfile.TemporaryDirectory(prefix="mem_triton-engines-") as temporary:
        folder = Path(temporary)
        if args.keep:
            args.keep.mkdir(parents=True, exist_ok=True)
            folder = Path(tempfile.mkdtemp(prefix="run-", dir=args.keep))
        course = failure = None
        try:
            require(args.engine)
            course = Course(args, folder, console)
            course.run()
        except (BenchmarkError, KeyboardInterrupt) as error:  # what was measured until then is kept
            failure = str(error) or "interrupted"
        finally:
            if course is not None:
                course.stop()
    if course is not None:
        course.missing += [failure] if failure else []
        report.show(console, course.report())
        if path := course.keep():
            console.print(f"kept in {path} and the .csv beside it")
    elif failure:
        Console(stderr=True, highlight=False).print(failure, style="bold red", markup=False)
    red = course is not None and any(gate["gate"] != "green" for gate in course.gates.values())
    raise SystemExit(1 if failure or red else 0)
