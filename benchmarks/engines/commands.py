"""Command lines of the engines and of their own benchmark tools: both sides the same but for memory's flags."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common.server import Launch, MemoryFlags

NAME = "m"
"""What servers call the model."""


@dataclass(frozen=True)
class Setting:
    """What all engines of a run have in common.

    longest: tokens of the longest request; at_once: most requests at a time; share: of a GPU's memory, for each engine;
    kv_gib: KV cache of a CPU engine. extra: the user's own arguments, for both sides. iterations: of a batch in one run
    of the latency tool, of which the median counts; few of them and more pairs see less of a machine's moods.
    """

    model: Path
    dtype: str
    longest: int
    at_once: int
    gpu: bool
    share: float = 0.4
    kv_gib: int = 1
    eager: bool = False
    extra: tuple[str, ...] = ()
    iterations: int = 1


@dataclass(frozen=True)
class Cell:
    """One point of a figure: so many requests at once, of so many prompt and output tokens."""

    batch: int
    context: int
    output: int

    def longer(self, tokens: int) -> Cell:
        return Cell(self.batch, self.context + tokens, self.output)


def vllm_engine(setting: Setting) -> list[str]:
    """Arguments of a vLLM engine, for ``vllm serve`` and ``vllm bench`` alike."""
    s = setting
    words = ["--dtype", s.dtype, "--max-model-len", str(s.longest), "--max-num-seqs", str(s.at_once)]
    words += ["--no-enable-prefix-caching"]  # random prompts, and no repeat may profit from the one before
    words += ["--gpu-memory-utilization", str(s.share)] if s.gpu else []
    return [*words, *(["--enforce-eager"] if s.eager else []), *s.extra]


def vllm_environment(setting: Setting) -> dict[str, str]:
    return {
        "VLLM_CPU_KVCACHE_SPACE": str(setting.kv_gib),  # GiB; the default takes a large part of the machine
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
    }


def vllm_memory(section: dict[str, Any] | None) -> MemoryFlags:
    if section is None:
        return MemoryFlags()
    config = json.dumps({"mem_triton": section})
    return MemoryFlags(["--load-format", "mem_triton", "--additional-config", config])


def vllm_host(setting: Setting) -> Launch:
    """A process that keeps one engine for ``vllm bench latency`` and ``throughput``, see ``toolhost``."""
    command = [sys.executable, "-m", "benchmarks.engines.toolhost", "vllm", "--model", str(setting.model)]
    return Launch([*command, *vllm_engine(setting)], vllm_environment(setting))


def vllm_server(setting: Setting) -> Launch:
    beside = Path(sys.executable).with_name("vllm")  # missing where packages lie in a folder of PYTHONPATH
    vllm = [str(beside)] if beside.exists() else [sys.executable, "-m", "vllm.entrypoints.cli.main"]
    command = [*vllm, "serve", str(setting.model), "--served-model-name", NAME]
    return Launch([*command, "--host", "127.0.0.1", *vllm_engine(setting)], vllm_environment(setting))


def sglang_server(setting: Setting) -> Launch:
    s = setting
    command = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(s.model), "--served-model-name", NAME]
    command += ["--host", "127.0.0.1", "--dtype", s.dtype, "--context-length", str(s.longest)]
    command += ["--max-running-requests", str(s.at_once), "--disable-radix-cache", "--page-size", "16"]
    if s.gpu:
        return Launch([*command, "--mem-fraction-static", str(s.share), *s.extra], {})
    command += ["--device", "cpu", "--sampling-backend", "pytorch", "--max-total-tokens", str(s.longest * s.at_once)]
    command += ["--sleep-on-idle"]  # its scheduler would take a core from the other side while it waits
    return Launch([*command, *s.extra], {"SGLANG_PLATFORM": "torch_cpu"})


def sglang_memory(section: dict[str, Any] | None, file: Path) -> MemoryFlags:
    """SGLang has no option for a plugin's configuration: it is a file that a variable names."""
    if section is None:
        return MemoryFlags(environment={"MEM_TRITON_CONFIG": ""})  # one of the user's own is not for this server
    file.write_text(json.dumps(section) + "\n")
    return MemoryFlags(["--attention-backend", "mem_triton"], {"MEM_TRITON_CONFIG": str(file)})


def bench_latency(cell: Cell, iterations: int, warmup: int, result: Path) -> list[str]:
    """``vllm bench latency`` of one batch, without the engine's own arguments."""
    return _options(
        input_len=cell.context,
        output_len=cell.output,
        batch_size=cell.batch,
        num_iters=iterations,
        num_iters_warmup=warmup,
        output_json=result,
    )


def bench_throughput(cell: Cell, seed: int, result: Path) -> list[str]:
    """``vllm bench throughput`` of one batch of random prompts."""
    return _options(**_random_prompts("random", cell, cell.batch), seed=seed, output_json=result)


def bench_serve(url: str, model: Path, cell: Cell, rounds: int, seed: int, result: Path) -> list[str]:
    """``vllm bench serve``: ``batch`` requests at once, each followed by the next one, ``rounds`` for each of them."""
    return _options(
        **_client("vllm", url, model),
        **_random_prompts("random", cell, rounds * cell.batch),
        max_concurrency=cell.batch,
        ignore_eos=True,
        seed=seed,
        disable_tqdm=True,
        percentile_metrics="ttft,tpot,itl",
        save_result=True,
        result_dir=result.parent,
        result_filename=result.name,
    )


def bench_sglang(url: str, model: Path, cell: Cell, rounds: int, seed: int, result: Path) -> list[str]:
    """``sglang.bench_serving``, likewise."""
    return _options(
        **_client("sglang", url, model),
        **_random_prompts("random-ids", cell, rounds * cell.batch),
        random_range_ratio=1.0,
        tokenize_prompt=True,
        max_concurrency=cell.batch,
        seed=seed,
        disable_tqdm=True,
        warmup_requests=0,
        output_file=result,
    )


def _client(backend: str, url: str, model: Path) -> dict[str, Any]:
    return {"backend": backend, "base_url": url, "model": NAME, "tokenizer": model}


def _random_prompts(dataset: str, cell: Cell, count: int) -> dict[str, Any]:
    lengths = {"random_input_len": cell.context, "random_output_len": cell.output}
    return {"dataset_name": dataset, **lengths, "num_prompts": count}


def _options(**values: Any) -> list[str]:
    """Options by name: ``input_len=64`` is ``--input-len 64``, and True is the option alone."""
    words = []
    for name, value in values.items():
        words += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return words


def typed(words: Sequence[str]) -> str:
    """As one would type it."""
    return shlex.join([Path(words[0]).name, *words[1:]])
