"""Product quantisation of keys and values: ``OPQ20x80-Residual2x14-PQ8x10`` of Memory³ (arXiv 2407.01178, section 3).

A vector is centred and scaled by its head's statistics, turned by a trained rotation (OPQ, arXiv 1311.4055), and
replaced by a sum of centroids: one of each part of a coarse quantiser, then one of each part of its residual. faiss
trains (``training``); coding needs torch only. Decoding adds up centroids that are turned back beforehand, in a fixed
order, so it gives the same bits whatever else is decoded beside it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from safetensors.torch import load, save
from torch import Tensor

from mem_triton.ops.block_codec import bits
from mem_triton.ops.block_codec.reference import Block, CodecError, Encoded
from mem_triton.ops.block_codec.training import Trained, factory_string, train_vectors

__all__ = ["ProductCodec", "factory_string"]
STATE_VERSION = 1
CHUNK = 1024  # vectors whose distances to all coarse centroids are held at a time


@dataclass(frozen=True)
class VectorCodec:
    """Codes for the keys, or for the values, of all heads.

    mean: fp32 [L * Hkv, D] and scale: fp32 [L * Hkv], a head's statistics. trained: rotation and centroids.
    """

    mean: Tensor
    scale: Tensor
    trained: Trained

    def __post_init__(self) -> None:
        """Centroids turned back to the head's own axes, [2**bits, D] each; what decoding adds up."""
        tables = []
        for level in self.trained.levels:
            at = 0
            for part in level:  # [2**bits, width]
                back = self.trained.rotation[at : at + part.shape[1]]  # [width, D]
                tables.append((part.double() @ back.double()).float())
                at += part.shape[1]
        object.__setattr__(self, "tables", tables)

    @property
    def widths(self) -> list[int]:
        """Bits of each index of a code."""
        return [len(table).bit_length() - 1 for table in self.tables]

    def encode(self, x: Tensor, head: Tensor) -> Tensor:
        """x: [..., T, D] of the heads ``head`` [...]. Returns uint8 [..., T, bytes]."""
        x = (x.float() - self.mean[head].unsqueeze(-2)) / self.scale[head][..., None, None]
        flat = x.flatten(0, -2) @ self.trained.rotation.T
        indices = torch.cat([self._indices(part) for part in flat.split(CHUNK)]) if len(flat) else flat.long()
        return bits.pack(indices, self.widths).unflatten(0, x.shape[:-1])

    def _indices(self, rest: Tensor) -> Tensor:
        """Nearest centroid of each part, level after level; int64 [N, parts]."""
        indices = []
        for level in self.trained.levels:
            found = []
            for part, centroids in zip(rest.split([c.shape[1] for c in level], dim=1), level, strict=True):
                nearest = (centroids.square().sum(1) - 2 * part @ centroids.T).argmin(1)
                indices.append(nearest)
                found.append(centroids[nearest])
            rest = rest - torch.cat(found, 1)
        return torch.stack(indices, 1)

    def decode(self, codes: Tensor, head: Tensor) -> Tensor:
        """codes: uint8 [..., T, bytes]. Returns fp32 [..., T, D]."""
        indices = bits.unpack(codes.flatten(0, -2), self.widths)
        total = self.tables[0][indices[:, 0]]
        for column, table in enumerate(self.tables[1:], 1):
            total += table[indices[:, column]]
        total = total.unflatten(0, codes.shape[:-1])
        return total * self.scale[head][..., None, None] + self.mean[head].unsqueeze(-2)


