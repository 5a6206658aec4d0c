"""Run our Triton kernels, through the interpreter, where an engine's CPU worker would run its own code.

Called in an engine's processes, as a test's tamper, with ``TRITON_INTERPRET=1``. Each kind of kernel says once that it
ran.
"""

from __future__ import annotations

from typing import Any

import torch

from tests.support import interp

RAN = "KERNEL-RAN"


def both() -> None:
    delta_rule()
    memory_attention()


def delta_rule() -> None:
    """δ-mem's scan and its single step."""
    interp.install()  # before anything imports the kernels
    from mem_triton.ops.delta_rule import launch, paged_numba
    from mem_triton.ops.tuning.delta_rule import select

    def step_rows(*arguments) -> None:
        *_, spec, _, _, longest = arguments
        config = select("sm90", spec.rank)
        launch.step_rows(*arguments, config)
        _say("scan" if longest > config.max_recurrent else "step")

    paged_numba.step_rows = step_rows


def attention_inputs() -> None:
    """δ-mem in vLLM as on a GPU: norm and RoPE in its launch. The delta rule's own kernels are in it for prompts."""
    delta_rule()
    as_on_a_gpu()
    from mem_triton_vllm import state_cache

    state_cache.attention_inputs = _interpreted_inputs


def sglang_as_on_a_gpu() -> None:
    """Both memories in SGLang: δ-mem's step and corrections in one launch, its projections in the model's matmul."""
    both()
    from mem_triton_sglang import attach, states

    fold = attach.fold

    def say_and_fold(*arguments):
        folded = fold(*arguments)
        _say("two matmuls" if folded is None else "one matmul")
        return folded

    attach.fold = say_and_fold
    attach.has_launches = lambda device: True
    states.attention_inputs = _interpreted_inputs


def sglang_in_one_launch() -> None:
    """δ-mem in SGLang as it is wired on a GPU, with the op's CPU code."""
    from mem_triton_sglang import attach

    attach.has_launches = lambda device: True


def _interpreted_inputs(qkv, projections, reads, inputs, batch, spec, **options) -> None:
    from mem_triton.ops.attention_inputs import launch
    from mem_triton.ops.tuning.delta_rule import select

    config = select("sm90", spec.rank)
    launch.prepare(qkv, projections, reads, inputs, batch, spec, **options, config=config)
    _say("scan and inputs" if options["max_query_len"] > config.max_recurrent else "inputs")


def as_on_a_gpu() -> None:
    """vLLM's layers as they are wired on a GPU: one matmul for all projections, norm and RoPE in the memory's op."""
    from vllm.model_executor.layers import utils

    from mem_triton.systems.delta_mem import folding
    from mem_triton_vllm import fused_inputs

    fused_inputs.has_launches = lambda device: True
    dispatch = utils.dispatch_cpu_unquantized_gemm
    utils.dispatch_cpu_unquantized_gemm = lambda layer, remove_weight: dispatch(layer, remove_weight=False)
    folding.Folded.cpu_linear = staticmethod(torch.nn.functional.linear)  # vLLM's CPU way asks each layer for it


def memory_attention() -> None:
    """The fused attention kernel."""
    interp.install()
    from mem_triton.ops.memory_attention import planned
    from mem_triton.ops.memory_attention.cpu import dispatch
    from mem_triton.ops.memory_attention.fused import launch

    launch.architecture = lambda device: "sm90"

    def attend(call) -> None:
        launch.attend(by_token(call))
        _say("attention")

    dispatch.attend = attend
    planned.PlannedLayer.attend = lambda self, query, out, cache, plans, make: planned.memory_attention(make())


def by_token(call: Any) -> Any:
    """The call as on a GPU, in whose KV cache keys and values of a token stand beside each other."""
    context, size = call.context, call.query.shape[-1]
    if context.packing is None:
        return call
    import torch

    from mem_triton.ops.memory_attention.arguments.packing import unpack_keys, unpack_values

    keys, values = unpack_keys(context.keys, context.packing), unpack_values(context.values, context.packing)
    keys, values = torch.cat([keys, values], -1).split(size, -1)
    return call._replace(context=context._replace(keys=keys, values=values, packing=None))


_said: set[str] = set()


def _say(kind: str) -> None:
    if kind not in _said:
        _said.add(kind)
        print(f"{RAN} {kind}", flush=True)
