"""The two sides of a comparison: engines that stay up while they are measured in turns."""

from __future__ import annotations

import json
import math
import queue
import re
import statistics
import subprocess
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx

from benchmarks.common.server import BenchmarkError, Launch, MemoryFlags, Server
from benchmarks.engines import commands
from benchmarks.engines.commands import Cell, Setting
from benchmarks.engines.gate import Answer

RUN_LIMIT = 1800.0  # seconds of one run of a tool
KV_TOKENS = re.compile(r"KV cache size: ([\d,]+) tokens|max_total_num_tokens=([\d,]+)")


class ToolHost(Server):
    """A ``toolhost`` process and its answers."""

    def __init__(self, name: str, launch: Launch, memory: MemoryFlags, log: Path) -> None:
        super().__init__(name, launch, memory, 0, log)
        self.command = [*launch.command, *memory.options]
        self.answers: queue.Queue[str] = queue.Queue()

    def start(self) -> None:
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                self.command,
                env=self.environment(),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,
            )
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        for line in self.process.stdout:
            self.answers.put(line.decode())

    def wait(self, progress: Any = None) -> None:
        """Until its engine is up."""
        self._answer()

    def ask(self, **request: Any) -> Any:
        """Raises BenchmarkError with what the tool says, or if the process dies."""
        self.process.stdin.write(json.dumps(request).encode() + b"\n")
        self.process.stdin.flush()
        answer = self._answer()
        if "error" in answer:
            raise BenchmarkError(f"{self.name}: {answer['error']}. Its log: {self.log}")
        return answer["result"]

    def _answer(self) -> dict[str, Any]:
        deadline = time.monotonic() + RUN_LIMIT
        while time.monotonic() < deadline:
            try:
                return json.loads(self.answers.get(timeout=1))
            except queue.Empty:
                self.check()
        raise BenchmarkError(f"{self.name} has not answered for {RUN_LIMIT:.0f} s. Its log: {self.log}")


class Side:
    """An engine, stock or with memory, that is up. tools: those that measure it, by their part's name."""

    tools: tuple[str, ...] = ()

    def __init__(self, server: Server, setting: Setting, folder: Path) -> None:
        self.server, self.setting, self.folder = server, setting, folder
        self.warm: set[Any] = set()

    @property
    def name(self) -> str:
        return self.server.name

    @property
    def kv_tokens(self) -> int | None:
        """Tokens that its KV cache holds, as its log says."""
        found = KV_TOKENS.findall(self.server.log.read_text(errors="replace"))
        return int("".join(found[-1]).replace(",", "")) if found else None

    def shown(self, part: str, cell: Cell) -> str:
        """The command as one would type it."""
        return self.server.shown_command

    def greedy(self, prompts: list[list[int]], tokens: int) -> list[Answer]:
        """What the correctness gate looks at."""
        raise NotImplementedError

    def measure(self, part: str, cell: Cell, repeat: int) -> dict[str, float]:
        """One run of the part's tool: figure -> value, see METRICS of ``report``."""
        raise NotImplementedError

    def _result(self, part: str) -> Path:
        return self.folder / f"{self.name.replace(' ', '-')}-{part}.json"


