"""What a request waits for on a busy server: its first token with references, and its next one around a refresh.

    python -m benchmarks.engines.waiting --save
    python -m benchmarks.engines.waiting --model FOLDER --dtype bfloat16 --save

Two servers of vLLM with the same command but memory's flags: stock, and one with a bank of random entries. ``others``
plain requests decode all the time on the one that is measured, and the servers are measured in turns. Time to the first
token: of a request without memory, with 5 references that are in the pool, and with 5 that have to come from the disk.
Inter-token latency: of an answer whose references are refreshed every 64 tokens, in the 8 tokens around each refresh
and in 8 tokens elsewhere; once with room in the batch, once with more requests than the batch has places. What is said
is the ratio to the stock server's in the same round.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import torch
from rich.console import Console

from benchmarks.common import record
from benchmarks.common.engines import ENGINES
from benchmarks.common.random_bank import pool_bytes, random_bank
from benchmarks.common.running import REST
from benchmarks.common.server import BenchmarkError, Server
from benchmarks.engines.two_servers import NAME, VOCAB, Client, going_on, ratios, told, two_servers

REFERENCES = 5  # of a request
ENTRIES = 120
ENTRY_TOKENS = 64
EVERY = 64  # tokens between two refreshes
ANSWER = 4 * EVERY
WINDOW = 8  # tokens: a busy front end hands on several at once, so single gaps say little
PLACES = 24  # requests in a batch


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m benchmarks.engines.waiting", description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("--model", type=Path, default=Path("benchmarks/recall/model"), help="folder")
    add("--dtype", default="float32")
    add("--others", type=int, default=16, help="requests that decode meanwhile")
    add("--probes", type=int, default=12, help="requests of each kind in a round")
    add("--rounds", type=int, default=3)
    add("--save", action="store_true", help="keep the figures under benchmarks/results")
    return parser.parse_args(argv)


def make_bank(model: Path, path: Path) -> float:
    """A bank of ENTRIES random entries; GiB of a pool that holds three requests' references."""
    texts = {f"entry-{i}": " ".join(f"w{random.Random(i).randrange(VOCAB)}" for _ in range(20)) for i in range(ENTRIES)}
    spec = random_bank(path, model, texts, ENTRY_TOKENS)
    return 3 * REFERENCES * pool_bytes(spec, ENTRY_TOKENS, torch.float32) / 2**30


@asynccontextmanager
async def busy(client: Client, others: int, tokens: int, fields: dict[str, Any] | None) -> AsyncIterator[None]:
    """``others`` requests decode all the time, each followed by the next one."""
    begun = [asyncio.Event() for _ in range(others)]

    async def go_on(i: int) -> None:
        first = client.random.randrange(1, tokens) if others <= PLACES else tokens  # so that they do not end together
        while True:
            task = asyncio.create_task(client.answer(first, fields))
            await asyncio.sleep(0.05)
            begun[i].set()
            await task
            first = tokens

    async with going_on(go_on(i) for i in range(others)):
        await asyncio.gather(*(event.wait() for event in begun))
        await asyncio.sleep(1.0)
        yield


async def first_tokens(client: Client, kinds: dict[str, Callable[[int], Any]], args: argparse.Namespace) -> dict:
    """Seconds to the first token by kind, each kind in turn."""
    found: dict[str, list[float]] = {kind: [] for kind in kinds}
    async with busy(client, args.others, ANSWER, plain(client)):
        for i in range(args.probes):
            for kind, fields in kinds.items():
                found[kind].append((await client.times(4, fields(i)))[0])
    return found


