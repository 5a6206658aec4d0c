"""A process that runs the code of MemoryLLM's authors; its requests are lines of JSON on stdin (see ``official``).

It imports ``configuration_memoryllm`` and ``modeling_memoryllm`` from PYTHONPATH, and nothing of this repository: they
need a transformers of their own.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

import torch
from safetensors.torch import load_file, save_file


class Authors:
    """Their model with given weights and a given pool. weights, pool: safetensors files; config: its configuration."""

    def __init__(self, config: dict[str, Any], weights: str, pool: str) -> None:
        from configuration_memoryllm import MemoryLLMConfig
        from modeling_memoryllm import MemoryLLM

        made = MemoryLLMConfig(**config)
        made._attn_implementation = "sdpa"  # the eager one of 5acaf52 does not run with a pool
        self.model = MemoryLLM(made).float().eval()
        tensors = load_file(weights) | load_file(pool)
        missing, unknown = self.model.load_state_dict(tensors, strict=False)
        if unknown or set(missing) - {"initialized", "lm_head.weight"}:
            raise RuntimeError(f"missing {missing}, unknown {unknown}")
        self.model.initialized += 1
        self.pool = self.model.memory.data.clone()

    def greedy(self, prompts: list[list[int]], tokens: int) -> list[dict[str, Any]]:
        """Greedy answers and the log-probabilities of their tokens."""
        answers = []
        for prompt in prompts:
            said, logprobs, output = [], [], self._run(torch.tensor([prompt]))
            for _ in range(tokens):
                scores = output.logits[0, -1].log_softmax(-1)
                said.append(int(scores.argmax()))
                logprobs.append(float(scores[said[-1]]))
                output = self._run(torch.tensor([said[-1:]]), output.past_key_values)
            answers.append({"tokens": said, "logprobs": logprobs})
        return answers

    def generate(self, batch: int, context: int, output: int, seed: int) -> dict[str, float]:
        """Seconds of a prefill and of a decode step, and bytes of keys and values that are held at the end."""
        chance = torch.Generator().manual_seed(seed)
        ids = torch.randint(4, self.model.config.vocab_size, (batch, context), generator=chance)
        begin = time.perf_counter()
        out = self._run(ids)
        prefill, begin = time.perf_counter() - begin, time.perf_counter()
        for _ in range(output - 1):
            out = self._run(out.logits[:, -1:].argmax(-1), out.past_key_values)
        step = (time.perf_counter() - begin) / max(1, output - 1)
        cache = out.past_key_values
        held = sum(x.numel() * x.element_size() for layer in cache for x in layer)
        return {"prefill": prefill, "step": step, "held": float(held)}

    def inject(self, ids: list[int], seed: int, rows: str | None = None) -> float:
        """Seconds in which a text is written; ``rows``: the file that gets the pool. The pool is as before then."""
        torch.manual_seed(seed)
        begin = time.perf_counter()
        with torch.no_grad():
            self.model.inject_memory(torch.tensor([ids]), update_memory=True)
        took = time.perf_counter() - begin
        if rows is not None:
            save_file({"memory": self.model.memory.data.contiguous()}, rows)
        self.model.memory.data = self.pool.clone()
        return took

    @torch.no_grad()
    def _run(self, ids: torch.Tensor, cache: Any = None) -> Any:
        from transformers import DynamicCache

        return self.model(ids, past_key_values=DynamicCache() if cache is None else cache, use_cache=True)


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what their code prints goes to the log
    authors = Authors(**json.loads(sys.argv[1]))
    print(json.dumps({"ready": True}), file=answers)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = {"result": getattr(authors, request.pop("do"))(**request)}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers)


if __name__ == "__main__":
    main()
