"""A random batch for ``delta_rule_paged`` and the fp64 oracle of what the op must leave behind."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from mem_triton.ops.delta_rule import DeltaRuleSpec, StateBatch, activate, delta_rule

TENSORS = ("projections", "reads", *StateBatch._fields)


@dataclass
class PagedCase:
    """The op's arguments. ``reads`` starts as NaN, so that a token nobody wrote shows."""

    spec: DeltaRuleSpec
    projections: Tensor
    gate_bias: Tensor
    reads: Tensor
    state_cache: Tensor
    block_table: Tensor
    query_start_loc: Tensor
    seq_lens: Tensor
    initial_states: Tensor | None
    initial_slot: Tensor | None
    write_enabled: Tensor | None
    last_states: Tensor | None
    block_size: int
    tokens_per_state: int
    max_query_len: int
    extra: dict = field(default_factory=dict)

    def tensors(self) -> dict[str, Tensor | None]:
        return {name: getattr(self, name) for name in TENSORS}

    def batch(self) -> StateBatch:
        return StateBatch(**{name: getattr(self, name) for name in StateBatch._fields})

    def arguments(self) -> tuple[Tensor, Tensor, StateBatch, DeltaRuleSpec]:
        """The op's positional ones."""
        return self.projections, self.reads, self.batch(), self.spec

    def options(self) -> dict[str, int]:
        return {
            "block_size": self.block_size,
            "tokens_per_state": self.tokens_per_state,
            "max_query_len": self.max_query_len,
        }

    def clone(self) -> PagedCase:
        copies = {name: t.clone() for name, t in self.tensors().items() if t is not None}
        return replace(self, **copies)

    def to(self, device: str) -> PagedCase:
        return replace(self, **{name: t.to(device) for name, t in self.tensors().items() if t is not None})


