"""The batch-invariant mode in vLLM's worker: who turns it on, and that both kinds of memory hear of it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from vllm.v1.attention.backend import AttentionImpl

from mem_triton.config import parse_config
from mem_triton.ops.memory_attention import Policy
from mem_triton.runtime.worker.memory import BatchMemory
from mem_triton.systems.delta_mem.slots import StateSlots
from mem_triton_vllm import backend, state_cache, worker
from mem_triton_vllm.cache_layout import CacheLayout


class Stock(AttentionImpl):
    """An engine's implementation that counts its calls."""

    stock_calls = 0

    def __init__(self, *args, **kwargs):
        pass

    def forward(self, *args, **kwargs):
        self.stock_calls += 1


@pytest.mark.parametrize(("configured", "variable"), [(True, "0"), (False, "1"), (False, "0")])
def test_the_option_or_vllms_own_mode_turns_it_on(configured, variable, monkeypatch):
    hosts = []
    monkeypatch.setattr(worker.VLLMWorkerMemory, "attach", lambda self, config, shape, host: hosts.append(host))
    monkeypatch.setattr(worker, "shape_of", lambda _: None)
    monkeypatch.setattr(worker, "get_tensor_model_parallel_rank", lambda: 0)
    told = []
    attention = SimpleNamespace(impl=SimpleNamespace(mem_connect=lambda *given: told.append(given)))
    monkeypatch.setattr(worker, "has_one_front_end", lambda _: False)
    monkeypatch.setattr(worker, "attentions_of", lambda _: {0: attention})
    monkeypatch.setattr(worker, "attach", lambda *args, batch_invariant: batch_invariant)
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", variable)
    section = {"delta": {"adapter": "a"}, "memory": {"bank": "b"}, "deterministic": configured}
    engine = SimpleNamespace(compilation_config=SimpleNamespace(mode=None))
    worker.attach_memory(engine, torch.nn.Linear(1, 1), parse_config(section), None)
    on = configured or variable == "1"
    (host,) = hosts
    assert host.attach_states() == on == host.deterministic
    ((memory, _, policy),) = told
    assert isinstance(memory, worker.VLLMWorkerMemory) and policy == (Policy(batch_invariant=True) if on else None)


@pytest.mark.parametrize("on", [True, False])
def test_the_states_tables_are_told(on):
    assert StateSlots([0], 64, 4, torch.device("cpu"), batch_invariant=on).batch_invariant == on


def test_every_backend_says_that_it_can():
    """vLLM refuses to start in its own mode otherwise."""
    assert state_cache.DeltaStateBackend.supports_batch_invariance()


@pytest.mark.parametrize("on", [True, False])
def test_both_ops_are_told(on, monkeypatch):
    told = []
    for name in ("delta_rule_paged", "attention_inputs"):
        monkeypatch.setattr(state_cache, name, lambda *args, **options: told.append(options["batch_invariant"]))
    cache = SimpleNamespace(
        slots=SimpleNamespace(batch_invariant=on),
        spec=SimpleNamespace(),
        inputs=None,
        _batch=lambda *args: (None,),
        _layout=lambda: {},
    )
    metadata = SimpleNamespace(max_query_len=1)
    state_cache.DeltaStateCache.step(cache, None, None, None, metadata)
    state_cache.DeltaStateCache.prepare(cache, None, None, None, None, metadata)
    assert told == [on, on]


def test_attention_is_told(monkeypatch):
    """Told so, it attends every row itself, whether or not one reads memory; else the stock step is left alone."""
    seen = []
    monkeypatch.setattr(backend, "memory_attention", lambda *args, policy, **options: seen.append(policy))
    layer = backend.implementation_with_memory(Stock)()
    layer.num_heads, layer.head_size, layer.scale = 2, 32, 1.0
    layer.mem_set_layout(CacheLayout(32))
    tensors = [torch.zeros(1, 64) for _ in range(3)]
    step = backend.Step(1, 1, *(torch.zeros(1, dtype=torch.int32) for _ in range(3)))
    for policy in (None, Policy(batch_invariant=True)):
        layer.mem_connect(BatchMemory(), SimpleNamespace(read=lambda rows: {}), policy)
        metadata = SimpleNamespace(mem_triton=step)
        layer.forward(SimpleNamespace(), *tensors, torch.zeros(1, 2, 16, 64), metadata, torch.zeros(1, 64))
    assert seen == [Policy(batch_invariant=True)] and layer.stock_calls == 1
