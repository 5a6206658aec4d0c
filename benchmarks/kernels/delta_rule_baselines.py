"""What others offer for δ-mem's recurrence, each gated against fp64 of the very problem that it solves.

All of them get inputs that are activated already and states without pages, and leave one state per row; ours activates
and stores a state every 16 tokens. Their times are therefore times of less.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from benchmarks.kernels.registry import Case, Gate, Setup, Variant, relative_rms
from benchmarks.kernels.roofline import Work
from mem_triton.ops.delta_rule import DeltaRuleInputs

MOST_LOOPS = 512  # tokens; the loop is eleven launches each
CHUNK = 64  # of fla's chunked form; shorter texts are no chunk
ROUNDED = {"bf16": 1e-2, "fp16": 2e-3, "fp32": 1e-5}  # results in the case's dtype
Pair = tuple[Tensor, Tensor]


def variants(case: Case, inputs: DeltaRuleInputs, start: Tensor, setup: Setup) -> list[Variant]:
    """inputs: fp32 [B, T, H, r]. start: fp32 [B, H, r, r]."""
    found = []
    if case.sizes["queries"] <= MOST_LOOPS:
        found.append(torch_loop(case, inputs, start))
    else:
        setup.left_out("torch token loop", f"beyond {MOST_LOOPS} tokens; it is eleven launches for each", case.name)
    for name, make in (("official scan", official_scan), ("fla", fla_kernels)):
        found += setup.load(name, functools.partial(make, case, inputs, start, setup)) or []
    return found


def token_loop(inputs: DeltaRuleInputs, state: Tensor, read_first: bool = True) -> Pair:
    """The recurrence in plain torch, all rows at once. inputs: [B, T, H, r]. Returns reads and last states."""
    reads = torch.empty_like(inputs.q)
    for t in range(inputs.q.shape[1]):
        q, k, v, keep, erase, write = (x[:, t].unsqueeze(-1) for x in inputs)  # [B, H, r, 1]
        after = keep * state + (write * v - erase * (state @ k)) * k.mT
        reads[:, t] = ((state if read_first else after) @ q).squeeze(-1)
        state = after
    return reads, state


def gate(inputs: DeltaRuleInputs, start: Tensor, tolerance: float, read_first: bool = True) -> Gate:
    """Against the same recurrence of the same, already rounded, inputs in fp64. The call returns reads and states."""

    @functools.cache
    def wanted() -> Pair:
        exact = DeltaRuleInputs(*(x.cpu().double() for x in inputs))
        return token_loop(exact, start.cpu().double(), read_first)

    return Gate(lambda got: relative_rms(*zip(got, wanted(), strict=True)), tolerance)


def moved(inputs: tuple[Tensor, ...], start: Tensor, out: Tensor) -> Work:
    """Every input once, the reads once, the states in and out."""
    return Work(sum(x.nbytes for x in inputs) + out.nbytes + 2 * start.nbytes, 10 * out.numel() * start.shape[-1])


def torch_loop(case: Case, inputs: DeltaRuleInputs, start: Tensor) -> Variant:
    return Variant(
        "torch token loop",
        lambda: token_loop(inputs, start),
        gate(inputs, start, 1e-5),
        moved(inputs, start, inputs.q),
        baseline=True,
        note="inputs activated, states not paged",
    )


def official_scan(case: Case, inputs: DeltaRuleInputs, start: Tensor, setup: Setup) -> list[Variant]:
    """The Triton kernel of declare-lab/delta-Mem, which has one state head: heads go into its batch."""
    if not setup.gpu:
        raise ImportError("its kernel needs a GPU")
    if setup.official is None:
        raise ImportError("give a checkout of declare-lab/delta-Mem with --official or MEM_TRITON_OFFICIAL")
    scan = load_official(setup.official).triton_affine_scan
    dtype, heads = case.torch_dtype, inputs.q.shape[2]
    rounded = DeltaRuleInputs(*(x.to(dtype).transpose(1, 2).flatten(0, 1).contiguous() for x in inputs))  # [B*H, T, r]
    state = start.to(dtype).flatten(0, 1)

    def unfolded(got: Pair) -> Pair:
        final, reads = got
        return reads.unflatten(0, (-1, heads)).transpose(1, 2), final.unflatten(0, (-1, heads))

    its = DeltaRuleInputs(*(x.unflatten(0, (-1, heads)).transpose(1, 2) for x in rounded))
    judge = gate(its, state.unflatten(0, (-1, heads)), ROUNDED[case.dtype])
    return [
        Variant(
            "official scan",
            lambda: scan(state, *rounded),
            Gate(lambda got: judge.error(unfolded(got)), judge.tolerance),
            moved(rounded, state, rounded.q),
            baseline=True,
            note=f"inputs activated, states not paged, reads and states in {case.dtype}; writes every token's state",
        )
    ]


@functools.cache
def load_official(folder: Path) -> ModuleType:
    """Its one file of kernels, without the package around it."""
    path = folder / "deltamem" / "kernels" / "affine_scan.py"
    if not path.is_file():
        raise ImportError(f"{path} is not there; --official takes a checkout of declare-lab/delta-Mem")
    spec = importlib.util.spec_from_file_location("official_affine_scan", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


def fla_kernels(case: Case, inputs: DeltaRuleInputs, start: Tensor, setup: Setup) -> list[Variant]:
    """flash-linear-attention's gated delta rule. It decays first, erases from what is left, and reads after the update;
    with (keep, erase, write) = (λ, λβ, β) it is one of ours but for the order of reading."""
    if not setup.gpu:
        raise ImportError("its kernels need a GPU")
    makers = [fla_recurrent, fla_chunk] if inputs.q.shape[1] >= CHUNK else [fla_recurrent]
    return [make(case, inputs, start) for make in makers]


def fla_recurrent(case: Case, inputs: DeltaRuleInputs, start: Tensor) -> Variant:
    """Gates per row, as ours."""
    from fla.ops.gated_delta_rule import fused_recurrent_gated_delta_rule

    q, k, v = (x.to(case.torch_dtype).contiguous() for x in inputs[:3])
    decay, beta = inputs.keep.log().contiguous(), inputs.write.contiguous()
    its = DeltaRuleInputs(q, k, v, decay.exp(), decay.exp() * beta, beta)
    return Variant(
        "fla fused_recurrent",
        lambda: fused_recurrent_gated_delta_rule(
            q, k, v, gv=decay, beta=beta, scale=1.0, initial_state=start, output_final_state=True, state_v_first=True
        ),
        gate(its, start, ROUNDED[case.dtype], read_first=False),
        moved((q, k, v, decay, beta), start, v),
        baseline=True,
        note="reads after the update, erases from the decayed state; inputs activated, states not paged",
    )


def fla_chunk(case: Case, inputs: DeltaRuleInputs, start: Tensor) -> Variant:
    """One gate per head, that of the head's first row: all it can do. Its products are 16-bit or TF32."""
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    q, k, v = (x.to(case.torch_dtype).contiguous() for x in inputs[:3])
    decay, beta = inputs.keep[..., 0].log().contiguous(), inputs.write[..., 0].contiguous()
    keep, write = decay.exp().unsqueeze(-1).expand_as(v), beta.unsqueeze(-1).expand_as(v)
    its = DeltaRuleInputs(q, k, v, keep, keep * write, write)
    call: Callable[[], Pair] = lambda: chunk_gated_delta_rule(  # noqa: E731
        q, k, v, g=decay, beta=beta, scale=1.0, initial_state=start, output_final_state=True, state_v_first=True
    )
    return Variant(
        "fla chunk",
        call,
        gate(its, start, 2e-2, read_first=False),
        moved((q, k, v, decay, beta), start, v),
        baseline=True,
        note="one gate a head; reads after the update, erases from the decayed state; inputs activated, not paged",
    )
