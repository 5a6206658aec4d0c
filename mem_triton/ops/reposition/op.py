"""``mem_triton::reposition_pages``: the keys of memory pages turned to their positions, as one torch.library op.

The op checks its tensors, then runs torch on the CPU (``reference``) or the Triton kernel on a GPU (``launch``).
"""

from __future__ import annotations

import torch
from torch import Tensor

from mem_triton.ops.common.checks import FLOATS, check_tensor
from mem_triton.ops.reposition.reference import move, rotate
from mem_triton.ops.reposition.rope import RotaryEmbedding

_SCHEMA = """reposition_pages(
    Tensor(a!) pool, Tensor positions, Tensor? page, Tensor? source, Tensor? source_page, Tensor? old_positions, *,
    int rotary_dim, float[] inv_freq, float attention_factor, bool interleaved) -> ()"""


def reposition_pages(
    pool: Tensor,
    positions: Tensor,
    rope: RotaryEmbedding,
    *,
    page: Tensor | None = None,
    source: Tensor | None = None,
    source_page: Tensor | None = None,
    old_positions: Tensor | None = None,
) -> None:
    """Turn the keys of n listed pages to ``positions``: on loading them into a pool, or where they lie.

    pool: [pages, Hkv, P, D] fp32, bf16 or fp16, any strides but the last, which is 1; written.
    positions: int32 [n, Hkv, P], of any sign.
    page: int32 [n], the pages to write, each at most once; a negative one is skipped. None = the first n.
    source: [S, Hkv, P, D], where the keys are read; must not overlap ``pool``. None = in place.
    source_page: int32 [n], the pages of ``source``; None = its first n.
    old_positions: int32 [n, Hkv, P], where the keys are now. None = before RoPE.

    One launch on a GPU, no host sync. ValueError names the tensor that does not fit. Example::

        reposition_pages(pool, positions, rope, page=pages, source=keys_before_rope)  # load references
        reposition_pages(pool, new, rope, page=pages, old_positions=old)              # move them
    """
    fields = {
        "rotary_dim": rope.rotary_dim,
        "inv_freq": rope.inv_freq,
        "attention_factor": rope.attention_factor,
        "interleaved": rope.interleaved,
    }
    tensors = (pool, positions, page, source, source_page, old_positions)
    # The op boundary is for tracers (torch.compile, fake tensors) only.
    if torch.compiler.is_compiling() or type(pool) is not Tensor:
        torch.ops.mem_triton.reposition_pages(*tensors, **fields)
    else:
        _run(*tensors, **fields)


def _run(pool, positions, page, source, source_page, old_positions, *, inv_freq, **fields) -> None:
    rope = RotaryEmbedding(inv_freq=tuple(inv_freq), **fields)
    check(pool, positions, page, source, source_page, old_positions, rope)
    if source is None:
        source, source_page = pool, page
    if pool.device.type == "cpu":
        _move_pages(pool, positions, page, source, source_page, old_positions, rope)
    else:
        from mem_triton.ops.reposition import launch  # Triton is there on Linux only

        launch.move_pages(pool, positions, page, source, source_page, old_positions, rope)


def _move_pages(
    pool: Tensor,
    positions: Tensor,
    page: Tensor | None,
    source: Tensor,
    source_page: Tensor | None,
    old_positions: Tensor | None,
    rope: RotaryEmbedding,
) -> None:
    """The op in torch: gather, turn, scatter."""
    everyone = torch.arange(len(positions), device=pool.device)
    target = everyone if page is None else page.long()
    origin = everyone if source_page is None else source_page.long()
    kept = target >= 0
    keys = source[origin[kept]].to(torch.promote_types(source.dtype, pool.dtype))  # rounded once, to the pool's dtype
    if old_positions is None:
        moved = rotate(keys, positions[kept], rope)
    else:
        moved = move(keys, old_positions[kept], positions[kept], rope)
    pool[target[kept]] = moved.to(pool.dtype)


def check(
    pool: Tensor,
    positions: Tensor,
    page: Tensor | None,
    source: Tensor | None,
    source_page: Tensor | None,
    old_positions: Tensor | None,
    rope: RotaryEmbedding,
) -> None:
    """Raise a ValueError that names the first tensor whose shape, dtype or layout the op cannot take."""
    if pool.dim() != 4:
        raise ValueError(f"pool: shape {tuple(pool.shape)}, expected [pages, Hkv, P, D]")
    listed, shape = positions.shape[0], tuple(pool.shape[1:])
    if rope.rotary_dim > shape[2]:
        raise ValueError(f"rope: turns {rope.rotary_dim} channels, the pool's heads have {shape[2]}")
    ints = (torch.int32,)
    for name, tensor, wanted, dtypes in (
        ("pool", pool, (None, *shape), FLOATS),
        ("source", source, (None, *shape), FLOATS),
        ("positions", positions, (listed, *shape[:2]), ints),
        ("old_positions", old_positions, (listed, *shape[:2]), ints),
        ("source_page", source_page, (listed,), ints),
        ("page", page, (listed,), ints),
    ):
        if tensor is not None:
            check_tensor(name, tensor, wanted, dtypes, ("pool", pool))
    if old_positions is not None and old_positions.stride() != positions.stride():
        raise ValueError(f"old_positions: strides {old_positions.stride()}, those of positions {positions.stride()}")
    if source is None and source_page is not None:
        raise ValueError("source_page: in place, without a source, a page can only be moved onto itself")
    for name, pages, tensor in (("page", page, pool), ("source_page", source_page, source)):
        if pages is None and tensor is not None and listed > len(tensor):
            raise ValueError(f"{name}: None lists the first {listed} pages, there are {len(tensor)}")


_LIBRARY = torch.library.Library("mem_triton", "FRAGMENT")
_LIBRARY.define(_SCHEMA)
for _device in ("CPU", "CUDA"):
    _LIBRARY.impl("reposition_pages", _run, _device)
torch.library.register_fake("mem_triton::reposition_pages", lambda *args, **kwargs: None, lib=_LIBRARY)
