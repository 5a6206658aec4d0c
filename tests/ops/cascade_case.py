"""The fp64 oracle of attention over memory alone, and of what a merge into a context's softmax must leave."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from mem_triton.ops.memory_attention import reference
from tests.ops.attention_case import AttentionCase, Expected


def memory_expected(case: AttentionCase, *, pages: bool = True, shared: bool = True) -> Expected:
    """Attention of every token, padding included, to its memory; 0 and -inf without any.

    The budget is that of ``attention_case.expected``, from the same unit roundoffs: logits and sums in fp32, weights
    and the products' operands in the query's type.
    """
    case = replace(case, pages=case.pages if pages else None, shared=case.shared if shared else None)
    tokens, heads, size = case.query.shape
    want = Expected(
        torch.zeros(tokens, heads, size, dtype=torch.float64),
        torch.full((tokens, heads), -torch.inf, dtype=torch.float64),
        torch.zeros(tokens, heads, size, dtype=torch.float64),
        torch.zeros(tokens, heads, dtype=torch.float64),
    )
    query = case.query.double()
    unit, single = torch.finfo(case.query.dtype).eps / 2, 2.0**-24
    for token, slot, position in visible_tokens(case):
        parts = reference.read_memory(slot, position, case.pages, case.table, case.shared, torch.float64)
        parts = [part for part in parts if part[0].shape[1]]
        if not parts:
            continue
        want.out[token], want.lse[token] = reference.attend(query[token], parts, case.scale, case.soft_cap, None)
        absolute = [(keys, values.abs(), bias) for keys, values, bias in parts]
        mass, _ = reference.attend(query[token], absolute, case.scale, case.soft_cap, None)
        longest = max(float(keys.norm(dim=-1).max()) for keys, _, _ in parts)
        rounded = 0.0 if quantum(case) is None else unit  # 8-bit keys or queries, scaled and rounded
        logit = (2 * single + rounded) * case.scale * query[token].norm(dim=-1) * longest + 8 * single
        weight = 2 * logit + (0.0 if unit == single else 2 * unit) + 16 * single
        want.out_budget[token] = weight.unsqueeze(-1) * mass + unit * want.out[token].abs()
        want.lse_budget[token] = logit + single * (want.lse[token].abs() + 16)
    return want


def quantum(case: AttentionCase) -> torch.dtype | None:
    """The 8-bit type of the case's memory, if it has one."""
    kinds = {x.keys.dtype for x in (case.pages, case.shared) if x is not None} - {case.query.dtype}
    return next(iter(kinds), None)


def visible_tokens(case: AttentionCase) -> list[tuple[int, int, int]]:
    """(token, slot, position) of the tokens of rows that have a slot."""
    starts, lengths = case.context.query_start_loc.tolist(), case.context.seq_lens.tolist()
    found = []
    for row, slot in enumerate(case.row_slot.tolist()):
        count = starts[row + 1] - starts[row]
        if slot >= 0:
            found += [(starts[row] + i, slot, lengths[row] - count + i) for i in range(count)]
    return found


def merged(case: AttentionCase, out: Tensor, lse: Tensor, memory: Expected) -> Expected:
    """What is left of ``out`` and ``lse`` (taken as exact) when ``memory`` is merged into them.

    A share is off by the error of the memory's log-sum-exp and the exponentials' own, the sum is rounded once.
    """
    unit, single = torch.finfo(out.dtype).eps / 2, 2.0**-24
    before, old = lse.double().masked_fill(lse == torch.inf, -torch.inf), out.double()
    old = old.masked_fill((before == -torch.inf).unsqueeze(-1), 0)
    total = torch.logaddexp(before, memory.lse)
    keep, share = (torch.exp(x - total).nan_to_num(0).unsqueeze(-1) for x in (before, memory.lse))
    result = old * keep + memory.out * share
    off = (memory.lse_budget + 8 * single * (1 + total.nan_to_num(neginf=0).abs())).unsqueeze(-1)
    budget = memory.out_budget * share + off * keep * share * (old - memory.out).abs() * 2
    budget = budget + (16 * single + unit) * (old.abs() * keep + memory.out.abs() * share)
    untouched = (memory.lse == -torch.inf).unsqueeze(-1)
    return Expected(
        torch.where(untouched, out.double(), result),
        torch.where(untouched[..., 0], lse.double(), total),
        budget,
        memory.lse_budget + 8 * single * (1 + total.nan_to_num(neginf=0).abs()),
    )


def assert_close(out: Tensor, lse: Tensor, want: Expected, tokens: Tensor | slice = slice(None)) -> None:
    """Within the budget everywhere; infinities where they belong; NaN only where it is wanted."""
    for name, got, wanted, budget in (
        ("out", out, want.out, want.out_budget),
        ("lse", lse, want.lse, want.lse_budget),
    ):
        got, wanted, budget = got.double()[tokens], wanted[tokens], budget[tokens]
        same = (got == wanted) | (got.isnan() & wanted.isnan())
        error = torch.where(same, 0.0, (got - wanted).abs()).nan_to_num(nan=torch.inf)
        worst = torch.where(error > 0, error / budget, 0.0)
        over = ~(worst <= 1)
        assert not over.any(), f"{name}: {int(over.sum())} of {over.numel()} off, at worst {float(worst.max())} budgets"


def untouched_tokens(case: AttentionCase, memory: Expected) -> Tensor:
    """Tokens whose output no kernel of the cascade may change."""
    return (memory.lse == -torch.inf).all(1)


def assert_same_bits(before: Tensor, after: Tensor) -> None:
    kind = {2: torch.int16, 4: torch.int32}[before.element_size()]
    assert torch.equal(before.contiguous().view(kind), after.contiguous().view(kind))
