"""A random batch for ``memory_attention``, the fp64 oracle of its outputs, and how far rounding may carry them off.

Whatever the op must not read is poison: NaN in the tails of blocks and pages and in everything unused, and indices far
outside in the unused columns of the tables.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from mem_triton.ops.memory_attention import (
    FOREVER,
    AttentionCall,
    MemoryPages,
    MemoryTable,
    PagedContext,
    SharedSegment,
    reference,
)

NAN, FAR = float("nan"), 1 << 28
FP8, INT8 = torch.float8_e4m3fn, torch.int8
Page = tuple[int, int, int]  # tokens filled, first query position that sees them, first that no longer does


@dataclass
class AttentionCase:
    """The op's arguments. ``out`` and ``lse`` start as NaN, so that a token nobody wrote shows."""

    query: Tensor
    context: PagedContext
    out: Tensor
    lse: Tensor
    scale: float
    row_slot: Tensor | None = None
    pages: MemoryPages | None = None
    table: MemoryTable | None = None
    shared: SharedSegment | None = None
    soft_cap: float = 0.0
    sinks: Tensor | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    def call(self, **changes: Any) -> AttentionCall:
        """What op, kernels and reference take."""
        return AttentionCall(**{name: getattr(self, name) for name in AttentionCall._fields[:-1]})._replace(**changes)

    def memory_call(self, out: Tensor | None = None, lse: Tensor | None = None, **changes: Any) -> AttentionCall:
        """The same of memory alone: another kernel attends the context, and has the sinks."""
        rows = PagedContext.elsewhere(*self.context[3:6])
        return self.call(context=rows, sinks=None, out=out, lse=lse, **changes)

    def fresh(self) -> AttentionCase:
        """The same inputs with outputs of its own."""
        return replace(self, out=torch.full_like(self.out, NAN), lse=torch.full_like(self.lse, NAN))

    def without_memory(self) -> AttentionCase:
        return replace(self.fresh(), row_slot=None, pages=None, table=None, shared=None)


def moved(value: Any, device: str) -> Any:
    """Tensors, and tuples of them, on another device with their strides."""
    if isinstance(value, Tensor):
        place = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)
        return place.copy_(value)
    if isinstance(value, tuple):
        return type(value)(*(moved(x, device) for x in value))
    return value


def to_device(case: AttentionCase, device: str = "cuda") -> AttentionCase:
    names = ("query", "context", "out", "lse", "row_slot", "pages", "table", "shared", "sinks")
    return replace(case, **{name: moved(getattr(case, name), device) for name in names})


def make_case(
    rows: list[tuple[int, int]],
    *,
    heads: tuple[int, int] = (4, 2),
    size: int = 32,
    block_size: int = 16,
    memories: list[list[Page] | None] | None = None,
    page_size: int = 8,
    page_dtype: torch.dtype | None = None,
    bias: bool = False,
    shared: int = 0,
    shared_range: list[tuple[int, int]] | None = None,
    shared_bias: float = 0.0,
    soft_cap: float = 0.0,
    sinks: bool = False,
    dtype: torch.dtype = torch.float32,
    layout: str = "packed",
    padding_tokens: int = 0,
    spread: float = 1.0,
    seed: int = 0,
) -> AttentionCase:
    """Rows of (queries, tokens computed before) on shuffled blocks.

    memories: pages of each row's slot, None = the row has no slot (-1); without it the op gets no memory at all.
    shared: tokens of the shared segment, seen by the positions ``shared_range`` of each row with a slot.
    layout: of the KV cache: "packed" (vLLM's [blocks, Hkv, N, 2D]), "tokens_first" or "heads_first".
    """
    g = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=g) * spread  # noqa: E731
    hq, hkv = heads
    total = sum(q for q, _ in rows) + padding_tokens
    query = normal(total, hq, size + 3)[..., :size].to(dtype)  # strides of its own
    case = AttentionCase(
        query=query,
        context=_make_context(rows, hkv, size, block_size, layout, dtype, normal, g),
        out=torch.full((total, hq, size + 1), NAN, dtype=dtype)[..., :size],
        lse=torch.full((total, hq), NAN),
        scale=size**-0.5,
        soft_cap=soft_cap,
        sinks=normal(hq) if sinks else None,
    )
    if memories is None:
        return case
    slots = torch.randperm(len(rows) + 2, generator=g).int()[: len(rows)]
    for row, pages in enumerate(memories):
        if pages is None:
            slots[row] = -1
    case.row_slot = slots
    case.pages, case.table = _make_pages(memories, slots, hkv, size, page_size, page_dtype or dtype, bias, normal, g)
    if shared:
        case.shared = _make_shared(
            shared,
            shared_range or [(0, FOREVER)] * len(rows),
            slots,
            hkv,
            size,
            page_dtype or dtype,
            shared_bias,
            normal,
        )
    return case