async def next_tokens(client: Client, fields: dict[str, Any] | None, args: argparse.Namespace, others: int) -> dict:
    """Seconds a token in windows of WINDOW tokens: around the places of refreshes, and elsewhere."""
    at, within = [], []
    tokens = ANSWER if others <= PLACES else 32  # short answers: newcomers are always waiting
    async with busy(client, others, tokens, plain(client)):
        for _ in range(max(2, args.probes // 4)):
            times = await client.times(ANSWER, fields)
            for middle in range(WINDOW, ANSWER - WINDOW, WINDOW):
                took = times[middle + WINDOW // 2 - 1] - times[middle - WINDOW // 2 - 1]
                (within if middle % EVERY else at).append(took / WINDOW)
    return {"at": at, "within": within}


def plain(client: Client) -> dict[str, Any] | None:
    """Fields of a request that reads nothing."""
    return None if client.server.name == "stock" else {"mem_top_k": 0}


async def measure(servers: list[Server], args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Everything, in rounds; servers in turns."""
    rounds: dict[str, list[dict[str, Any]]] = {"first": [], "next": [], "saturated": []}
    warm = {"mem_ids": [f"entry-{i}" for i in range(REFERENCES)]}
    cold = iter(range(REFERENCES, 10**9))

    def next_cold(_: int) -> dict[str, Any]:
        ids = [REFERENCES + next(cold) % (ENTRIES - REFERENCES) for _ in range(REFERENCES)]
        return {"mem_ids": [f"entry-{i}" for i in ids]}

    kinds = {
        "stock": {"none": lambda i: None},
        "bank": {"none": lambda i: {"mem_top_k": 0}, "warm": lambda i: warm, "cold": next_cold},
    }
    refreshed = {"stock": None, "bank": {"mem_top_k": REFERENCES}}
    limits = httpx.Limits(max_connections=200, max_keepalive_connections=0)
    async with httpx.AsyncClient(timeout=300, limits=limits) as http:
        clients = [Client(server, http, 7) for server in servers]
        for client in clients:  # nothing is compiled or opened for the first time later
            name = client.server.name
            for fields in [plain(client), refreshed[name], *(kind(0) for kind in kinds[name].values())]:
                await client.times(EVERY + 4, fields)
        for number in range(args.rounds):
            for what in rounds:
                found = {}
                for client in clients[:: 1 if number % 2 == 0 else -1]:
                    name = client.server.name
                    console.print(f"[dim]round {number + 1}: {what}, {name}")
                    if what == "first":
                        found[name] = await first_tokens(client, kinds[name], args)
                    else:
                        others = args.others if what == "next" else 2 * PLACES
                        found[name] = await next_tokens(client, refreshed[name], args, others)
                    await asyncio.sleep(REST)
                rounds[what].append(found)
    return rounds


def summary(rounds: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """What the result file says."""
    rows: dict[str, Any] = {"time_to_first_token": {}, "inter_token_latency": {}}
    for server, kind in (("stock", "none"), ("bank", "none"), ("bank", "warm"), ("bank", "cold")):
        values = [v for r in rounds["first"] for v in r[server][kind]]
        to_stock = ratios(rounds["first"], (server, kind), ("stock", "none"))
        rows["time_to_first_token"][f"{server}, {kind}"] = {**told(values), "to_stock": to_stock}
    for what in ("next", "saturated"):
        part = rows["inter_token_latency"][what] = {}
        for server, kind in (("stock", "within"), ("bank", "within"), ("bank", "at")):
            values = [v for r in rounds[what] for v in r[server][kind]]
            to_stock = ratios(rounds[what], (server, kind), ("stock", "within"))
            part[f"{server}, {kind}"] = {**told(values), "to_stock": to_stock}
    return rows


def main(argv: list[str] | None = None) -> int:
    args, console = parse(argv), Console(highlight=False)
    head = record.about("what a request waits for on a busy server", "python -m benchmarks.engines.waiting")
    folder = Path(tempfile.mkdtemp(prefix="mem_triton-waiting-"))
    try:
        gib = make_bank(args.model, folder / "bank")
        retrieval = {"top_k": REFERENCES, "every": EVERY}
        section = {"memory": {"bank": str(folder / "bank"), "pool_gib": gib, "retrieval": retrieval}}
        launch = ENGINES["vllm"].launch(args.model, NAME, args.dtype, PLACES)
        with two_servers(launch, section, folder, console) as servers:
            rounds = asyncio.run(measure(servers, args, console))
    except BenchmarkError as error:
        console.print(f"[bold red]It cannot go on.[/] {error}")
        return 1
    rows = summary(rounds)
    console.print_json(json.dumps(rows))
    if args.save:
        told_of = {
            "model": str(args.model),
            "others": args.others,
            "places": PLACES,
            "references": REFERENCES,
            "entry_tokens": ENTRY_TOKENS,
            "every": EVERY,
        }
        commands = [server.shown_command for server in servers]
        report = {**head, **told_of, "commands": commands, "weights": record.digests(args.model), "rows": rows}
        console.print(f"kept in {record.save(report, 'waiting')}")
    shutil.rmtree(folder, ignore_errors=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
