"""A bank against the same text in the prompt with vLLM's prefix caching, warm: where is which one better?

    python -m benchmarks.engines.rival --save
    python -m benchmarks.engines.rival --model FOLDER --dtype bfloat16 --document-tokens 256 --save

Two servers of vLLM with the same command but memory's flags, measured in turns. A request asks about documents: to the
stock server they are sent as text before the question, to the other one as ``mem_ids``. The stock server's prefix cache
is on, and has seen every document before anything is timed.

one document      every request has the same one
combinations      three of twelve, in random order: a prefix is found only where its beginning was seen before
after a restart   both servers are started anew; the first request for each of twelve documents
many documents    more in turn than the KV cache holds, and than the bank's pool holds

The entries are random keys and values: this measures speed, not answers (``benchmarks.rag`` does). LMCache, which
offloads prefixes to the host or the disk, is not measured: version 0.5.6 needs cupy for CUDA 13, and its operators are
CUDA's.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import random
import shutil
import statistics
import tempfile
import time
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
from benchmarks.engines.two_servers import NAME, VOCAB, Client, ratios, told, two_servers

FEW, MANY, HELD = 12, 48, 16  # documents: of most parts, of the last part, and that a KV cache or a pool holds
TOGETHER = 3  # documents of a request in "combinations"
QUESTION, ANSWER, AT_ONCE = 16, 24, 4
BLOCK = 32  # tokens of a KV block, of which a CPU takes multiples of 32
PARTS = ("one document", "combinations", "after a restart", "many documents")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m benchmarks.engines.rival", description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("--model", type=Path, default=Path("benchmarks/recall/model"), help="folder")
    add("--dtype", default="float32")
    add("--document-tokens", type=int, default=512, help="of each document; three of them and a question fit 2,048")
    add("--requests", type=int, default=16, help="of each part in a round")
    add("--rounds", type=int, default=3)
    add("--save", action="store_true", help="keep the figures under benchmarks/results")
    return parser.parse_args(argv)


def make_bank(args: argparse.Namespace, path: Path) -> dict[str, float]:
    """A bank of MANY random documents; the pool's GiB, and bytes of one document in the pool."""
    texts = {f"document-{i}": f"document {i}" for i in range(MANY)}
    spec = random_bank(path, args.model, texts, args.document_tokens)
    dtype = getattr(torch, args.dtype)
    document, page = (pool_bytes(spec, tokens, dtype) for tokens in (args.document_tokens, 1))
    return {"gib": (HELD * document + page) / 2**30, "document_bytes": document}


def document(number: int, tokens: int) -> list[int]:
    """A document's text; random tokens."""
    chosen = random.Random(1000 + number)
    return [chosen.randrange(4, VOCAB) for _ in range(tokens)]


class Asker:
    """Asks one server about documents, in the way that is its own."""

    def __init__(self, client: Client, tokens: int) -> None:
        self.client, self.tokens = client, tokens
        self.name = client.server.name

    async def ask(self, documents: tuple[int, ...]) -> list[float]:
        """Seconds from sending a question about the documents to each token of the answer."""
        question = [self.client.random.randrange(4, VOCAB) for _ in range(QUESTION)]
        if self.name == "bank":
            return await self.client.times(ANSWER, {"mem_ids": [f"document-{i}" for i in documents]}, question)
        text = [token for i in documents for token in document(i, self.tokens)]
        return await self.client.times(ANSWER, None, [*text, *question])

    async def part(self, asked: list[tuple[int, ...]]) -> dict[str, Any]:
        """Times to the first token, one request after the other; then output tokens a second, some at once."""
        first = [(await self.ask(documents))[0] for documents in asked]
        free, begin = asyncio.Semaphore(AT_ONCE), time.perf_counter()

        async def one(documents: tuple[int, ...]) -> int:
            async with free:
                return len(await self.ask(documents))

        tokens = sum(await asyncio.gather(*map(one, asked)))
        return {"first": first, "tokens_per_s": tokens / (time.perf_counter() - begin)}


def requests(part: str, args: argparse.Namespace, number: int) -> list[tuple[int, ...]]:
    """The documents of each request of a part, the same for both servers. number: of the round."""
    if part == "one document":
        return [(0,)] * args.requests
    if part == "combinations":
        chosen = random.Random(number)
        return [tuple(chosen.sample(range(FEW), TOGETHER)) for _ in range(args.requests)]
    if part == "after a restart":
        return [(i,) for i in range(FEW)]
    turns = itertools.cycle(range(MANY))
    return [(next(turns),) for _ in range(max(args.requests, MANY))]


