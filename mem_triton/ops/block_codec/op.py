"""The codecs by name, and how good one is on given data."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mem_triton.ops.block_codec.plain import FloatCodec, ScaledCodec
from mem_triton.ops.block_codec.product import ProductCodec
from mem_triton.ops.block_codec.reference import Block, Codec, CodecError

FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SCALED = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}
NAMES = (*FLOATS, *SCALED, "pq")


def get_codec(name: str) -> Codec:
    """Make the codec "fp32", "bf16", "fp16", "fp8" (e4m3), "int8" or "pq". ValueError for any other name.

    "pq" (product quantisation, ``ProductCodec``) is not trained yet: call its ``train``, or ``codec_from_state``.
    Example::

        codec = get_codec("int8")
        keys, values = codec.decode(codec.encode(block.keys, block.values), torch.bfloat16)
    """
    if name in FLOATS:
        return FloatCodec(name, FLOATS[name])
    if name in SCALED:
        return ScaledCodec(name, SCALED[name])
    if name == "pq":
        return ProductCodec()
    raise CodecError(f"codec: {name!r} is unknown, expected one of {', '.join(NAMES)}")


def codec_from_state(name: str, state: bytes | None) -> Codec:
    """Make a codec that is ready for use. state: what its ``state()`` gave. CodecError if "pq" comes without."""
    if name != "pq":
        return get_codec(name)
    if not state:
        raise CodecError("codec: 'pq' must be trained on samples of the model's keys and values first")
    return ProductCodec.from_state(state)


@dataclass(frozen=True)
class Quality:
    """How far a codec's output is from what went in, and what it costs.

    Errors are relative: ||x' - x|| / ||x|| over the block. Cosines are means over all vectors. bytes_per_vector: of one
    key or value of one head. ratio: to bf16.
    """

    codec: str
    key_error: float
    value_error: float
    key_cosine: float
    value_cosine: float
    bytes_per_vector: float
    bytes_per_token: float
    ratio: float


def quality(codec: Codec, block: Block) -> Quality:
    """Encode and decode a block, and compare; bytes_per_token counts all its layers and heads."""
    encoded = codec.encode(block.keys, block.values)
    keys, values = codec.decode(encoded, torch.float32)
    layers, heads, tokens, head_dim = block.keys.shape
    size = sum(tensor.nbytes for tensor in encoded.values())
    return Quality(
        codec=codec.name,
        key_error=_relative_error(keys, block.keys),
        value_error=_relative_error(values, block.values),
        key_cosine=_cosine(keys, block.keys),
        value_cosine=_cosine(values, block.values),
        bytes_per_vector=size / (2 * layers * heads * tokens),
        bytes_per_token=size / tokens,
        ratio=size / (2 * layers * heads * tokens * head_dim * 2),
    )


def _relative_error(x: Tensor, wanted: Tensor) -> float:
    wanted = wanted.double()
    return float((x.double() - wanted).norm() / wanted.norm().clamp(min=torch.finfo(torch.float64).tiny))


def _cosine(x: Tensor, wanted: Tensor) -> float:
    return float(torch.cosine_similarity(x.double(), wanted.double(), dim=-1).mean())