class VllmTools(Side):
    """vLLM in a tool host: ``vllm bench latency`` and ``throughput``."""

    tools = ("latency", "throughput")

    def shown(self, part: str, cell: Cell) -> str:
        options = self._options(part, cell, 0, Path("result.json"))
        engine = self.server.command[self.server.command.index("vllm") + 1 :]
        return commands.typed(["vllm", "bench", part, *engine, *options])

    def greedy(self, prompts: list[list[int]], tokens: int) -> list[Answer]:
        return [Answer(**answer) for answer in self.server.ask(do="greedy", prompts=prompts, tokens=tokens)]

    def measure(self, part: str, cell: Cell, repeat: int) -> dict[str, float]:
        if part == "throughput":
            seconds = self._bench(part, cell, repeat)["elapsed_time"]
            return {"output_tokens_per_s": cell.batch * cell.output / seconds}
        # The same batch with one output token: what lies between the two are decode steps and nothing else.
        first = self._latency(replace(cell, output=1))
        whole = self._latency(cell)
        steps = 1000 * (whole - first) / (cell.output - 1)
        # A machine that is busy with something else can be slower for one token than for all: that says nothing.
        return {"latency_ms": 1000 * whole, "prefill_ms": 1000 * first, "decode_ms": steps if steps > 0 else math.nan}

    def _latency(self, cell: Cell) -> float:
        return statistics.median(self._bench("latency", cell, 0)["latencies"])

    def _bench(self, part: str, cell: Cell, repeat: int) -> dict[str, Any]:
        result = self._result(part)
        answer = self.server.ask(
            do="bench", tool=part, options=self._options(part, cell, repeat, result), result=str(result)
        )
        self.warm.add((part, cell))
        return answer

    def _options(self, part: str, cell: Cell, repeat: int, result: Path) -> list[str]:
        if part == "throughput":
            return commands.bench_throughput(cell, repeat, result)
        return commands.bench_latency(cell, self.setting.iterations, int((part, cell) not in self.warm), result)


class Served(Side):
    """A server, measured by its engine's client. client: a tool host of it, which all servers share."""

    tools = ("serve",)
    rounds = 4  # requests that follow each other in each of a batch's places

    def __init__(self, server: Server, setting: Setting, folder: Path, client: ToolHost) -> None:
        super().__init__(server, setting, folder)
        self.client = client

    def measure(self, part: str, cell: Cell, repeat: int) -> dict[str, float]:
        if (part, cell) not in self.warm:
            self._bench(cell, 1, 10_000)
            self.warm.add((part, cell))
        found = self._bench(cell, self.rounds, repeat)
        wanted = self.rounds * cell.batch
        if found["completed"] != wanted:
            raise BenchmarkError(f"{self.name}: {found['completed']} of {wanted} requests were answered")
        return {
            "output_tokens_per_s": found["output_throughput"],
            "ttft_ms": found["median_ttft_ms"],
            "decode_ms": found["median_tpot_ms"],
        }

    def _bench(self, cell: Cell, rounds: int, seed: int) -> dict[str, Any]:
        raise NotImplementedError


class VllmServed(Served):
    def _bench(self, cell: Cell, rounds: int, seed: int) -> dict[str, Any]:
        result = self._result("serve")
        options = commands.bench_serve(self.server.url, self.setting.model, cell, rounds, seed, result)
        return self.client.ask(do="bench", options=options, result=str(result))

    def greedy(self, prompts: list[list[int]], tokens: int) -> list[Answer]:
        answers = []
        for prompt in prompts:
            body = {"model": commands.NAME, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "logprobs": 0}
            found = _post(self, "/v1/completions", body | {"ignore_eos": True, "return_token_ids": True})["choices"][0]
            answers.append(Answer(found["token_ids"], found["logprobs"]["token_logprobs"]))
        return answers


class SglangServed(Served):
    def _bench(self, cell: Cell, rounds: int, seed: int) -> dict[str, Any]:
        result = self._result("serve")
        options = commands.bench_sglang(self.server.url, self.setting.model, cell, rounds, seed, result)
        return self.client.ask(do="bench", options=options, result=str(result))

    def greedy(self, prompts: list[list[int]], tokens: int) -> list[Answer]:
        answers = []
        for prompt in prompts:
            params = {"max_new_tokens": tokens, "temperature": 0, "ignore_eos": True}
            found = _post(self, "/generate", {"input_ids": prompt, "sampling_params": params, "return_logprob": True})
            logprobs = [step[0] for step in found["meta_info"]["output_token_logprobs"]]
            answers.append(Answer(found["output_ids"], logprobs))
        return answers


def _post(side: Side, path: str, body: dict[str, Any]) -> dict[str, Any]:
    response = httpx.post(f"{side.server.url}{path}", json=body, timeout=300)
    if response.status_code != 200:
        raise BenchmarkError(f"{side.name} refused a request (HTTP {response.status_code}): {response.text[:800]}")
    return response.json()
