"""Device functions on rows of states, as the kernels for chunks keep them.

A row is a tuple of RANK tensors, [lanes] each: a lane has a state row of its own, or the image of a basis vector.
"""

import triton
import triton.language as tl


@triton.jit
def load_row(pointer, mask, RANK: tl.constexpr):
    """RANK consecutive floats of each pointer; 0 where the mask is False."""
    row = (tl.load(pointer, mask=mask, other=0.0),)
    for d in tl.static_range(1, RANK):
        row = row + (tl.load(pointer + d, mask=mask, other=0.0),)
    return row


@triton.jit
def store_row(pointer, row, mask, RANK: tl.constexpr):
    for d in tl.static_range(RANK):
        tl.store(pointer + d, row[d], mask=mask)


@triton.jit
def filled(value, LANES: tl.constexpr, RANK: tl.constexpr):
    """Rows that hold ``value`` everywhere."""
    row = (tl.full([LANES], value, tl.float32),)
    for _ in tl.static_range(1, RANK):
        row = row + (tl.full([LANES], value, tl.float32),)
    return row


@triton.jit
def unit_rows(basis, RANK: tl.constexpr):
    """Each lane's basis vector."""
    row = ((basis == 0).to(tl.float32),)
    for d in tl.static_range(1, RANK):
        row = row + ((basis == d).to(tl.float32),)
    return row


@triton.jit
def chosen(condition, row, other, RANK: tl.constexpr):
    """``row`` where the condition holds, ``other`` elsewhere."""
    found = (tl.where(condition, row[0], other[0]),)
    for d in tl.static_range(1, RANK):
        found = found + (tl.where(condition, row[d], other[d]),)
    return found


@triton.jit
def dot(row, other, RANK: tl.constexpr):
    total = row[0] * other[0]
    for d in tl.static_range(1, RANK):
        total += row[d] * other[d]
    return total


@triton.jit
def step(row, k, keep, erase, push, RANK: tl.constexpr):
    """Rows after a token: keep s + (push - erase (s · k)) k."""
    change = push - erase * dot(row, k, RANK)
    after = (keep * row[0] + change * k[0],)
    for d in tl.static_range(1, RANK):
        after = after + (keep * row[d] + change * k[d],)
    return after


@triton.jit
def columns_of(table, RANK: tl.constexpr):
    """Rows of [lanes, RANK]."""
    column = tl.arange(0, RANK)[None, :]
    row = (tl.sum(tl.where(column == 0, table, 0.0), axis=1),)
    for d in tl.static_range(1, RANK):
        row = row + (tl.sum(tl.where(column == d, table, 0.0), axis=1),)
    return row
