"""Checksums that are looked at whenever something of a bank is read, so that damage is found before it is used.

A row of a shard has 32 bits for each layer and KV head, so that a worker checks the part that it reads and reads no
more for it. They find damage, not forgery: whoever may write the files may write checksums, too.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import cache, lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mem_triton.store.bank.checksum_constants import BLOCK, MIX

SMALL = 512
"""Words of a part up to which compiled code is faster than torch (checksums_compiled)."""


def part_checksums(
    row: int, tensors: Mapping[str, Tensor], layers: Sequence[int], heads: slice, often: bool = False
) -> np.ndarray:
    """uint32 [L, H] of a row's tensors, each [L, H, ...], in the stored layers and KV heads of these indices.

    They cover bytes, dtypes, shapes, names, the row's number, and which layer and head it is. often: this process will
    do it again and again, which compiled code is worth: importing numba takes half a second, and not before vLLM has
    started.
    """
    total = (_places(tuple(layers), heads.start, heads.stop) | np.uint64(row)) * MIX
    for name in sorted(tensors):
        tensor = tensors[name]
        salt = _salt(name, tensor.dtype, tensor.shape[2:])
        size, rest = divmod(tensor.nbytes, 8 * max(1, total.size))
        fits = often and tensor.shape[:2] == total.shape and tensor.is_contiguous() and not rest
        if fits and size <= SMALL:
            _compiled()(tensor.data_ptr(), size, salt, total.reshape(-1))
        else:
            total = (total ^ (total >> np.uint64(29))) * MIX + _weighed(tensor) * salt
    return (total ^ (total >> np.uint64(32))).astype(np.uint32)


@cache
def _compiled() -> Callable[[int, int, np.uint64, np.ndarray], None]:
    from mem_triton.store.bank.checksums_compiled import mix_in

    return mix_in


@lru_cache(64)
def _places(layers: tuple[int, ...], first: int, end: int) -> np.ndarray:
    """uint64 [L, H]: what a part's sum begins with, but for its row."""
    place = np.array(layers, np.uint64)[:, None] << np.uint64(20) | np.arange(first, end, dtype=np.uint64)
    return place << np.uint64(20)


def _weighed(tensor: Tensor) -> np.ndarray:
    """uint64 [L, H]: the words of each layer and head, added up in blocks whose sums are weighed by odd numbers.

    One changed word always shows; so does a block in another's place.
    """
    layers, heads = tensor.shape[:2]
    data = tensor.reshape(layers, heads, -1).contiguous().view(torch.uint8)
    if data.shape[2] % 8:
        data = torch.nn.functional.pad(data, (0, -data.shape[2] % 8))
    words = data.view(torch.int64)
    whole, rest = divmod(words.shape[2], BLOCK)
    sums = words[:, :, : whole * BLOCK].unflatten(2, (whole, BLOCK)).sum(3)
    total = sums.numpy().view(np.uint64) @ _weights(whole)
    return total + words[:, :, whole * BLOCK :].numpy().view(np.uint64) @ _weights(rest) * MIX if rest else total


@lru_cache(64)
def _weights(count: int) -> np.ndarray:
    return np.arange(1, count + 1, dtype=np.uint64) * MIX | np.uint64(1)


@lru_cache(1024)
def _salt(name: str, dtype: torch.dtype, shape: torch.Size) -> np.uint64:
    return np.uint64(zlib.crc32(f"{name} {dtype} {list(shape)}".encode()) << 1 | 1)


def row_digest(*values: Any) -> bytes:
    """16 bytes of a catalogue's row, whatever types SQLite gives its values."""
    digest = hashlib.blake2b(digest_size=16)
    for value in values:
        data = value if isinstance(value, bytes) else str(value).encode(errors="surrogatepass")
        digest.update(b"%c%d:" % (type(value).__name__[0].encode(), len(data)) + data)
    return digest.digest()
