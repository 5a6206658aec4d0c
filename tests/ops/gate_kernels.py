"""Kernels that the gates of ``tests/support/aot.py`` are tried on."""

import triton
import triton.language as tl


@triton.jit
def sum_rows(
    x,
    table,
    out,
    rows,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    TWICE: tl.constexpr,
    STEPS: tl.constexpr,
):
    """out[0] = sum of x[table[i // 4]] over i < rows, SIZE channels as WIDTH lanes. TWICE: reads all of it
    again. STEPS: turns of an inner loop whose length the compiler knows."""
    channel = tl.arange(0, WIDTH)
    total = tl.zeros([WIDTH], tl.float32)
    for start in range(0, rows, TILE):
        token = start + tl.arange(0, TILE)
        place = tl.load(table + token // 4, mask=token < rows, other=0)
        for step in range(STEPS):
            at = x + (place * STEPS + step)[:, None] * SIZE + channel[None, :]
            mask = (token < rows)[:, None] & (channel < SIZE)[None, :]
            total += tl.sum(tl.load(at, mask=mask, other=0.0).to(tl.float32), 0)
            if TWICE:
                tl.debug_barrier()  # else the compiler makes one of the two
                total += tl.sum(tl.load(at, mask=mask, other=0.0, volatile=True).to(tl.float32), 0)
    tl.store(out + channel, total, mask=channel < SIZE)