async def measure(servers: list[Server], args: argparse.Namespace, parts: tuple[str, ...], console: Console) -> dict:
    """The parts in rounds, servers in turns: part -> rounds of {server: figures}."""
    found: dict[str, list[dict[str, Any]]] = {part: [] for part in parts}
    async with httpx.AsyncClient(timeout=600, limits=httpx.Limits(max_keepalive_connections=0)) as http:
        askers = [Asker(Client(server, http, 7), args.document_tokens) for server in servers]
        fresh = parts == ("after a restart",)
        for asker in askers:
            await asker.client.times(ANSWER, None)  # what is compiled or opened at first use
            for i in () if fresh else range(FEW):
                await asker.ask((i,))
        for number in range(1 if fresh else args.rounds):
            for part in parts:
                asked, figures = requests(part, args, number), {}
                for asker in askers[:: 1 if number % 2 == 0 else -1]:
                    console.print(f"[dim]round {number + 1}: {part}, {asker.name}")
                    figures[asker.name] = await asker.part(asked)
                    await asyncio.sleep(REST)
                found[part].append(figures)
    return found


def row(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """What is said of a part: below 1, the bank's first token comes sooner; above 1, it gives more tokens a second."""
    first = [{name: {"first": figures["first"]} for name, figures in r.items()} for r in rounds]
    speeds = [r["bank"]["tokens_per_s"] / r["stock"]["tokens_per_s"] for r in rounds]
    return {
        "stock": told([v for r in rounds for v in r["stock"]["first"]]),
        "bank": told([v for r in rounds for v in r["bank"]["first"]]),
        "time_to_first_token_ratio": ratios(first, ("bank", "first"), ("stock", "first")),
        "tokens_per_s": {
            name: round(statistics.median(r[name]["tokens_per_s"] for r in rounds), 1) for name in first[0]
        },
        "tokens_per_s_ratio": {"median": round(statistics.median(speeds), 3), "rounds": [round(s, 3) for s in speeds]},
    }


def main(argv: list[str] | None = None) -> int:
    args, console = parse(argv), Console(highlight=False)
    head = record.about(
        "a bank against the same text in the prompt with warm prefix caching", "python -m benchmarks.engines.rival"
    )
    folder = Path(tempfile.mkdtemp(prefix="mem_triton-rival-"))
    try:
        made = make_bank(args, folder / "bank")
        section = {"memory": {"bank": str(folder / "bank"), "pool_gib": made["gib"]}}
        launch = ENGINES["vllm"].launch(args.model, NAME, args.dtype, 8)
        longest = TOGETHER * args.document_tokens + QUESTION + ANSWER
        blocks = HELD * -(-args.document_tokens // BLOCK) + AT_ONCE * -(-longest // BLOCK)
        launch.command.extend(["--block-size", str(BLOCK), "--num-gpu-blocks-override", str(blocks)])
        with two_servers(launch, section, folder, console) as servers:
            usual = tuple(part for part in PARTS if part != "after a restart")
            found = asyncio.run(measure(servers, args, usual, console))
            commands = [server.shown_command for server in servers]
        found["after a restart"] = []
        for _ in range(max(1, args.rounds - 1)):
            with two_servers(launch, section, folder, console) as servers:
                again = asyncio.run(measure(servers, args, ("after a restart",), console))
            found["after a restart"] += again["after a restart"]
    except BenchmarkError as error:
        console.print(f"[bold red]It cannot go on.[/] {error}")
        return 1
    rows = {part: row(found[part]) for part in PARTS}
    console.print_json(json.dumps(rows))
    if args.save:
        facts = {
            "model": str(args.model),
            "document_tokens": args.document_tokens,
            "documents": [FEW, MANY],
            "held": {
                "kv_blocks": blocks,
                "kv_tokens": BLOCK * blocks,
                "pool_bytes": HELD * made["document_bytes"],
                "document_bytes": made["document_bytes"],
                "bank_bytes": sum(f.stat().st_size for f in (folder / "bank").rglob("*") if f.is_file()),
            },
            "lmcache": "not measured: 0.5.6 needs cupy-cuda13x",
        }
        report = {**head, **facts, "commands": commands, "weights": record.digests(args.model), "rows": rows}
        console.print(f"kept in {record.save(report, 'rival')}")
    shutil.rmtree(folder, ignore_errors=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
