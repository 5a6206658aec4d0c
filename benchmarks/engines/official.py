"""MemoryLLM's pools on vLLM against the code of its authors, on one model whose pool is 25 times as long as a prompt.

    python -m benchmarks.engines.official OFFICIAL TRANSFORMERS --save

OFFICIAL: a checkout of wangyu-ustc/MemoryLLM at 5acaf52; TRANSFORMERS: a folder with transformers 4.48.2, which it
needs. Both run here, on the same random weights and the same pool, in fp32, and are measured in turns: the prefill of
``--context`` tokens by one request, decode steps of several batches, keys and values that 16 requests hold, and the
time of a write. vLLM is measured by its own ``vllm bench latency``; a write by a server over HTTP, from the request to
the answer, when the version is on the disk and the next one can be read. Before that both must answer alike, and a
write of both must give the same rows, or there are no figures.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from benchmarks.common import record
from benchmarks.common.running import REST, end_by_interrupt
from benchmarks.common.server import BenchmarkError, Launch, MemoryFlags, Server, choose_ports
from benchmarks.engines import commands, made_up, memories
from benchmarks.engines.commands import Cell, Setting
from benchmarks.engines.gate import EXACT, LENGTHS, TOKENS
from benchmarks.engines.pairs import order, ratio
from benchmarks.engines.sides import ToolHost, VllmTools
from mem_triton.systems.memoryllm.convert import load_weights
from mem_triton.systems.memoryllm.pools import Pools

ROWS = 1e-5
"""Largest difference of rows after a write, as a part of their largest number."""
SHORT, OUTPUT = 32, 9
"""Prompt and answer of requests whose decode steps are measured."""
HOLD = 16
"""Requests whose keys and values are counted."""


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m benchmarks.engines.official", description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("official", type=Path, help="checkout of wangyu-ustc/MemoryLLM")
    add("transformers", type=Path, help="folder with transformers 4.48.2")
    add("--model", default="llama-pool", help=f"a random model: {', '.join(made_up.SHAPES)}")
    add("--context", type=int, default=512, help="tokens of a prompt and of a text that is written")
    add("--pool", type=int, default=25, help="rows of the pool for each token of the prompt")
    add("--batches", nargs="+", type=int, default=[1, 16, 64], help="of decode steps")
    add("--pairs", type=int, default=5)
    add("--save", action="store_true", help="keep the figures under benchmarks/results")
    return parser.parse_args(argv)


class Course:
    """Both sides, up. engine: vLLM in a process of its own; server: vLLM's server, which writes."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.args, self.folder = args, folder
        self.rows = args.pool * args.context
        self.made = made_up.make_model(args.model, folder, torch.float32)
        self.memory = memories.make_memory("memoryllm", self.made, folder / "read", self.rows)
        longest, most = max(256, args.context + OUTPUT + 16), max(args.batches)
        kv = most * longest * memories.kv_bytes_per_token(self.made)
        self.setting = Setting(
            self.made.folder, "float32", longest, most, gpu=False, kv_gib=-(-kv // 2**30), eager=True
        )
        flags = commands.vllm_memory(self.memory.section)
        host = ToolHost("memoryllm", commands.vllm_host(self.setting), flags, folder / "engine.log")
        self.engine = VllmTools(host, self.setting, folder)
        written = memories.make_memory("memoryllm", self.made, folder / "written", self.rows)
        flags = commands.vllm_memory(written.section)
        launch = commands.vllm_server(self.setting)
        self.store = written.pools
        self.server = Server("writer", launch, flags, choose_ports(None, 1)[0], folder / "server.log")
        self.authors = ToolHost("authors", self._authors(), MemoryFlags([], self._path()), folder / "authors.log")

    def _path(self) -> dict[str, str]:
        return {"PYTHONPATH": f"{self.args.official.resolve()}:{self.args.transformers.resolve()}"}

    def _authors(self) -> Launch:
        with Pools.open(self.memory.pools) as pools:
            tensors = load_weights(pools.path) | {"memory": pools.rows("main")}
            shape = pools.shape
        save_file({name: x.contiguous() for name, x in tensors.items()}, self.folder / "pool.safetensors")
        config = self.made.model.config.to_dict() | {
            "num_blocks": shape.rows // shape.tokens,
            "num_tokens": shape.tokens,
            "num_memory_tokens": shape.rows,
            "add_bos_embedding": True,
            "drop_memory_per_layer": False,
            "add_decoder_lora": False,
            "lora_config": None,
            "rope_theta": made_up.SHAPES[self.args.model]["rope_theta"],
            "rope_scaling": None,
        }
        names = ("rope_parameters", "dtype", "architectures", "model_type", "transformers_version")
        given = {
            "config": {name: value for name, value in config.items() if name not in names},
            "weights": str(self.made.folder / "model.safetensors"),
            "pool": str(self.folder / "pool.safetensors"),
        }
        return Launch([sys.executable, str(Path(__file__).with_name("authors.py")), json.dumps(given)], {})

    def start(self) -> None:
        for one in (self.engine.server, self.server, self.authors):
            one.start()
        for one in (self.engine.server, self.server, self.authors):
            one.wait(lambda line: None)

    def stop(self) -> None:
        for one in (self.engine.server, self.server, self.authors):
            one.ask_to_stop()
        for one in (self.engine.server, self.server, self.authors):
            one.stop()

    def check(self) -> dict[str, Any]:
        """Raise BenchmarkError unless both sides answer alike, and a write gives the same rows."""
        prompts = [made_up.random_ids(count, self.vocab, count) for count in LENGTHS]
        theirs, ours = (
            self.authors.ask(do="greedy", prompts=prompts, tokens=TOKENS),
            self.engine.greedy(prompts, TOKENS),
        )
        error = max(
            abs(x - y)
            for a, b in zip(theirs, ours, strict=True)
            for x, y in zip(a["logprobs"], b.logprobs, strict=True)
        )
        if [a["tokens"] for a in theirs] != [b.tokens for b in ours] or not error < EXACT:
            raise BenchmarkError(f"WRONG: the two sides answer otherwise, log-probabilities by {error:.2g}; no figures")
        text, file = made_up.random_ids(self.args.context, self.vocab, 1), self.folder / "after.safetensors"
        self.authors.ask(do="inject", ids=text, seed=7, rows=str(file))
        self.write(text, 7)
        with Pools.open(self.store) as pools:
            rows = pools.rows("main@2")
        wanted = load_file(file)["memory"]
        off = float((rows - wanted).abs().max() / wanted.abs().max())
        if not off < ROWS:
            raise BenchmarkError(f"WRONG: after a write rows differ by {off:.2g} of the largest; no figures")
        return {"gate": "green", "tokens": TOKENS * len(prompts), "logprobs": error, "rows": off}

    @property
    def vocab(self) -> int:
        return self.made.model.config.vocab_size

    def write(self, text: list[int], seed: int) -> float:
        """Seconds from the request to its answer."""
        body = {"model": commands.NAME, "prompt": text, "max_tokens": 1}
        body["vllm_xargs"] = {"mem_inject": "main", "mem_seed": seed}
        begin = time.perf_counter()
        response = httpx.post(f"{self.server.url}/v1/completions", json=body, timeout=300)
        if response.status_code != 200:
            raise BenchmarkError(f"the write was refused (HTTP {response.status_code}): {response.text[:500]}")
        return time.perf_counter() - begin

    def pairs(self) -> dict[str, Any]:
        """Every figure, baseline: the authors' code, memory: ours."""
        args, found = self.args, {}
        found["prefill"] = self._timed(Cell(1, args.context, 1), "prefill")
        for batch in args.batches:
            found[f"decode at {batch}"] = self._timed(Cell(batch, SHORT, OUTPUT), "step")
        texts = [made_up.random_ids(args.context, self.vocab, 10 + i) for i in range(args.pairs)]
        sides = {
            "baseline": lambda i: self.authors.ask(do="inject", ids=texts[i], seed=i),
            "memory": lambda i: self.write(texts[i], i),
        }
        found["write"] = _in_turns(sides, args.pairs)
        return found

    def _timed(self, cell: Cell, what: str) -> dict[str, Any]:
        ours: dict[str, Any] = {"prefill": lambda i: self.engine._latency(cell)}
        ours["step"] = lambda i: self.engine.measure("latency", cell, i)["decode_ms"] / 1000
        theirs = {"batch": cell.batch, "context": cell.context, "output": cell.output}
        sides = {"baseline": lambda i: self.authors.ask(do="generate", seed=i, **theirs)[what], "memory": ours[what]}
        return _in_turns(sides, self.args.pairs)

    def held(self) -> dict[str, float]:
        """Bytes of keys and values for HOLD requests with a whole prompt: theirs as their cache has them, ours by the
        pages of the version and the blocks of the KV cache."""
        theirs = self.authors.ask(do="generate", batch=HOLD, context=SHORT, output=1, seed=0)["held"]
        one = memories.kv_bytes_per_token(self.made)
        version = -(-(self.rows + 1) // 64) * 64 * one
        blocks = HOLD * -(-(SHORT + 1) // 128) * 128 * one  # vLLM's blocks on a CPU have 128 tokens
        return {"authors": theirs, "ours": float(version + blocks), "share": (version + blocks) / theirs}


def _in_turns(sides: dict[str, Any], count: int) -> dict[str, Any]:
    """Seconds of both sides, pair by pair, and their ratio; the first run of each is not counted."""
    for run in sides.values():
        run(0)
    taken: dict[str, list[float]] = {"baseline": [], "memory": []}
    for pair in range(count):
        for side in order(pair):
            time.sleep(REST)
            taken[side].append(sides[side](pair))
    return {
        "authors": taken["baseline"],
        "ours": taken["memory"],
        "ratio": asdict(ratio(taken["baseline"], taken["memory"])),
    }


def main(argv: list[str] | None = None) -> int:
    args, console = parse(argv), Console(highlight=False)
    head = record.about("pools of MemoryLLM against the authors' code", "python -m benchmarks.engines.official")
    end_by_interrupt()
    with tempfile.TemporaryDirectory(prefix="mem_triton-official-") as name:
        course = Course(args, Path(name))
        try:
            course.start()
            gate = course.check()
            console.print(f"[dim]both answer alike: {json.dumps(gate)}")
            found, held = course.pairs(), course.held()
        except (BenchmarkError, KeyboardInterrupt) as error:
            console.print(f"[bold red]It cannot go on.[/] {error}", markup=True)
            return 1
        finally:
            course.stop()
    for what, row in found.items():
        times = " and ".join(f"{side} {1000 * statistics.median(row[side]):.1f} ms" for side in ("authors", "ours"))
        r = row["ratio"]
        console.print(f"{what:>14}: {times}, ours takes {r['median']:.3f} [{r['min']:.3f}, {r['max']:.3f}]")
    console.print(f"keys and values of {HOLD} requests: ours {held['share']:.4f} of theirs")
    if args.save:
        told = {"model": course.made.facts, "pool_rows": course.rows, "context": args.context, "gate": gate}
        path = record.save(head | told | {"held_bytes": held, "rows": found}, "official")
        console.print(f"kept in {path.relative_to(record.ROOT)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
