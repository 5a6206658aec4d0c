"""What others wait for while a pool of MemoryLLM is written once a second, on vLLM.

    python -m benchmarks.engines.writing --save

Two servers with the same command: one runs all layers of a write between two steps, the other one layer a step
(``layers_per_step``). On the one that is measured ``--others`` requests decode all the time, all with version 1 of the
pool, and one more is looked at: seconds between two of its tokens, without writes and while a text is written each
second, in turns. What is said is the 99th percentile with writes over the one without, of the same round. Before,
while and after the pool is written, answers that read version 1 must be those of transformers, or there are no figures.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import statistics
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import torch
from rich.console import Console

from benchmarks.common import record
from benchmarks.common.running import REST, end_by_interrupt, running
from benchmarks.common.server import BenchmarkError, Server, choose_ports
from benchmarks.engines import commands, made_up, memories
from benchmarks.engines.commands import NAME, Setting
from benchmarks.engines.two_servers import Client, going_on, percentile, told
from mem_triton_transformers import apply_mem_triton, read_pool, remove_mem_triton

ANSWER = 96
"""Tokens of the answer that is looked at."""
EVERY = 1.0
"""Seconds from the beginning of a write to that of the next one, if it is over by then."""
READ = {"mem_pool": "main@1"}
SIDES = {"all layers at once": None, "one layer a step": 1}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m benchmarks.engines.writing", description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("--model", default="llama-pool", help=f"a random model: {', '.join(made_up.SHAPES)}")
    add("--pool-tokens", type=int, default=2048, help="rows of the pool")
    add("--text", type=int, default=256, help="tokens of a text that is written")
    add("--others", type=int, default=7, help="requests that decode meanwhile")
    add("--probes", type=int, default=4, help="answers that are looked at in each part of a round")
    add("--rounds", type=int, default=3)
    add("--save", action="store_true", help="keep the figures under benchmarks/results")
    return parser.parse_args(argv)


class Writer:
    """Writes texts into a server's pool, one after the other. took: seconds of each."""

    def __init__(self, client: Client, tokens: int, vocab: int) -> None:
        self._client, self._tokens, self._vocab, self.took = client, tokens, vocab, []

    async def once(self) -> None:
        """Raises BenchmarkError if the write is refused."""
        text = made_up.random_ids(self._tokens, self._vocab, len(self.took))
        body = {"model": NAME, "prompt": text, "max_tokens": 1, "vllm_xargs": {"mem_inject": "main"}}
        begin = time.perf_counter()
        response = await self._client.http.post(f"{self._client.server.url}/v1/completions", json=body)
        if response.status_code != 200:
            raise BenchmarkError(f"a write was refused (HTTP {response.status_code}): {response.text[:500]}")
        self.took.append(time.perf_counter() - begin)

    @asynccontextmanager
    async def writing(self) -> AsyncIterator[None]:
        """A write each second while this is entered."""

        async def go_on() -> None:
            while True:
                begin = time.perf_counter()
                await self.once()
                await asyncio.sleep(max(0.0, EVERY - (time.perf_counter() - begin)))

        task = asyncio.create_task(go_on())
        try:
            yield
        finally:
            if task.done():
                task.result()
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task