def make_case(
    spec: DeltaRuleSpec,
    queries: list[int],
    computed: list[int],
    *,
    block_size: int = 8,
    tokens_per_state: int = 4,
    slots: list[int] | None = None,
    writes: list[int] | None = None,
    padding_tokens: int = 0,
    dtype: torch.dtype = torch.float32,
    scale: float = 1.0,
    seed: int = 0,
    null_rows: tuple[int, ...] = (),
) -> PagedCase:
    """Rows with ``queries[n]`` new tokens behind ``computed[n]`` old ones, on shuffled blocks with spare ones between.

    slots: session slot per row (-1 = none), None = the op gets no slot tables. null_rows: rows whose blocks are all 0.
    """
    g = torch.Generator().manual_seed(seed)
    rows, total = len(queries), sum(queries) + padding_tokens
    lengths = [c + q for c, q in zip(computed, queries, strict=True)]
    needed = [-(-n // block_size) for n in lengths]
    blocks = torch.randperm(sum(needed) + 3, generator=g) + 1  # never the null block
    table = torch.zeros(rows, max([*needed, 1]), dtype=torch.int32)
    at = 0
    for row, count in enumerate(needed):
        if row not in null_rows:
            table[row, :count] = blocks[at : at + count].int()
        at += count
    size, sessions = spec.state_size, 4
    random = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    return PagedCase(
        spec=spec,
        projections=(random(total, spec.projection_width) * scale).to(dtype),
        gate_bias=random(spec.bias_width) * 0.5 - 1,
        reads=torch.full((total + 2, spec.read_width), float("nan")),
        state_cache=random(len(blocks) + 1, block_size // tokens_per_state, size),
        block_table=table,
        query_start_loc=torch.tensor([0, *queries]).cumsum(0).int(),
        seq_lens=torch.tensor(lengths, dtype=torch.int32).reshape(rows),
        initial_states=None if slots is None else random(sessions, size),
        initial_slot=None if slots is None else torch.tensor(slots, dtype=torch.int32),
        write_enabled=None if writes is None else torch.tensor(writes, dtype=torch.int32),
        last_states=None if slots is None else random(sessions, 2, size),
        block_size=block_size,
        tokens_per_state=tokens_per_state,
        max_query_len=max([*queries, 1]),
    )


@dataclass
class Expected:
    """What the op must leave: values in fp64, and which elements it may have written at all."""

    reads: Tensor
    state_cache: Tensor
    last_states: Tensor | None
    touched_cells: Tensor  # bool [blocks, cells]
    touched_ring: Tensor | None  # bool [S, 2]


def expected(case: PagedCase) -> Expected:
    """The contract, token by token, in fp64, straight from ``reference.delta_rule``."""
    spec, shape = case.spec, (case.spec.heads, case.spec.rank, case.spec.rank)
    reads, cache = case.reads.double(), case.state_cache.double()
    last = None if case.last_states is None else case.last_states.double()
    touched = torch.zeros(cache.shape[:2], dtype=torch.bool)
    ring = None if last is None else torch.zeros(last.shape[:2], dtype=torch.bool)
    starts = case.query_start_loc.tolist()
    for row, length in enumerate(case.seq_lens.tolist()):
        begin, end = starts[row], starts[row + 1]
        if begin == end:
            continue
        computed = length - (end - begin)
        slot = -1 if case.initial_slot is None else int(case.initial_slot[row])

        def cell(position: int, row: int = row) -> tuple[int, int]:
            block = int(case.block_table[row, position // case.block_size])
            return block, position % case.block_size // case.tokens_per_state

        if computed:
            block, index = cell(computed - 1)
            state = cache[block, index].clone() if block else torch.zeros_like(cache[0, 0])
        else:
            state = case.initial_states[slot].double() if slot >= 0 else torch.zeros_like(cache[0, 0])
        mask = None
        inputs = activate(case.projections[begin:end].double(), case.gate_bias.double(), spec, mask)
        if case.write_enabled is not None and not case.write_enabled[row]:
            one, zero = torch.ones_like(inputs.keep), torch.zeros_like(inputs.keep)
            inputs = inputs._replace(keep=one, erase=zero, write=zero)
        seen, final, states = delta_rule(inputs, state.view(1, *shape), snapshot_every=1)
        reads[begin:end] = seen.flatten(1)
        for i in range(end - begin):
            position = computed + i
            if (position + 1) % case.tokens_per_state == 0 or i == end - begin - 1:
                block, index = cell(position)
                if block:
                    cache[block, index] = states[0][i].flatten()
                    touched[block, index] = True
        if slot >= 0 and last is not None:
            last[slot, (length - 1) % 2] = final.flatten()
            ring[slot, (length - 1) % 2] = True
    return Expected(reads, cache, last, touched, ring)


def relative_rms(actual: Tensor, wanted: Tensor) -> float:
    """RMS of the difference over RMS of the wanted values; NaN if ``actual`` has NaN where ``wanted`` has none."""
    return float((actual.double() - wanted).square().mean().sqrt() / wanted.square().mean().sqrt().clamp_min(1e-30))


def assert_matches(after: PagedCase, before: PagedCase, want: Expected, tolerance: float = 2e-6) -> None:
    """Reads, cells and ring agree with the oracle; every element that the op may not write is bit-equal to before."""
    live = int(before.query_start_loc[-1])
    if live:
        assert relative_rms(after.reads[:live], want.reads[:live]) <= tolerance
    cells = want.touched_cells
    if cells.any():
        assert relative_rms(after.state_cache[cells], want.state_cache[cells]) <= tolerance
    assert torch.equal(after.state_cache[~cells], before.state_cache[~cells]), "a foreign cell changed"
    if want.last_states is not None:
        ring = want.touched_ring
        if ring.any():
            assert relative_rms(after.last_states[ring], want.last_states[ring]) <= tolerance
        assert torch.equal(after.last_states[~ring], before.last_states[~ring]), "a ring entry of no row changed"
    unchanged = {name for name in TENSORS if name not in ("reads", "state_cache", "last_states")}
    for name in unchanged:
        if getattr(before, name) is not None:
            assert torch.equal(getattr(after, name), getattr(before, name)), f"{name} is an input and changed"
