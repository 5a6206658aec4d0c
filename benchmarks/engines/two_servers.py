"""Two servers of vLLM with the same command but memory's flags, what is asked of both, and how it is told."""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import time
from collections.abc import AsyncIterator, Coroutine, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console

from benchmarks.common.engines import ENGINES
from benchmarks.common.running import running
from benchmarks.common.server import BenchmarkError, Launch, Server, choose_ports

NAME = "served"
VOCAB = 500  # token ids of prompts


@contextmanager
def two_servers(launch: Launch, section: dict[str, Any], folder: Path, console: Console) -> Iterator[list[Server]]:
    """Both servers, "stock" and "bank", up. section: the bank's configuration; folder: of logs."""
    engine, ports = ENGINES["vllm"], choose_ports(None, 2)
    servers = [
        Server(name, launch, engine.memory(s, folder / f"{name}.yaml"), port, folder / f"{name}.log")
        for (name, s), port in zip({"stock": None, "bank": section}.items(), ports, strict=True)
    ]
    with running(servers, console):
        yield servers


@asynccontextmanager
async def going_on(requests: Iterable[Coroutine[Any, Any, None]]) -> AsyncIterator[None]:
    """These run at once until the block ends, which cancels them."""
    tasks = [asyncio.create_task(one) for one in requests]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class Client:
    """Streamed completions of random prompts to one server."""

    def __init__(self, server: Server, http: httpx.AsyncClient, seed: int) -> None:
        self.server, self.http, self.random = server, http, random.Random(seed)

    async def times(self, tokens: int, fields: dict[str, Any] | None, prompt: list[int] | None = None) -> list[float]:
        """Seconds from sending a request to each of its tokens; several may come in one event.

        prompt: 64 random tokens by default.
        """
        body = self._body(tokens, fields, prompt)
        body |= {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
        begin, seen = time.perf_counter(), []
        async with self.http.stream("POST", f"{self.server.url}/v1/completions", json=body) as response:
            if response.status_code != 200:
                raise BenchmarkError(f"HTTP {response.status_code}: {(await response.aread()).decode()[:500]}")
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    event = json.loads(line[6:])
                    if "error" in event:
                        raise BenchmarkError(str(event["error"]))
                    count = (event.get("usage") or {}).get("completion_tokens", len(seen) + 1)
                    seen += [time.perf_counter() - begin] * (count - len(seen))
        return seen

    async def answer(self, tokens: int, fields: dict[str, Any] | None) -> None:
        """One request whose answer comes as a whole: a stream would keep the client and the front end busy, too."""
        response = await self.http.post(f"{self.server.url}/v1/completions", json=self._body(tokens, fields, None))
        if response.status_code != 200:
            raise BenchmarkError(f"HTTP {response.status_code}: {response.text[:500]}")

    def _body(self, tokens: int, fields: dict[str, Any] | None, prompt: list[int] | None) -> dict[str, Any]:
        prompt = prompt or [self.random.randrange(4, VOCAB) for _ in range(64)]
        body = {"model": NAME, "prompt": prompt, "max_tokens": tokens, "ignore_eos": True, "temperature": 0}
        return body | ({"vllm_xargs": fields} if fields else {})


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def told(values: list[float]) -> dict[str, float]:
    return {
        "n": len(values),
        "p50_ms": round(1000 * statistics.median(values), 2),
        "p99_ms": round(1000 * percentile(values, 0.99), 2),
    }


def ratios(rounds: list[dict[str, dict[str, list[float]]]], of: tuple[str, str], to: tuple[str, str]) -> dict:
    """Ratios by round, of medians and of 99th percentiles: the median of each. of, to: (server, kind)."""
    all_rounds = [(r[of[0]][of[1]], r[to[0]][to[1]]) for r in rounds]
    medians = [round(statistics.median(a) / statistics.median(b), 3) for a, b in all_rounds]
    tails = [round(percentile(a, 0.99) / percentile(b, 0.99), 3) for a, b in all_rounds]
    return {"p50": statistics.median(medians), "p99": statistics.median(tails), "p50_of_rounds": medians}
