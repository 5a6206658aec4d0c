"""A process that runs an engine's own benchmark tool again and again; its requests are lines of JSON on stdin.

    python -m benchmarks.engines.toolhost vllm --model DIR ...     # keeps one engine for latency and throughput
    python -m benchmarks.engines.toolhost vllm-client              # vllm bench serve, against any server
    python -m benchmarks.engines.toolhost sglang-client            # sglang.bench_serving

``vllm bench latency`` makes an engine, measures one batch and ends: most of its time is the engine's start, and minutes
lie between two runs that are to be compared. Here its ``main`` runs as it is, with the same arguments, except that the
engine it asks for is the one that this process has already. So two engines can be measured in turns, a second apart.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any


class Vllm:
    """``vllm bench latency`` and ``throughput`` on one kept engine; and what the correctness gate asks of it."""

    def __init__(self, engine: list[str]) -> None:
        from vllm import LLM
        from vllm.engine.arg_utils import EngineArgs

        self.engine = engine
        self.llm = LLM.from_engine_args(EngineArgs.from_cli_args(self._parse("latency", [])))
        LLM.from_engine_args = lambda engine_args: self.llm

    def _parse(self, tool: str, options: list[str]) -> argparse.Namespace:
        from vllm.benchmarks import latency, throughput
        from vllm.utils.argparse_utils import FlexibleArgumentParser

        parser = FlexibleArgumentParser()
        {"latency": latency, "throughput": throughput}[tool].add_cli_args(parser)
        return parser.parse_args([*self.engine, *options])

    def bench(self, tool: str, options: list[str], result: str) -> dict[str, Any]:
        """Run a tool; returns what it wrote to the file ``result``, which the options name."""
        from vllm.benchmarks import latency, throughput

        {"latency": latency, "throughput": throughput}[tool].main(self._parse(tool, options))
        return json.loads(Path(result).read_text())

    def greedy(self, prompts: list[list[int]], tokens: int) -> list[dict[str, Any]]:
        """Greedy answers and the log-probabilities of their tokens."""
        from vllm import SamplingParams, TokensPrompt

        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, logprobs=0)
        outputs = self.llm.generate([TokensPrompt(prompt_token_ids=p) for p in prompts], params, use_tqdm=False)
        answers = []
        for output in outputs:
            ids = list(output.outputs[0].token_ids)
            logprobs = [step[i].logprob for i, step in zip(ids, output.outputs[0].logprobs, strict=True)]
            answers.append({"tokens": ids, "logprobs": logprobs})
        return answers


class VllmClient:
    """``vllm bench serve``."""

    def __init__(self, _: list[str]) -> None:
        from vllm.benchmarks import serve
        from vllm.utils.argparse_utils import FlexibleArgumentParser

        self.parser, self.main = FlexibleArgumentParser(), serve.main
        serve.add_cli_args(self.parser)

    def bench(self, options: list[str], result: str) -> dict[str, Any]:
        self.main(self.parser.parse_args(options))
        return json.loads(Path(result).read_text())


class SglangClient:
    """``sglang.bench_serving``, which reads ``sys.argv``."""

    def __init__(self, _: list[str]) -> None:
        from sglang.benchmark import serving

        self.main = serving.cli_main

    def bench(self, options: list[str], result: str) -> dict[str, Any]:
        before, sys.argv = sys.argv, ["sglang.bench_serving", *options]
        try:
            self.main()
        finally:
            sys.argv = before
        return json.loads(Path(result).read_text().splitlines()[-1])


HOSTS = {"vllm": Vllm, "vllm-client": VllmClient, "sglang-client": SglangClient}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what tools print goes to the log; answers have stdout for themselves
    host = HOSTS[sys.argv[1]](sys.argv[2:])
    print(json.dumps({"ready": True}), file=answers)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = {"result": getattr(host, request.pop("do"))(**request)}
        except (Exception, SystemExit) as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers)


if __name__ == "__main__":
    main()
