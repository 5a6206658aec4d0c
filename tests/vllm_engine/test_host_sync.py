"""The decode path must run on the device alone. Here every tensor is on torch's meta device, which has shapes and no
values: whatever reads a value back (item, tolist, cpu, a data-dependent shape) raises."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from mem_triton.ops.delta_rule import launch
from mem_triton.ops.tuning.delta_rule import select
from mem_triton.systems.delta_mem import pack_layer
from mem_triton.systems.delta_mem.layer_memory import DeltaMemory
from mem_triton.systems.delta_mem.slots import StateSlots
from tests.support.models import attention_dims, random_adapter, tiny_model


def _raise(error: BaseException) -> None:
    """In the place of what makes a failed layer's requests lose their memory: here a failure is to be seen."""
    raise error


@pytest.fixture
def layer(monkeypatch):
    """One attached layer in the middle of a decode step of three rows, and the grids that it launches."""
    from mem_triton_vllm import state_cache

    grids = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *arguments, **options: grids.append(grid)

    for name in ("activate_kernel", "chunk_maps_kernel", "chunk_scan_kernel", "recurrent_kernel"):
        monkeypatch.setattr(launch, name, Kernel())
    monkeypatch.setattr(launch, "architecture", lambda device: "sm90")
    model, meta = tiny_model(), torch.device("meta")
    adapter = random_adapter(model)
    weights = pack_layer(adapter.config, adapter.layers["model.layers.0.self_attn"])
    tensors = {n: v.to(meta) for n, v in vars(weights).items() if isinstance(v, torch.Tensor)}
    dims, spec = attention_dims(model)["model.layers.0.self_attn"], adapter.config.spec
    config = SimpleNamespace(compilation_config=SimpleNamespace(static_forward_context={}))
    slots = StateSlots([0], spec.state_size, 4, meta)
    cache = state_cache.DeltaStateCache(config, "l.delta_state", spec, 16, slots, 0, _raise)
    cache.bind_kv_cache(torch.empty(8, 1, 2, spec.state_size, device=meta))
    ints = {"dtype": torch.int32, "device": meta}
    metadata = state_cache.DeltaStateMetadata(
        torch.empty(4, **ints), torch.empty(3, **ints), torch.empty(3, 8, **ints), max_query_len=1
    )
    forward = SimpleNamespace(attn_metadata={"l.delta_state": metadata}, no_compile_layers={"l.delta_state": cache})
    monkeypatch.setattr(state_cache, "get_forward_context", lambda: forward)
    reads = torch.empty(4, spec.read_width, device=meta)
    memory = DeltaMemory(replace(weights, **tensors), (dims.q, dims.k, dims.v), reads, step=None, fuse=True)

    def step() -> None:
        hidden = torch.empty(3, dims.hidden, device=meta)
        projections = torch.nn.functional.linear(hidden, memory.down)
        state_cache._delta_rule_layer(projections, memory.gate_bias, reads[:3], "l.delta_state")
        memory.correct_qkv(torch.empty(3, dims.q + dims.k + dims.v, device=meta), reads[:3])
        memory.correct_output(hidden)

    return SimpleNamespace(step=step, grids=grids, metadata=metadata, cache_type=state_cache.DeltaStateCache)


def test_decode_is_one_launch_and_reads_nothing_back(layer):
    layer.step()
    assert len(layer.grids) == 1 and all(isinstance(n, int) for n in layer.grids[0])


def test_prefill_reads_nothing_back_either(layer):
    layer.metadata.max_query_len = select("sm90", 8).max_recurrent + 1
    layer.step()
    assert len(layer.grids) == 3


def test_a_host_sync_would_be_seen(layer, monkeypatch):
    """Negative control: the same step, made to look at one number of the batch."""
    stock = layer.cache_type.step

    def step(self, projections, gate_bias, reads, metadata) -> None:
        if metadata.seq_lens.tolist():
            stock(self, projections, gate_bias, reads, metadata)

    monkeypatch.setattr(layer.cache_type, "step", step)
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
        layer.step()


def test_the_state_supports_every_kind_of_cuda_graph():
    """vLLM takes the least support of all groups: one builder that says less would cost the whole model its graphs."""
    from vllm.v1.attention.backend import AttentionCGSupport

    from mem_triton_vllm.state_cache import DeltaStateMetadataBuilder

    assert DeltaStateMetadataBuilder.get_cudagraph_support(None, None) is AttentionCGSupport.ALWAYS


def test_piecewise_graphs_are_split_at_the_ops():
    from mem_triton_vllm.attach import split_graphs_at_ops

    ops = ["vllm::unified_attention_with_output"]
    for _ in range(2):
        split_graphs_at_ops(ops)
    assert ops[0] == "vllm::unified_attention_with_output" and len(ops) == 3
    for name in ops[1:]:
        assert hasattr(torch.ops.mem_triton, name.removeprefix("mem_triton::")), "the name is that of a registered op"
    split_graphs_at_ops(none := [])
    assert none == []
