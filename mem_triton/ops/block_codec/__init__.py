"""How keys and values are written: float dtypes, 8 bits with scales, product quantisation."""

from mem_triton.ops.block_codec.op import Quality, codec_from_state, get_codec, quality
from mem_triton.ops.block_codec.plain import dequantise_pages, quantise_pages
from mem_triton.ops.block_codec.product import ProductCodec, factory_string
from mem_triton.ops.block_codec.reference import Codec, CodecError, Encoded

__all__ = [
    "Codec",
    "CodecError",
    "Encoded",
    "ProductCodec",
    "Quality",
    "codec_from_state",
    "dequantise_pages",
    "factory_string",
    "get_codec",
    "quality",
    "quantise_pages",
]
