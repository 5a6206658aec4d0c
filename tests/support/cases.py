"""A case: rounds of requests for a real engine in a process of its own, and what came out of it."""

from __future__ import annotations

import json
import shutil
import subprocess
from typing import Any


def request(prompt: list[int], max_tokens: int = 12, **others: Any) -> dict[str, Any]:
    """One request of a case; others: fields (mem_...), lora, stop_token_ids, and what else the engine's case reads.

    Before the round of a request with them, overwrite is a folder whose files replace those of its LoRA adapter, and
    reload tells the engine to load the adapter anew. swap is such a folder, too: its files replace the adapter's as
    soon as the request is admitted, before the engine has run a step of it.
    """
    return {"prompt": prompt, "max_tokens": max_tokens, **others}


def overwrite_lora(request: dict[str, Any]) -> None:
    """What a request with ``overwrite`` asks for."""
    if "overwrite" in request:
        shutil.copytree(request["overwrite"], request["lora"], dirs_exist_ok=True)


def swap_lora(owner: Any, admits: str, request: dict[str, Any]) -> None:
    """What a request with ``swap`` asks for. admits: the method of ``owner`` that admits a request."""
    stock = getattr(owner, admits)

    def admit(*args: Any, **kwargs: Any) -> Any:
        admitted = stock(*args, **kwargs)
        shutil.copytree(request["swap"], request["lora"], dirs_exist_ok=True)
        return admitted

    setattr(owner, admits, admit)


def result_of(process: subprocess.CompletedProcess[str], mark: str, fails: bool) -> Any:
    """What a case printed after ``mark``, and all that it printed (output).

    fails: the engine must not start, or die; returns the output alone then.
    """
    result = [line for line in process.stdout.splitlines() if line.startswith(mark)]
    output = process.stdout + process.stderr
    if fails:
        assert process.returncode != 0 and not result, f"the engine started:\n{output[-3000:]}"
        return output
    assert process.returncode == 0 and result, output[-6000:]
    return {**json.loads(result[-1].removeprefix(mark)), "output": output}


def tokens(result: Any, index: int = 0) -> list[list[int]]:
    """The generated tokens of each request of a round."""
    return [answer["tokens"] for answer in result["rounds"][index]]


def cached(result: Any, index: int = 0) -> list[int]:
    """How many tokens of each prompt of a round came from the prefix cache."""
    return [answer["cached"] for answer in result["rounds"][index]]
