"""A real ``vllm serve`` process, and a client of it."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.support.server import ServerProcess, free_port, spawn
from tests.support.zygote import SPAWN
from tests.vllm_engine.engine import ROOT, environment, forked, zygote


class Server(ServerProcess):
    """Serves ``model`` under the name "m". fresh: start it as users do, and not from the zygote."""

    fields_in, report_field = "vllm_xargs", "kv_transfer_params"
    requests_done = "vllm:request_success_total"

    def __init__(self, model: str, log: str, flags: list[str], fresh: bool = False, **env: str) -> None:
        port = free_port()
        command = [
            "-m",
            "vllm.entrypoints.cli.main",
            "serve",
            model,
            "--served-model-name",
            "m",
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
            "--dtype",
            "float32",
            "--max-model-len",
            "4096",
            "--max-num-seqs",
            "4",
            "--max-num-batched-tokens",
            "64",
            "--enforce-eager",
            "--block-size",
            "32",
            "--gpu-memory-utilization",
            "0.3",
            *([] if fresh else ["--num-gpu-blocks-override", "1024"]),  # see engine.DEFAULTS
            *flags,
        ]
        variables = environment(**{"VLLM_ENABLE_V1_MULTIPROCESSING": "1", **env})
        if fresh or SPAWN:
            process = spawn([sys.executable, *command], variables, ROOT, log)
        else:
            process = zygote("v1").start(command, forked(variables), ["/dev/null", log, log])
        super().__init__(process, port, log)

    def tokens(self, prompt: list[int], max_tokens: int = 12, fields: Any = None) -> list[int]:
        response = self.complete(prompt, max_tokens, fields)
        assert response.status_code == 200, response.text
        return response.json()["choices"][0]["token_ids"]

    def events(self, prompt: list[int], max_tokens: int, fields: Any = None, **others: Any) -> Iterator[dict[str, Any]]:
        """A stream's parts as they come."""
        body = {"model": "m", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
        body |= {"stream": True, "return_token_ids": True, self.fields_in: fields, **others}
        with self.http.stream("POST", "/v1/completions", json=body) as lines:
            for line in lines.iter_lines():
                if line.startswith("data: {"):
                    yield json.loads(line[6:])

    def stream(self, prompt: list[int], max_tokens: int, fields: Any = None) -> Iterator[list[int]]:
        """Token ids as they come."""
        with contextlib.closing(self.events(prompt, max_tokens, fields)) as events:
            for event in events:
                yield event["choices"][0]["token_ids"] or []

    def inside(self) -> float:
        """Requests that the engine runs, or has in its queue."""
        return self.metric("vllm:num_requests_running{") + self.metric("vllm:num_requests_waiting{")

    def held(self) -> float:
        """Share of the KV cache that requests hold."""
        return self.metric("vllm:kv_cache_usage_perc{")

    @staticmethod
    def adapted(name: str) -> str:
        """The model name of a LoRA adapter."""
        return name

    def load_adapter(self, name: str, folder: Any) -> None:
        """Load a LoRA adapter under a name that has one."""
        body = {"lora_name": name, "lora_path": str(folder), "load_inplace": True}
        answer = self.http.post("/v1/load_lora_adapter", json=body)
        assert answer.status_code == 200, answer.text


def memory_flags(section: dict) -> list[str]:
    """The flags that switch memory on."""
    return ["--load-format", "mem_triton", "--additional-config", json.dumps({"mem_triton": section})]


def with_memory(
    model: str | Path, log: str | Path, section: dict[str, Any], flags: list[str] | None = None, **options: Any
) -> Server:
    """Start a server with memory. section: mem_triton's. options: those of ``Server``."""
    return Server(str(model), str(log), [*memory_flags(section), *(flags or [])], **options)
