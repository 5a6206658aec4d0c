"""Training of product quantisation, by faiss. The only place that needs it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mem_triton.ops.block_codec.reference import CodecError

SAMPLES_PER_CENTROID = 39  # fewer, and faiss warns that k-means does not generalise
LEAST_SAMPLES = SAMPLES_PER_CENTROID << 8
MOST_SAMPLES = 1 << 20
ROTATION_SAMPLES = 1 << 14  # faiss would take four times as many and as long, for an error that is 1 % smaller
_FACTORY = re.compile(r"(?:OPQ(\d+)_(\d+),)?(?:Residual(\d+)x(\d+),)?PQ(\d+)(?:x(\d+))?")


@dataclass(frozen=True)
class Trained:
    """rotation: fp32 [d, D], rows orthonormal. levels: per level, the centroids fp32 [2**bits, width] of each part."""

    rotation: Tensor
    levels: list[list[Tensor]]


def factory_string(head_dim: int, samples: int) -> str:
    """Name the paper's class for this head size, as faiss writes it, for so many training vectors.

    The paper spends 14 bytes on 80 dimensions: OPQ20_80,Residual2x14,PQ8x10. Here round(14 * D / 80) bytes: a coarse
    code of 2 x 14 bits, and the rest on the residual's M parts of b <= 10 bits, M a divisor of D: as many bits as fit
    and, where several do, the largest b. With fewer than 39 samples for each of 2**14 centroids (638,976), codes of 14
    and 10 bits shrink to what the samples can train, and the residual gets the bits that the coarse code gave up.
    """
    _enough("samples", samples)
    trainable = (samples // SAMPLES_PER_CENTROID).bit_length() - 1
    coarse = min(14, trainable)
    rest = 8 * round(14 * head_dim / 80) - 2 * coarse
    divisors = [m for m in range(1, head_dim + 1) if head_dim % m == 0]
    sizes = [(m, min(10, trainable, rest // m)) for m in divisors if m <= rest]
    if head_dim % 2 or not sizes:
        raise CodecError(f"head_dim={head_dim}: too small or odd for product quantisation; pass factory, or use int8")
    parts, width = max(sizes, key=lambda size: (size[0] * size[1], size[1]))
    rotation = next(m for m in range(max(1, head_dim // 4), 0, -1) if head_dim % m == 0)
    return f"OPQ{rotation}_{head_dim},Residual2x{coarse},PQ{parts}x{width}"


def train_vectors(name: str, x: Tensor, factory: str | None) -> Trained:
    """Rotation and centroids for vectors x: fp32 [N, D]. ``name`` is for errors."""
    faiss = _faiss()
    _enough(name, len(x))
    if len(x) > MOST_SAMPLES:
        x = x[torch.linspace(0, len(x) - 1, MOST_SAMPLES).long()]  # evenly, so that every head stays
    factory = factory or factory_string(x.shape[1], len(x))
    match = _FACTORY.fullmatch(factory)
    if match is None:
        raise CodecError(f"factory: {factory!r} is not of the class [OPQ<m>_<d>,][Residual<m>x<bits>,]PQ<m>x<bits>")
    bits = max(int(match[4] or 0), int(match[6] or 8))
    if len(x) < 1 << bits:
        raise CodecError(f"{name}: {len(x)} vectors cannot train the {1 << bits} centroids of factory {factory!r}")
    try:
        index = faiss.index_factory(x.shape[1], factory)
        if match[1]:
            faiss.downcast_VectorTransform(index.chain.at(0)).max_train_points = ROTATION_SAMPLES
        index.train(x.contiguous().numpy())
    except RuntimeError as error:
        raise CodecError(f"factory: {factory!r} does not fit vectors of {x.shape[1]}: {error}") from None
    return _trained(faiss, index, x.shape[1])


def _trained(faiss: Any, index: Any, dim: int) -> Trained:
    """The trained arrays, out of faiss."""
    rotation = torch.eye(dim)
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexPreTransform):
        turn = faiss.downcast_VectorTransform(index.chain.at(0))
        rotation = torch.from_numpy(faiss.vector_to_array(turn.A).copy()).view(turn.d_out, turn.d_in)
        index = faiss.downcast_index(index.index)
    quantisers = [index.pq]
    if isinstance(index, faiss.Index2Layer):
        quantisers.insert(0, faiss.downcast_index(index.q1.quantizer).pq)
    levels = [
        list(torch.from_numpy(faiss.vector_to_array(pq.centroids).copy()).view(pq.M, pq.ksub, pq.dsub))
        for pq in quantisers
    ]
    return Trained(rotation, levels)


def _enough(name: str, samples: int) -> None:
    if samples < LEAST_SAMPLES:
        raise CodecError(
            f"{name}: {samples} vectors are too few to train 'pq', which needs at least {LEAST_SAMPLES} "
            "(tokens x layers x KV heads over all samples); encode more texts, or use codec int8"
        )


def _faiss() -> Any:
    try:
        import faiss
    except ImportError:
        raise CodecError("faiss is not installed; training 'pq' needs it: pip install 'mem-triton[pq]'") from None
    return faiss
