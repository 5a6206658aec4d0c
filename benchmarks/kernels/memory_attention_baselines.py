"""Attention as others compute it, on the tensors of the case and with tables made beforehand.

    context: NAME      a stock backend without any memory: what the model costs anyway
    as prefix: NAME    the same backend that reads the shared segment as a prefix in each request's block table
    cat                memory and context gathered into one dense KV in every step, then torch's attention
    flashinfer cascade two levels of FlashInfer, the shared segment first

NAME is vLLM's Triton kernel and its FlashAttention where they can be had, else torch's SDPA on dense copies. All of
them read a pool in 16 bits, also where ours has 8.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels.memory_attention_case import Layer, gate, work
from benchmarks.kernels.registry import Case, Setup, Variant
from mem_triton.ops.memory_attention import AttentionCall, Policy, memory_attention

Make = Callable[[Case, Layer, Tensor, int], Callable[[], Any]]
MOST_DENSE_BYTES = 16 << 30  # of the copy that ``cat`` makes
SEGMENTS = 16  # of vLLM's split over a sequence


def stock(case: Case, layer: Layer, setup: Setup) -> dict[str, Make]:
    """The backends of this machine, by name."""
    known = {"vllm triton": vllm_triton, "flash": flash} if setup.gpu else {}
    table = layer.context.block_table
    found = {
        name: make
        for name, make in known.items()
        if setup.load(name, functools.partial(make, case, layer, table, 0)) is not None
    }
    return found or {"sdpa": sdpa}


def variants(case: Case, layer: Layer, setup: Setup, backends: dict[str, Make]) -> list[Variant]:
    def baseline(name: str, call: Callable[[], Any], note: str, reads: int = 1, memory: bool = True) -> Variant:
        judge = gate(case, layer, memory=memory, fp8=False)
        cost = work(case, memory=memory, shared_reads=reads, fp8=False)
        return Variant(name, call, judge, cost, writes=(layer.out,), baseline=True, note=note)

    found, table, shared = [], layer.context.block_table, case.sizes["shared"]
    for name, make in backends.items():
        found.append(baseline(f"context: {name}", make(case, layer, table, 0), "no memory", memory=False))
        if shared and not case.sizes["references"]:
            call = make(case, layer, layer.prefixed, shared)
            note = "the shared segment is read once per request, in 16 bits"
            found.append(baseline(f"as prefix: {name}", call, note, reads=case.sizes["batch"]))
    if case.sizes["fp8_pool"]:
        setup.left_out("cat", "torch.cat cannot undo 8 bits; the same case in 16 bits has it", case.name)
    elif dense_bytes(case) > MOST_DENSE_BYTES:
        setup.left_out("cat", f"its dense copy would take {dense_bytes(case) / 1e9:.0f} GB", case.name)
    else:
        found.append(baseline("cat", cat(case, layer), "gathers all keys and values into one dense tensor first"))
    if shared and not case.sizes["references"] and setup.gpu:
        call = setup.load("flashinfer cascade", functools.partial(flashinfer_cascade, case, layer))
        if call is not None:
            found.append(baseline("flashinfer cascade", call, "planned beforehand; 16 bits"))
    return found


def with_lse(case: Case, layer: Layer, setup: Setup, backends: dict[str, Make]) -> tuple[Callable[[], Tensor], str]:
    """A way to attend to the context that writes ``layer.out`` and returns its log-sum-exp [Hq, T]; and its name."""
    if "flash" in backends:
        return flash_lse(case, layer, layer.context.block_table, 0), "flash"

    def attend() -> Tensor:
        scale = case.sizes["head_dim"] ** -0.5
        call = AttentionCall(layer.query, layer.context, layer.out, scale, lse=layer.lse)
        memory_attention(call, policy=Policy("fused"))
        return layer.lse.t()

    return attend, "own kernel" if setup.gpu else "own cpu path"


def vllm_triton(case: Case, layer: Layer, table: Tensor, extra: int) -> Callable[[], None]:
    """vLLM's unified attention, with its split over the sequence where vLLM itself uses it."""
    from vllm.v1.attention.ops.triton_unified_attention import unified_attention

    s, device = case.sizes, layer.query.device
    hq, size, most = s["query_heads"], s["head_dim"], max(1, 128 // s["kv_heads"])
    room = functools.partial(torch.empty, dtype=torch.float32, device=device)
    split = {
        "seq_threshold_3D": most,
        "num_par_softmax_segments": SEGMENTS,
        "softmax_segm_output": room(most, hq, SEGMENTS, 1 << (size - 1).bit_length()),
        "softmax_segm_max": room(most, hq, SEGMENTS),
        "softmax_segm_expsum": room(most, hq, SEGMENTS),
    }
    return functools.partial(
        unified_attention,
        q=layer.query,
        k=layer.cache[0],
        v=layer.cache[1],
        out=layer.out,
        cu_seqlens_q=layer.context.query_start_loc,
        max_seqlen_q=s["queries"],
        seqused_k=layer.context.seq_lens + extra,
        max_seqlen_k=s["queries"] + s["context"] + extra,
        softmax_scale=size**-0.5,
        causal=True,
        window_size=(-1, -1),
        block_table=table,
        softcap=0.0,
        q_descale=None,
        k_descale=None,
        v_descale=None,
        **split,
    )


def flash_lse(case: Case, layer: Layer, table: Tensor, extra: int) -> Callable[[], Tensor]:
    """FlashAttention as vLLM ships it, 3 where the GPU has it; returns its log-sum-exp, [Hq, T]."""
    from vllm.vllm_flash_attn.flash_attn_interface import flash_attn_varlen_func, is_fa_version_supported

    s, version = case.sizes, 3 if is_fa_version_supported(3) else 2
    lengths, longest = layer.context.seq_lens + extra, s["queries"] + s["context"] + extra
    return lambda: flash_attn_varlen_func(
        layer.query,
        layer.cache[0],
        layer.cache[1],
        s["queries"],
        layer.context.query_start_loc,
        longest,
        seqused_k=lengths,
        block_table=table,
        causal=True,
        softmax_scale=s["head_dim"] ** -0.5,
        out=layer.out,
        return_softmax_lse=True,
        fa_version=version,
    )[1]


def flash(case: Case, layer: Layer, table: Tensor, extra: int) -> Callable[[], None]:
    """The same for its output alone."""
    attend = flash_lse(case, layer, table, extra)

    def call() -> None:
        attend()

    return call


def sdpa(case: Case, layer: Layer, table: Tensor, extra: int) -> Callable[[], None]:
    """torch's SDPA on a dense copy of the keys, which is made outside of the timing."""
    length = case.sizes["queries"] + case.sizes["context"] + extra
    keys, values = (x[table.long()].flatten(1, 2)[:, :length].transpose(1, 2).contiguous() for x in layer.cache)
    return lambda: attend_dense(case, layer, keys, values)


def attend_dense(case: Case, layer: Layer, keys: Tensor, values: Tensor) -> None:
    """keys, values: [rows, Hkv, n, D], of which the last ``queries`` are the queries' own; writes ``layer.out``."""
    queries, mask = case.sizes["queries"], None
    if queries > 1:
        place = torch.arange(keys.shape[2], device=keys.device)
        mask = place <= place[-queries:, None]
    query = layer.query.unflatten(0, (-1, queries)).transpose(1, 2)
    attended = torch.nn.functional.scaled_dot_product_attention(query, keys, values, mask, enable_gqa=True)
    layer.out.copy_(attended.transpose(1, 2).flatten(0, 1))


def cat(case: Case, layer: Layer) -> Callable[[], None]:
    """What a model without our kernels would do: torch.cat of memory and context, as Memory³ describes it."""
    s, length = case.sizes, case.sizes["queries"] + case.sizes["context"]
    memory = layer.memory
    table = layer.context.block_table.long()

    def call() -> None:
        dense = []
        for which, cache in enumerate(layer.cache):
            parts = [cache[table].flatten(1, 2)[:, :length].transpose(1, 2)]
            if s["references"]:
                own = memory["pages"][which][memory["table"].page.long()]  # [rows, references, Hkv, P, D]
                parts.insert(0, own.transpose(1, 2).flatten(2, 3))
            if s["shared"]:
                parts.insert(0, memory["shared"][which].expand(s["batch"], -1, -1, -1))
            dense.append(torch.cat(parts, 2))
        attend_dense(case, layer, *dense)

    return call


def dense_bytes(case: Case) -> int:
    s = case.sizes
    tokens = s["queries"] + s["context"] + s["shared"] + s["references"] * 8
    return 2 * s["batch"] * tokens * s["kv_heads"] * s["head_dim"] * case.torch_dtype.itemsize


def flashinfer_cascade(case: Case, layer: Layer) -> Callable[[], Tensor]:
    """The shared segment as level one, each request's own context as level two; merged by FlashInfer."""
    import flashinfer

    s, device = case.sizes, layer.query.device
    table, lengths = layer.context.block_table, s["queries"] + s["context"]
    block = layer.cache.shape[2]
    shared_blocks, own_blocks = s["shared"] // block, table.shape[1]
    integers = functools.partial(torch.tensor, dtype=torch.int32, device=device)
    wrapper = flashinfer.MultiLevelCascadeAttentionWrapper(2, workspace(device), "NHD")
    wrapper.plan(
        [integers([0, len(layer.query)]), layer.context.query_start_loc],
        [integers([0, shared_blocks]), torch.arange(s["batch"] + 1, dtype=torch.int32, device=device) * own_blocks],
        [torch.arange(shared_blocks, dtype=torch.int32, device=device), table.flatten()],
        [integers([block]), torch.full((s["batch"],), (lengths - 1) % block + 1, dtype=torch.int32, device=device)],
        s["query_heads"],
        s["kv_heads"],
        s["head_dim"],
        block,
        causal=True,
        q_data_type=case.torch_dtype,
    )
    return lambda: wrapper.run(layer.query, (layer.cache[0], layer.cache[1]))


@functools.cache
def workspace(device: torch.device) -> Tensor:
    """One for all: calls run one after the other."""
    return torch.empty(128 << 20, dtype=torch.uint8, device=device)
