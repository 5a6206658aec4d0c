"""Runs one real vLLM engine through rounds of requests and prints what came out. A script: JSON on stdin, JSON out.

A process of its own per case, because vLLM keeps engine-wide state in its process, and because the environment (runner,
interpreter, plugins) is read at import.
"""

from __future__ import annotations

import importlib
import json
import sys
from typing import Any

from tests.support.cases import overwrite_lora, swap_lora
from tests.support.faults import switch

MARK = "CASE-RESULT "


def main() -> None:
    case = json.load(sys.stdin)
    if case["tamper"]:  # negative controls switch one safety mechanism off, in this process
        module, _, function = case["tamper"].partition(":")
        getattr(importlib.import_module(module), function)()
    if case["force_async"]:
        _force_async_scheduling()
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    def params(request: dict[str, Any]) -> SamplingParams:
        several = {"n": request["n"], "top_k": 1} if "n" in request else {}  # vLLM has no greedy ones
        return SamplingParams(
            max_tokens=request["max_tokens"],
            temperature=float("n" in request),
            ignore_eos=True,
            logprobs=request.get("logprobs"),
            extra_args=request.get("fields"),
            stop_token_ids=request.get("stop_token_ids"),
            stop=request.get("stop"),
            **several,
        )

    llm = LLM(**case["llm"])
    rounds = []
    for batch in case["rounds"]:
        switch(batch[0].get("fault"))
        overwrite_lora(batch[0])
        if "swap" in batch[0]:
            swap_lora(llm.llm_engine.memory, "open_request", batch[0])
        if batch[0].get("reload"):
            llm.llm_engine.add_lora(LoRARequest("l", 1, batch[0]["lora"], load_inplace=True))
        prompts = [{"prompt_token_ids": r["prompt"]} for r in batch]
        loras = [LoRARequest("l", 1, r["lora"], load_inplace="inplace" in r) if r.get("lora") else None for r in batch]
        try:
            outputs = llm.generate(prompts, [params(r) for r in batch], lora_request=loras, use_tqdm=False)
        except Exception as error:
            if not case["errors_are_results"]:
                raise
            rounds.append({"error": f"{type(error).__name__}: {error}"})
            continue
        rounds.append(
            [
                {
                    "tokens": list(o.outputs[0].token_ids),
                    "answers": [list(answer.token_ids) for answer in o.outputs],
                    "cached": o.num_cached_tokens,
                    "logprobs": _plain(o.outputs[0].logprobs),
                    "finish": o.outputs[0].finish_reason,
                    "memory": (o.kv_transfer_params or {}).get("mem_triton"),
                }
                for o in outputs
            ]
        )
    metrics = {m.name: m.value for m in llm.get_metrics() if hasattr(m, "value")}
    config = llm.llm_engine.vllm_config
    facts = {
        "v2": config.use_v2_model_runner,
        "async": config.scheduler_config.async_scheduling,
        "preemptions": metrics.get("vllm:num_preemptions", 0),
        "drafts": metrics.get("vllm:spec_decode_num_draft_tokens", 0),
        "accepted": metrics.get("vllm:spec_decode_num_accepted_tokens", 0),
        "engine": type(llm.llm_engine).__name__,
    }
    print(MARK + json.dumps({"rounds": rounds, "facts": facts}), flush=True)


def _plain(logprobs: Any) -> Any:
    return None if logprobs is None else [{str(t): p.logprob for t, p in step.items()} for step in logprobs]


def _force_async_scheduling() -> None:
    """The CPU platform switches async scheduling off; the GPU default is on, so tests want it."""
    from vllm.platforms.cpu import CpuPlatform

    stock = CpuPlatform.check_and_update_config.__func__

    def check_and_update_config(cls: Any, vllm_config: Any) -> None:
        stock(cls, vllm_config)
        vllm_config.scheduler_config.async_scheduling = True

    CpuPlatform.check_and_update_config = classmethod(check_and_update_config)


if __name__ == "__main__":
    main()