class ProductCodec:
    """``get_codec("pq")``: 14 bytes for a vector of 80, and in proportion. Keys and values are trained apart.

    Example::

        codec = ProductCodec()
        codec.train(blocks)                     # needs faiss: pip install 'mem-triton[pq]'
        again = ProductCodec.from_state(codec.state())
    """

    name = "pq"

    def __init__(self) -> None:
        self.keys: VectorCodec | None = None
        self.values: VectorCodec | None = None

    @property
    def trained(self) -> bool:
        """Whether it can encode and decode."""
        return self.keys is not None and self.values is not None

    def train(self, samples: Iterable[Block], factory: str | None = None) -> None:
        """Learn statistics, rotation and centroids from blocks of the same layers and heads.

        factory: as faiss writes the class, ``OPQ<m>_<d>,Residual<m>x<bits>,PQ<m>x<bits>``, of which PQ alone must be
        there; None = ``factory_string``. Takes minutes; the paper's own class, with all its samples, far longer.
        CodecError if samples are too few or unlike, or faiss is not installed.
        """
        blocks = list(samples)
        keys, values = [block.keys for block in blocks], [block.values for block in blocks]
        if len({(*x.shape[:2], x.shape[3]) for x in [*keys, *values]}) != 1:
            raise CodecError("samples: need blocks [L, Hkv, T, D] of the same layers, heads and head size")
        self.keys, self.values = (
            VectorCodec(*_standardise_and_train(name, torch.cat(x, 2).float(), factory))
            for name, x in (("keys", keys), ("values", values))
        )

    def encode(self, keys: Tensor, values: Tensor) -> Encoded:
        """Encode a block, see ``Codec``. Raises CodecError for other heads, for NaN, and before ``train``."""
        coders = self._coders()
        heads = keys.shape[0] * keys.shape[1]
        if heads != len(coders[0].mean) or keys.shape[3] != coders[0].mean.shape[1]:
            raise CodecError(
                f"keys: {keys.shape[0]} x {keys.shape[1]} heads of {keys.shape[3]}, the codec was trained for "
                f"{len(coders[0].mean)} of {coders[0].mean.shape[1]}"
            )
        head = torch.arange(heads, dtype=torch.int32).view(keys.shape[:2])
        for name, x in (("keys", keys), ("values", values)):
            if not x.isfinite().all():
                raise CodecError(f"{name}: infinite or NaN, which has no nearest centroid")
        codes = (coder.encode(x, head) for coder, x in zip(coders, (keys, values), strict=True))
        # ``head`` says whose statistics apply when some layers and heads are read alone.
        return {"keys": next(codes), "values": next(codes), "head": head}

    def decode(self, encoded: Encoded, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Decode keys and values in ``dtype``, see ``Codec``."""
        keys, values = self._coders()
        head = encoded["head"]
        return keys.decode(encoded["keys"], head).to(dtype), values.decode(encoded["values"], head).to(dtype)

    def state(self) -> bytes:
        """Statistics, rotation and centroids, as a safetensors file."""
        tensors = {"version": torch.tensor(STATE_VERSION)}
        for name, coder in zip(("keys", "values"), self._coders(), strict=True):
            tensors |= {f"{name}.mean": coder.mean, f"{name}.scale": coder.scale}
            tensors[f"{name}.rotation"] = coder.trained.rotation
            for i, level in enumerate(coder.trained.levels):
                tensors[f"{name}.level.{i}"] = torch.stack(level)
        return save({name: tensor.contiguous() for name, tensor in tensors.items()})

    @classmethod
    def from_state(cls, state: bytes) -> ProductCodec:
        """Make the codec that ``state`` was taken of. CodecError if it is none."""
        codec = cls()
        try:
            tensors = load(state)
            if tensors["version"] != STATE_VERSION:
                raise CodecError(f"state: version {int(tensors['version'])}, this mem_triton reads {STATE_VERSION}")
            for name in ("keys", "values"):
                levels = sorted(n for n in tensors if n.startswith(f"{name}.level."))
                trained = Trained(tensors[f"{name}.rotation"], [list(tensors[n]) for n in levels])
                setattr(codec, name, VectorCodec(tensors[f"{name}.mean"], tensors[f"{name}.scale"], trained))
        except CodecError:
            raise
        except Exception as error:  # whatever safetensors says about bytes that are not its own
            raise CodecError(f"state: not the state of a 'pq' codec ({error})") from None
        return codec

    def _coders(self) -> tuple[VectorCodec, VectorCodec]:
        if self.keys is None or self.values is None:
            raise CodecError("codec: 'pq' is not trained; call train(samples), or take one from codec_from_state")
        return self.keys, self.values


def _standardise_and_train(name: str, x: Tensor, factory: str | None) -> tuple[Tensor, Tensor, Trained]:
    """x: [L, Hkv, T, D]. Heads differ in mean and size; centroids are shared by all."""
    x = x.flatten(0, 1)
    mean = x.mean(1)
    x = x - mean.unsqueeze(1)
    scale = x.square().mean((1, 2)).sqrt()
    scale = torch.where(scale > 0, scale, 1.0)
    return mean, scale, train_vectors(name, (x / scale[:, None, None]).flatten(0, 1), factory)