def _make_context(rows, hkv, size, block_size, layout, dtype, normal, g) -> PagedContext:
    lengths = [q + c if q else 0 for q, c in rows]
    needed = [-(-n // block_size) for n in lengths]
    blocks = torch.randperm(sum(needed) + 2, generator=g).int()
    table = torch.full((len(rows), max([*needed, 1]) + 1), FAR, dtype=torch.int32)
    shape = (len(blocks), hkv, block_size, size)
    if layout == "packed":
        cache = torch.full((*shape[:3], 2 * size), NAN, dtype=dtype)
        keys, values = cache.split(size, dim=-1)
    else:
        order = (0, 2, 1, 3) if layout == "tokens_first" else (1, 0, 2, 3)
        keys, values = (torch.full([shape[i] for i in order], NAN, dtype=dtype).permute(order) for _ in range(2))
    at = 0
    for row, (count, length) in enumerate(zip(needed, lengths, strict=True)):
        table[row, :count] = blocks[at : at + count]
        at += count
        for i in range(count):
            live = min(block_size, length - i * block_size)
            for cache in (keys, values):
                cache[int(table[row, i]), :, :live] = normal(hkv, live, size).to(dtype)
    return PagedContext(
        keys,
        values,
        table,
        torch.tensor([0, *(q for q, _ in rows)]).cumsum(0).int(),
        torch.tensor([q + c for q, c in rows], dtype=torch.int32),
        max([q for q, _ in rows] + [1]),
    )


def _make_pages(memories, slots, hkv, size, page_size, dtype, bias, normal, g) -> tuple[MemoryPages, MemoryTable]:
    count = sum(len(m or ()) for m in memories)
    widest, slot_count = max([len(m or ()) for m in memories] + [1]), len(memories) + 2
    ids = torch.randperm(count + 2, generator=g).int()
    data = [torch.full((count + 2, hkv, page_size, size), NAN) for _ in range(2)]
    shape = (slot_count, widest + 1)
    columns = {name: torch.full(shape, FAR, dtype=torch.int32) for name in ("page", "tokens", "first", "end")}
    used = torch.zeros(slot_count, dtype=torch.int32)
    worth = torch.full(shape, NAN) if bias else None
    at = 0
    for slot, pages in zip(slots.tolist(), memories, strict=True):
        for m, (tokens, first, end) in enumerate(pages or ()):
            for name, value in (("page", ids[at]), ("tokens", tokens), ("first", first), ("end", end)):
                columns[name][slot, m] = value
            for x in data:
                x[int(ids[at]), :, :tokens] = normal(hkv, tokens, size)
            if bias:
                worth[slot, m] = normal(1)
            used[slot] += 1
            at += 1
    return MemoryPages(*_store(*data, dtype)), MemoryTable(**columns, count=used, bias=worth)


def _make_shared(tokens, ranges, slots, hkv, size, dtype, bias, normal) -> SharedSegment:
    first, end = (torch.zeros(len(slots) + 2, dtype=torch.int32) for _ in range(2))
    for slot, (begin, stop) in zip(slots.tolist(), ranges, strict=True):
        if slot >= 0:
            first[slot], end[slot] = begin, stop
    keys, values, key_scale, value_scale = _store(normal(hkv, tokens, size), normal(hkv, tokens, size), dtype)
    return SharedSegment(keys, values, first, end, key_scale, value_scale, bias)


def _store(keys: Tensor, values: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Keys and values as the pool keeps them, side by side in one tensor, with scales for 8-bit data."""
    key_scale = value_scale = None
    if dtype in (INT8, FP8):
        largest = 127.0 if dtype == INT8 else 448.0
        key_scale = keys.nan_to_num().abs().amax(-2).clamp_min(1e-4) / largest
        value_scale = values.nan_to_num().abs().amax(-1).clamp_min(1e-4) / largest
        keys, values = keys / key_scale.unsqueeze(-2), values / value_scale.unsqueeze(-1)
        if dtype == INT8:
            keys, values = keys.nan_to_num(77.0).round(), values.nan_to_num(-77.0).round()
    both = torch.cat([keys, values], -1).to(dtype)
    return *both.split(keys.shape[-1], dim=-1), key_scale, value_scale


@dataclass
class Expected:
    """The oracle's output and LSE, and the largest error that rounding explains, element by element; all fp64."""

    out: Tensor
    lse: Tensor
    out_budget: Tensor
    lse_budget: Tensor


def expected(case: AttentionCase) -> Expected:
    """One softmax in fp64, and an error budget from this very data.

    With u the unit roundoffs (logits and sums in fp32, weights and 8-bit keys in the type of the query, output in its
    own) and a the largest |q||k| scale: a logit is off by some (2 u32 + u_key) a (errors of a sum add up like
    a random walk), a weight by twice that and its own rounding, so the output by that share of sum p |v|.
    """
    out, lse = reference.memory_attention(case.call())
    absolute = {"context": case.context, "pages": case.pages, "shared": case.shared}
    for name, read in absolute.items():
        absolute[name] = None if read is None else read._replace(values=_magnitude(read.values))
    mass, _ = reference.memory_attention(case.call(**absolute))
    unit = torch.finfo(case.query.dtype).eps / 2
    single, rounded_keys = 2.0**-24, unit if _memory_dtype(case) not in (None, case.query.dtype) else 0.0
    largest = case.scale * case.query.double().norm(dim=-1) * _longest_key(case)  # [T, Hq]
    logit = (2 * single + rounded_keys) * largest + 8 * single
    weight = 2 * logit + (0.0 if case.query.dtype == torch.float32 else 2 * unit) + 16 * single
    budget = weight.unsqueeze(-1) * mass + unit * out.abs()
    return Expected(out, lse, budget, logit + single * (lse.abs() + 16))


def _magnitude(data: Tensor) -> Tensor:
    return data.double().abs().to(data.dtype) if data.dtype != INT8 else data.abs()


def _memory_dtype(case: AttentionCase) -> torch.dtype | None:
    return next((x.keys.dtype for x in (case.pages, case.shared) if x is not None), None)


def _longest_key(case: AttentionCase) -> float:
    lengths = [case.context.keys.double().norm(dim=-1).nan_to_num().max()]
    for segment in (case.pages, case.shared):
        if segment is not None:
            keys = reference.dequantise(segment.keys, segment.key_scale, torch.float64, -2)
            lengths.append(keys.norm(dim=-1).nan_to_num().max())
    return float(max(lengths))


def assert_matches(case: AttentionCase, want: Expected | None = None) -> None:
    """Outputs within the budget of the oracle; tokens of no row still NaN; nothing else NaN."""
    want = want or expected(case)
    for name, got, wanted, budget in (
        ("out", case.out, want.out, want.out_budget),
        ("lse", case.lse, want.lse, want.lse_budget),
    ):
        nobody = wanted.isnan()
        assert torch.equal(got.isnan(), nobody), f"{name}: {int((got.isnan() != nobody).sum())} elements NaN or written"
        error = (got.double() - wanted).abs()[~nobody]
        allowed = budget[~nobody]
        over = (error > allowed).sum()
        assert not over, f"{name}: {over} of {error.numel()} off, worst {float((error / allowed).max()):.2f} budgets"


def random_case(pick: random.Random) -> AttentionCase:
    """Any batch, from a seed: rows of all kinds, every layout, dtype and option."""
    rows = [
        (pick.choice([0, 1, 1, 1, 2, 5, 23]), pick.choice([0, 1, 7, 15, 16, 40])) for _ in range(pick.randint(1, 5))
    ]
    page_size = pick.choice([8, 16, 21])

    def page() -> Page:
        first = pick.choice([0, 0, 0, 3, 20])
        return pick.randint(1, page_size), first, pick.choice([FOREVER, FOREVER, first + 5, 17])

    def memory() -> list[Page] | None:
        return None if pick.random() < 0.3 else [page() for _ in range(pick.randint(0, 5))]

    dtype = pick.choice([torch.float32, torch.float32, torch.bfloat16, torch.float16])
    group = pick.choice([1, 2, 3, 8])
    case = make_case(
        rows,
        heads=(2 * group, 2),
        size=pick.choice([32, 48, 64, 80]),
        block_size=pick.choice([8, 16, 24]),
        memories=None if pick.random() < 0.1 else [memory() for _ in rows],
        page_size=page_size,
        page_dtype=pick.choice([None, None, torch.float32, INT8, FP8]),
        bias=pick.random() < 0.3,
        shared=pick.choice([0, 0, 1, 30]),
        shared_range=[pick.choice([(0, FOREVER), (0, 0), (4, 18)]) for _ in rows],
        shared_bias=pick.choice([0.0, -1.5]),
        soft_cap=pick.choice([0.0, 0.0, 2.0]),
        sinks=pick.random() < 0.3,
        dtype=dtype,
        layout=pick.choice(["packed", "tokens_first", "heads_first"]),
        padding_tokens=pick.choice([0, 3]),
        seed=pick.randint(0, 1000),
    )
    if case.shared is not None and pick.random() < 0.3:  # a layer without pages
        return replace(case, pages=None, table=None)
    return case


def in_order(
    case: AttentionCase, order: list[int | None], padding: int
) -> tuple[AttentionCase, list[tuple[slice, slice]]]:
    """The rows of ``case`` in another order, None = a padding row; and which tokens of it are which of ``case``."""
    starts = case.context.query_start_loc.tolist()
    lengths = [0 if n is None else starts[n + 1] - starts[n] for n in order]
    tokens = [torch.arange(starts[n], starts[n + 1]) for n in order if n is not None]
    tail = case.query.new_full((padding, *case.query.shape[1:]), NAN)
    rows = [-1 if n is None else n for n in order]
    query = torch.cat([case.query[torch.cat(tokens)], tail])
    begins = torch.tensor([0, *lengths]).cumsum(0)
    other = replace(
        case,
        query=query,
        out=torch.full(query.shape, NAN, dtype=query.dtype),
        lse=torch.full(query.shape[:2], NAN),
        row_slot=None if case.row_slot is None else case.row_slot[rows],
        context=case.context._replace(
            block_table=case.context.block_table[rows],
            seq_lens=case.context.seq_lens[rows],
            query_start_loc=begins.int(),
        ),
    )
    places = [
        (slice(begins[i], begins[i + 1]), slice(starts[n], starts[n + 1])) for i, n in enumerate(order) if n is not None
    ]
    return other, places
