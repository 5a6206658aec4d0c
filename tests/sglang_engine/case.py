"""Runs one real SGLang engine through rounds of requests and prints what came out. A script: JSON on stdin, JSON out.

A process of its own per case, because SGLang keeps engine-wide state in its process. Its schedulers are spawned and
import this module again; what a negative control breaks is therefore broken here, in every process.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import sys
from typing import Any

from tests.support.cases import overwrite_lora
from tests.support.faults import VARIABLE, switch

MARK = "CASE-RESULT "
TAMPER = "MEM_TRITON_TEST_TAMPER"

if tamper := os.environ.get(TAMPER):
    module, _, function = tamper.partition(":")
    getattr(importlib.import_module(module), function)()


def main() -> None:
    case = json.load(sys.stdin)
    import sglang

    with sglang.Engine(**case["engine"]) as engine:
        rounds = []
        for batch in case["rounds"]:
            switch(batch[0].get("fault"))
            overwrite_lora(batch[0])
            if batch[0].get("reload"):
                lora = batch[0]["lora"]
                engine.unload_lora_adapter(lora)
                assert engine.load_lora_adapter(lora, lora).success
            if os.environ.get(VARIABLE):
                rounds.append(engine.loop.run_until_complete(_one_by_one(engine, batch)))
                continue
            try:
                answers = engine.generate(
                    input_ids=[r["prompt"] for r in batch],
                    sampling_params=[_params(r) for r in batch],
                    lora_path=[r.get("lora") for r in batch] if any(r.get("lora") for r in batch) else None,
                )
            except ValueError as error:
                if not case["errors_are_results"]:
                    raise
                rounds.append({"error": str(error)})
                continue
            rounds.append([_plain(answer) for answer in answers])
        info = engine.get_server_info()
    print(MARK + json.dumps({"rounds": rounds, "facts": _facts(info)}, default=str), flush=True)


async def _one_by_one(engine: Any, batch: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Requests that fail or succeed each for itself."""

    from fastapi import HTTPException

    async def ask(request: dict[str, Any]) -> dict[str, Any]:
        try:
            return _plain(await engine.async_generate(input_ids=request["prompt"], sampling_params=_params(request)))
        except (ValueError, HTTPException) as error:
            return {"tokens": [], "finish": {"type": "abort", "message": str(error)}}

    return await asyncio.gather(*map(ask, batch))


def _params(request: dict[str, Any]) -> dict[str, Any]:
    return {
        "max_new_tokens": request["max_tokens"],
        "temperature": 0,
        "ignore_eos": not request.get("stop_token_ids"),  # SGLang ignores these with it
        "custom_params": request.get("fields"),
        "stop_token_ids": request.get("stop_token_ids"),
    }


def _plain(answer: dict[str, Any]) -> dict[str, Any]:
    meta = answer["meta_info"]
    return {
        "tokens": answer["output_ids"],
        "cached": meta["cached_tokens"],
        "finish": meta["finish_reason"],
        "memory": meta.get("mem_triton"),
        "retractions": meta.get("num_retractions", 0),
    }


def _facts(info: dict[str, Any]) -> dict[str, Any]:
    state = info["internal_states"][0]
    return {
        "max_total_tokens": info.get("max_total_num_tokens"),
        "page_size": state.get("page_size"),
        "overlap": not state.get("disable_overlap_schedule"),
        "backend": state.get("attention_backend"),
        "max_running_requests": state.get("max_running_requests"),
    }


if __name__ == "__main__":
    main()
