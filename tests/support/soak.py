"""Random requests from many clients, some of whom leave at any moment, against one real server: what must hold after.

It finds wrong answers, answers of HTTP 500, pages and sessions that stay taken, memory and metrics that grow. Every
run is a seed, which a failure prints.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import httpx
import psutil

from tests.support.bench import Bench
from tests.support.memory_bench import MemoryBench
from tests.support.memory_scenarios import PROMPTS, answer
from tests.support.server import ServerProcess

SECONDS = float(os.environ.get("MEM_TRITON_SOAK_SECONDS", "600"))
SEED = int(os.environ.get("MEM_TRITON_SOAK_SEED", str(int(time.time()))))
PATIENCE = float(os.environ.get("MEM_TRITON_SOAK_PATIENCE", "60"))
"""Seconds until an answer counts as one that never comes; beam search on a busy machine may take long."""
CLIENTS = 12
MOST_GROWTH = 250 << 20
"""Bytes that a server may grow by: caches fill, nothing else."""
MOST_METRICS = 400_000
"""Characters of ``/metrics``."""

_STRANGE = [
    None,
    True,
    False,
    0,
    1,
    -1,
    2,
    3.5,
    1e308,
    -0.0,
    10**30,
    "",
    " ",
    "a b",
    "alpha",
    "alpha@1",
    "alpha@99",
    "acme-plan",
    "../../etc/passwd",
    "x" * 300,
    "y" * 50_000,
    "\u0000",
    "é",
    "日本語",
    "🙂" * 40,
    "\u202e",
    [],
    {},
    [[]],
    {"a": 1},
    ["alpha"],
    ["alpha", "alpha@1"],
    ["nobody"],
    ["beta", 3],
    [None],
    ["alpha"] * 300,
    {"mem_ids": ["alpha"]},
]
_MEMORY_FIELDS = [
    "mem_session",
    "mem_write",
    "mem_read",
    "mem_reset",
    "mem_ids",
    "mem_top_k",
    "mem_query",
    "mem_capture",
    "mem_capture_answer",
    "mem_replace",
    "mem_tenant",
    "mem_bogus",
    "mem_triton",
    "other",
]
_SENSIBLE: dict[str, list[Any]] = {
    "mem_session": ["ann", "bob", "cyd"],
    "mem_write": [0, 1],
    "mem_read": [0, 1],
    "mem_reset": [0, 1],
    "mem_ids": [["alpha"], ["beta"], ["gamma", "beta"], ["delta"], []],
    "mem_top_k": [0, 1, 3, 64],
    "mem_query": ["alpha", "what is it?"],
    "mem_capture": ["note", "other"],
    "mem_capture_answer": [0, 1],
    "mem_replace": [0, 1],
    "mem_tenant": ["acme", "rival"],
}
_FIELDS: dict[str, list[Any]] = {
    "n": [1, 2, 3],
    "stop": ["a", ["b", "c"]],
    "logprobs": [1, 3],
    "temperature": [0, 1],
    "top_p": [0.5],
    "presence_penalty": [0.5],
    "min_tokens": [3],
    "ignore_eos": [True],
    "echo": [True],
    "best_of": [1],
    "mem_ids": [["alpha"]],
    "use_beam_search": [True],
    "stream_options": [{"include_usage": True}],
}


def right_answers(m: MemoryBench, bench: Bench) -> list[tuple[list[int], dict[str, Any], list[int]]]:
    """What requests of a server with δ-mem and a bank of whole texts must say, whoever else asks."""
    short, middle, *_ = PROMPTS
    return [
        (short, {"mem_ids": ["alpha"], "mem_top_k": 0}, answer(bench, m, short, "alpha")),
        (middle, {"mem_top_k": 0}, answer(bench, m, middle)),
    ]


@dataclass
class Soak:
    """One run. right: prompts and fields with the tokens that they must give all the while.

    answers: how the requests ended. faults: what must not be, with the request that did it.
    """

    server: ServerProcess
    right: list[tuple[list[int], dict[str, Any], list[int]]]
    seed: int = SEED
    answers: Counter = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    def run(self, seconds: float = SECONDS) -> None:
        """Attack the server for so long, then check what is left. Raises AssertionError with seed and faults."""
        asyncio.run(self._attack(seconds / 3))  # what an engine keeps once it is warm
        before = self._bytes()
        asyncio.run(self._attack(seconds * 2 / 3))
        self._check_rest()
        grown = self._bytes() - before
        if grown > MOST_GROWTH:
            self.faults.append(f"the server grew by {grown >> 20} MiB")
        print(f"soak: seed {self.seed}, {dict(self.answers)}, {grown >> 20} MiB more")
        assert not self.faults, f"MEM_TRITON_SOAK_SEED={self.seed}\n" + "\n".join(self.faults[:20])
        assert self.answers["200"] > 10 and self.answers["400"] > 10 and self.answers["left"] > 10

    async def _attack(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        clients = [self._client(random.Random(f"{self.seed} {i}"), until) for i in range(CLIENTS)]
        await asyncio.gather(*clients, self._control(until))

    def _connect(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url=self.server.http.base_url, timeout=PATIENCE, verify=False)

    async def _client(self, rng: random.Random, until: float) -> None:
        """One client with connections of its own, which are closed when it leaves: httpx may forget to."""
        http = self._connect()
        while time.monotonic() < until and len(self.faults) < 20:
            path, body = self._request(rng)
            patience = rng.choice([0.0, 0.005, 0.02, 0.1, 0.3]) if rng.random() < 0.4 else PATIENCE
            try:
                await asyncio.wait_for(self._ask(http, path, body), patience)
            except TimeoutError:
                self.answers["left"] += 1
                if patience == PATIENCE:
                    self._fault(f"no answer in {PATIENCE:.0f} s", path, body)
                await http.aclose()
                http = self._connect()
            except httpx.HTTPError as error:
                self._fault(repr(error), path, body)
        await http.aclose()

    async def _ask(self, http: httpx.AsyncClient, path: str, body: dict[str, Any]) -> None:
        content = json.dumps(body)
        async with http.stream("POST", path, content=content, headers={"Content-Type": "application/json"}) as said:
            lines = [line async for line in said.aiter_lines()]
        self.answers[str(said.status_code)] += 1
        text = "\n".join(lines)
        if said.status_code >= 500 or '"code":500' in text.replace(" ", "") or "Internal Server" in text:
            self._fault(f"HTTP {said.status_code}: {text[:400]}", path, body)
        if len(text) > 20_000 and said.status_code >= 400:
            self._fault(f"a message of {len(text)} characters", path, body)

    async def _control(self, until: float) -> None:
        """Right answers all the while."""
        async with self._connect() as http:
            while time.monotonic() < until and len(self.faults) < 20:
                for prompt, fields, tokens in self.right:
                    body = {"model": "m", "prompt": prompt, "max_tokens": 12, "temperature": 0, "ignore_eos": True}
                    body |= {"return_token_ids": True, self.server.fields_in: fields}
                    try:
                        said = await http.post("/v1/completions", json=body)
                        given = said.json()["choices"][0].get("token_ids") if said.status_code == 200 else said.text
                    except httpx.HTTPError as error:
                        given = repr(error)
                    if given != tokens:
                        self._fault(f"{given} instead of {tokens}", "control", body)
                    self.answers["right"] += given == tokens
                await asyncio.sleep(0.5)

    def _request(self, rng: random.Random) -> tuple[str, dict[str, Any]]:
        asked = {}
        for name in rng.sample(_MEMORY_FIELDS, rng.choice([0, 1, 1, 2, 3])):
            sensible = rng.random() < 0.7 and name in _SENSIBLE
            asked[name] = rng.choice(_SENSIBLE[name] if sensible else _STRANGE)
        fields = {name: rng.choice(_FIELDS[name]) for name in rng.sample(sorted(_FIELDS), rng.choice([0, 0, 1, 2]))}
        text = "".join(
            rng.choice(["ask ", "日本", "🙂", "\n", "é", "x" * 9, " the "]) for _ in range(rng.randint(1, 60))
        )
        body = {"model": "m", "max_tokens": rng.randint(1, 40), "stream": rng.random() < 0.5, **fields}
        if asked or rng.random() < 0.1:
            body[self.server.fields_in] = asked
        if rng.random() < 0.4:
            return "/v1/chat/completions", {**body, "messages": [{"role": "user", "content": text}]}
        prompt = rng.choice([text, PROMPTS[rng.randrange(4)], [PROMPTS[0], PROMPTS[1]], "", [5] * rng.randint(1, 900)])
        return "/v1/completions", {**body, "prompt": prompt}

    def _fault(self, what: str, path: str, body: dict[str, Any]) -> None:
        self.faults.append(f"{what}\n    {path} {json.dumps(body)[:600]}")

    def _check_rest(self) -> None:
        """Nothing of anybody's is left."""
        if self.server.process.poll() is not None:
            self.faults.append(f"the server has ended: {self.server.printed()[-3000:]}")
            return
        server, until = self.server, time.monotonic() + 60
        gauges = ("mem_triton:pool_pinned_pages", "mem_triton:pool_waiting_requests")
        while (left := {g: server.metric(g) for g in gauges if server.metric(g)}) and time.monotonic() < until:
            time.sleep(0.5)
        if left:
            self.faults.append(f"left behind: {left}")
        if incidents := server.metric("mem_triton:incidents_total"):
            self.faults.append(f"{incidents:.0f} requests lost their memory in a worker; see {server.log}")
        if (length := len(server.http.get("/metrics").text)) > MOST_METRICS:
            self.faults.append(f"/metrics has {length} characters")
        for name in _SENSIBLE["mem_session"]:
            answer = server.complete(PROMPTS[0], 2, {"mem_session": name, "mem_top_k": 0})
            if answer.status_code != 200:
                self.faults.append(f"session {name}: {answer.text[:300]}")

    def _bytes(self) -> int:
        total = 0
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(self.server.process.pid)
            for one in [process, *process.children(recursive=True)]:
                total += one.memory_info().rss
        return total
