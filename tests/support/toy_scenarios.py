"""A memory system that the engines have never heard of runs on them (``toy``)."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.support.cases import tokens
from tests.support.checkout import python_path
from tests.support.memory_bench import MemoryBench
from tests.support.memory_scenarios import PROMPTS, Run, ask
from tests.support.toy import prefix

DISTRIBUTION = Path(__file__).parent / "toy_dist"
LENGTH = 4


def generated(model: torch.nn.Module, prompt: list[int], count: int, with_prefix: bool) -> list[int]:
    """What transformers says, with the prefix in every layer's cache; its keys are placed as they are."""
    from transformers import DynamicCache

    config, ids = model.config, list(prompt)
    for _ in range(count):
        cache = DynamicCache()
        if with_prefix:
            made = prefix(config.num_key_value_heads, LENGTH, config.head_dim)
            for layer in range(config.num_hidden_layers):
                cache.update(made[0][None].clone(), made[1][None].clone(), layer)
        with torch.no_grad():
            logits = model(torch.tensor([ids]), past_key_values=cache, position_ids=torch.arange(len(ids))[None]).logits
        ids.append(int(logits[0, -1].argmax()))
    return ids[len(prompt) :]


def test_a_foreign_system_answers_as_transformers_do(memory_bench: MemoryBench, run: Run) -> None:
    """Readers and others in one batch, chunked prefill, prefix-cache hits of both kinds, and a bad field."""
    short, middle, long, _ = PROMPTS
    rounds = [
        [ask(short, 12, mem_toy=1), ask(middle), ask(long, 12, mem_toy=1), ask(short)],
        [ask(long), ask(long, 12, mem_toy=1), ask(middle, 12, mem_toy=1)],
    ]
    env = {"PYTHONPATH": python_path(DISTRIBUTION)}
    result = run(memory_bench.model, rounds, memory={"toy": {"tokens": LENGTH}}, env=env)
    right = {
        (name, toy): generated(memory_bench.oracle, p, 12, toy)
        for name, p in (("short", short), ("middle", middle), ("long", long))
        for toy in (False, True)
    }
    assert all(right[name, True] != right[name, False] for name in ("short", "middle", "long"))
    assert tokens(result, 0) == [
        right["short", True],
        right["middle", False],
        right["long", True],
        right["short", False],
    ]
    assert tokens(result, 1) == [right["long", False], right["long", True], right["middle", True]]


def test_without_its_distribution_its_section_is_unknown(memory_bench: MemoryBench, run: Run) -> None:
    """Negative control: nothing of the toy is in the engine's integration."""
    output = run(memory_bench.model, [], memory={"toy": {}}, fails=True)
    assert "mem_triton.toy: unknown key" in output
