"""A real ``sglang.launch_server`` process, and a client of it."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

from tests.sglang_engine.engine import DEFAULTS, ROOT, environment, write_config, zygote
from tests.support.server import ServerProcess, free_port, spawn
from tests.support.zygote import SPAWN


class Server(ServerProcess):
    """Serves ``model`` under the name "m", with metrics. memory: the mem_triton section, None for the stock server.

    fresh: start it as users do, and not from the zygote. module: what is run.
    """

    fields_in, report_field = "custom_params", "metadata"
    requests_done = "sglang:num_requests_total"

    def __init__(
        self,
        model: str | Path,
        log: str | Path,
        memory: dict[str, Any] | None = None,
        flags: list[str] | None = None,
        env: dict[str, str] | None = None,
        fresh: bool = False,
        module: str = "sglang.launch_server",
        **options: Any,
    ) -> None:
        options = {"context_length": 4096, "max_total_tokens": 8192, **options}
        variables = environment(**(env or {}))
        if memory is not None:
            options.setdefault("attention_backend", "mem_triton")
            variables["MEM_TRITON_CONFIG"] = str(write_config(memory))
        said = [f"--{name.replace('_', '-')}={value}" for name, value in {**DEFAULTS, **options}.items()]
        port = free_port()
        command = [
            "-m",
            module,
            "--model-path",
            str(model),
            "--served-model-name",
            "m",
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
            "--enable-metrics",
            "--sleep-on-idle",  # schedulers take a whole core otherwise, which the oracle in this process needs
            *said,
            *(flags or []),
        ]
        if fresh or SPAWN:
            process = spawn([sys.executable, *command], variables, ROOT, log)
        else:
            process = zygote().start(command, variables, ["/dev/null", log, log])
        super().__init__(process, port, log)

    def generate(self, prompt: Any, max_tokens: int = 12, fields: Any = None, **others: Any) -> httpx.Response:
        """SGLang's own API. prompt: token ids, or a list of such. fields: the memory fields (``custom_params``)."""
        params = {"max_new_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
        params |= {"custom_params": fields, **others.pop("sampling_params", {})}
        return self.http.post("/generate", json={"input_ids": prompt, "sampling_params": params, **others})

    def tokens(self, prompt: list[int], max_tokens: int = 12, fields: Any = None, **others: Any) -> list[int]:
        response = self.generate(prompt, max_tokens, fields, **others)
        assert response.status_code == 200, response.text
        return response.json()["output_ids"]

    def stream(self, prompt: list[int], max_tokens: int, fields: Any = None, **others: Any) -> Iterator[dict[str, Any]]:
        """The answers of SGLang's own API as they come, each with all tokens so far."""
        params = {"max_new_tokens": max_tokens, "temperature": 0, "ignore_eos": True, "custom_params": fields}
        body = {"input_ids": prompt, "sampling_params": params, "stream": True, **others}
        with self.http.stream("POST", "/generate", json=body) as lines:
            for line in lines.iter_lines():
                if line.startswith("data: {"):
                    yield json.loads(line[6:])

    def inside(self) -> float:
        """Requests that the engine runs, or has in its queue."""
        return self._load("sglang_num_running_reqs{") + self._load("sglang_num_waiting_reqs{")

    def held(self) -> float:
        """Tokens of the KV cache that requests hold."""
        return self._load("sglang_num_used_tokens{")

    def _load(self, name: str) -> float:
        lines = self.http.get("/v1/loads", params={"format": "prometheus"}).text.splitlines()
        found = [float(line.split()[-1]) for line in lines if line.startswith(name)]
        assert found, f"/v1/loads has no {name}"
        return sum(found)

    @staticmethod
    def adapted(name: str) -> str:
        """The model name of a LoRA adapter."""
        return f"m:{name}"

    def load_adapter(self, name: str, folder: Any) -> None:
        """Load a LoRA adapter under a name that has one."""
        self.http.post("/unload_lora_adapter", json={"lora_name": name}).raise_for_status()
        answer = self.http.post("/load_lora_adapter", json={"lora_name": name, "lora_path": str(folder)})
        assert answer.status_code == 200, answer.text
