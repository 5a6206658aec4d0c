"""A random batch for ``attention_inputs``, and the fp64 oracle of what the op must leave behind."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mem_triton.ops.attention_inputs import HeadInputs, attention_inputs_reference
from mem_triton.ops.delta_rule import DeltaRuleSpec, StateBatch
from tests.ops.paged_case import PagedCase, assert_matches, expected, make_case, relative_rms

TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}  # of one rounding to the dtype


@dataclass
class InputsCase:
    """The op's arguments. ``tail``: columns behind q | k | v, which nothing may touch."""

    states: PagedCase
    projected: Tensor  # [T, q + k + v + tail + P]
    rounded: Tensor  # [T + 1, H*r], NaN
    inputs: HeadInputs

    @property
    def projections(self) -> Tensor:
        return self.projected[:, -self.states.spec.projection_width :]

    def batch(self) -> StateBatch:
        return self.states.batch()

    def clone(self) -> InputsCase:
        return replace(self, states=self.states.clone(), projected=self.projected.clone(), rounded=self.rounded.clone())

    def to(self, device: str) -> InputsCase:
        tensors = {name: x.to(device) for name, x in vars(self.inputs).items() if isinstance(x, Tensor)}
        inputs = replace(self.inputs, **tensors)
        return InputsCase(self.states.to(device), self.projected.to(device), self.rounded.to(device), inputs)


def make_inputs(
    spec: DeltaRuleSpec,
    queries: list[int],
    computed: list[int],
    *,
    heads: tuple[int, int, int] = (4, 2, 16),
    corrects: str = "q",
    norms: bool = True,
    rotated: int = 16,
    interleaved: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **options,
) -> InputsCase:
    """heads: query heads, KV heads, head size. rotated: channels of RoPE, 0 = none. options: of ``make_case``."""
    states = make_case(spec, queries, computed, dtype=dtype, seed=seed, **options)
    g = torch.Generator().manual_seed(seed + 1)
    random = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    hq, hkv, size = heads
    angles = random(int(states.seq_lens.max()) + 1, rotated // 2) * 3
    inputs = HeadInputs(
        hq,
        hkv,
        size,
        corrects=corrects,
        eps=1e-5,
        interleaved=interleaved,
        q_norm=(1 + random(size) / 4).to(dtype) if norms else None,
        k_norm=(1 + random(size) / 4).to(dtype) if norms else None,
        cos_sin=torch.cat([angles.cos(), angles.sin()], 1).to(dtype) if rotated else None,
    )
    rows = sum(inputs.part(letter)[1] for letter in corrects) * size
    inputs = replace(inputs, delta=random(rows, spec.read_width).to(dtype) if rows else None)
    qkv = random(len(states.projections), inputs.width + 3).to(dtype)
    rounded = torch.full((len(qkv) + 1, spec.read_width), float("nan"), dtype=dtype)
    return InputsCase(states, torch.cat([qkv, states.projections], dim=1), rounded, inputs)


def assert_inputs_match(after: InputsCase, before: InputsCase, tolerance: float = 2e-6) -> None:
    """Reads, states and q | k | v agree with the oracle; what the op may not write is bit-equal to before."""
    want = expected(replace(before.states, projections=before.projections))
    unchanged = replace(after.states, projections=before.states.projections)
    assert torch.equal(after.projections, before.projections), "the projections are an input and changed"
    assert_matches(unchanged, before.states, want, tolerance)
    live, width = int(before.states.query_start_loc[-1]), before.inputs.width
    assert torch.equal(after.rounded[:live], after.states.reads[:live].to(after.rounded.dtype))
    assert after.rounded[live:].isnan().all(), "a read of nobody was written"
    positions = []
    for begin, end, length in zip(
        before.states.query_start_loc[:-1].tolist(),
        before.states.query_start_loc[1:].tolist(),
        before.states.seq_lens.tolist(),
        strict=True,
    ):
        positions += range(length - (end - begin), length)
    exact = attention_inputs_reference(
        before.projected[:live, :width].double(), want.reads[:live], torch.tensor(positions).long(), before.inputs
    )
    assert not live or relative_rms(after.projected[:live, :width], exact) <= TOLERANCE[before.projected.dtype]
    first, count = before.inputs.touched()
    size = before.inputs.head_dim
    still = torch.ones(before.projected.shape, dtype=torch.bool)
    still[:live, first * size : (first + count) * size] = False
    assert torch.equal(after.projected[still], before.projected[still]), "a column of nobody changed"