async def greedy(client: Client, prompts: list[list[int]], tokens: int) -> list[list[int]]:
    """Greedy answers that read version 1."""
    found = []
    for prompt in prompts:
        body = {"model": NAME, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
        body |= {"return_token_ids": True, "vllm_xargs": READ}
        response = await client.http.post(f"{client.server.url}/v1/completions", json=body)
        if response.status_code != 200:
            raise BenchmarkError(f"HTTP {response.status_code}: {response.text[:500]}")
        found.append(response.json()["choices"][0]["token_ids"])
    return found


def right_answers(made: made_up.Made, store: Path, prompts: list[list[int]], tokens: int) -> list[list[int]]:
    """What transformers answers with version 1."""
    model = apply_mem_triton(made.model, {"memoryllm": {"pools": str(store)}})
    options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
    try:
        found = []
        for prompt in prompts:
            ids = torch.tensor([prompt])
            with torch.no_grad(), read_pool(model, ["main@1"]):
                made_of = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
            found.append(made_of[0, len(prompt) :].tolist())
        return found
    finally:
        remove_mem_triton(model)


async def gaps(client: Client, probes: int) -> list[float]:
    """Seconds between two tokens of some answers."""
    found: list[float] = []
    for _ in range(probes):
        times = await client.times(ANSWER, READ)
        found += [b - a for a, b in pairwise(times)]
    return found


@asynccontextmanager
async def decoding(client: Client, others: int) -> AsyncIterator[None]:
    """So many requests decode all the time, each followed by the next one."""

    async def go_on() -> None:
        while True:
            await client.answer(ANSWER, READ)

    async with going_on(go_on() for _ in range(others)):
        await asyncio.sleep(1.0)
        yield


async def measure(
    servers: list[Server], args: argparse.Namespace, vocab: int, right: list[list[int]], prompts: list[list[int]]
) -> tuple[dict[str, dict[str, list[list[float]]]], dict[str, list[float]]]:
    """Gaps by server and part of a round, and the seconds of writes. Raises BenchmarkError for a wrong answer."""
    found: dict[str, dict[str, list[list[float]]]] = {s.name: {"quiet": [], "written": []} for s in servers}
    limits = httpx.Limits(max_connections=200, max_keepalive_connections=0)
    async with httpx.AsyncClient(timeout=300, limits=limits) as http:
        clients = [Client(server, http, 7) for server in servers]
        writers = {client.server.name: Writer(client, args.text, vocab) for client in clients}

        async def check(client: Client, when: str) -> None:
            if await greedy(client, prompts, len(right[0])) != right:
                raise BenchmarkError(f"WRONG: {client.server.name} answers otherwise than transformers {when}")

        for client in clients:
            await check(client, "before a write")
            await writers[client.server.name].once()  # nothing runs for the first time later
            writers[client.server.name].took.clear()
        for number in range(args.rounds):
            for client in clients[:: 1 if number % 2 == 0 else -1]:
                name = client.server.name
                async with decoding(client, args.others):
                    for part in ("quiet", "written") if number % 2 == 0 else ("written", "quiet"):
                        async with writers[name].writing() if part == "written" else contextlib.nullcontext():
                            found[name][part].append(await gaps(client, args.probes))
                            if part == "written":
                                await check(client, "while its pool is written")
                await asyncio.sleep(REST)
        for client in clients:
            await check(client, "after the writes")
    return found, {name: writer.took for name, writer in writers.items()}


def summary(parts: dict[str, list[list[float]]], took: list[float]) -> dict[str, Any]:
    """What the result file says of one server."""
    tails = {part: [percentile(one, 0.99) for one in rounds] for part, rounds in parts.items()}
    ratios = [round(b / a, 3) for a, b in zip(tails["quiet"], tails["written"], strict=True)]
    told_of = {part: told([gap for one in rounds for gap in one]) for part, rounds in parts.items()}
    longest = {part: round(1000 * max(map(max, rounds)), 2) for part, rounds in parts.items()}
    return {
        **told_of,
        "longest_ms": longest,
        "p99_with_to_without": statistics.median(ratios),
        "of_rounds": ratios,
        "writes": len(took),
        "write_ms": round(1000 * statistics.median(took), 1),
    }


def main(argv: list[str] | None = None) -> int:
    args, console = parse(argv), Console(highlight=False)
    head = record.about("what others wait for while a pool is written", "python -m benchmarks.engines.writing")
    end_by_interrupt()
    with tempfile.TemporaryDirectory(prefix="mem_triton-writing-") as name:
        folder = Path(name)
        made = made_up.make_model(args.model, folder, torch.float32)
        setting = Setting(made.folder, "float32", 512, args.others + 4, gpu=False, eager=True)
        launch, servers = commands.vllm_server(setting), []
        for port, (side, layers) in zip(choose_ports(None, len(SIDES)), SIDES.items(), strict=True):
            memory = memories.make_memory("memoryllm", made, folder / side.replace(" ", "-"), args.pool_tokens)
            section = {"memoryllm": {**memory.section["memoryllm"], "layers_per_step": layers}}
            servers.append(Server(side, launch, commands.vllm_memory(section), port, folder / f"{side}.log"))
        vocab = made.model.config.vocab_size
        prompts = [made_up.random_ids(count, vocab, count) for count in (7, 33)]
        right = right_answers(made, memory.pools, prompts, 8)
        try:
            with running(servers, console):
                found, took = asyncio.run(measure(servers, args, vocab, right, prompts))
        except BenchmarkError as error:
            console.print(f"[bold red]It cannot go on.[/] {error}")
            return 1
        shown = {server.name: server.shown_command for server in servers}
    rows = {name: summary(parts, took[name]) for name, parts in found.items()}
    console.print_json(json.dumps(rows))
    if args.save:
        names = ("pool_tokens", "text", "others", "probes", "rounds")
        options = {name: getattr(args, name) for name in names}
        path = record.save(head | {"model": made.facts, **options, "commands": shown, "rows": rows}, "writing")
        console.print(f"kept in {path.relative_to(record.ROOT)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
