"""``block_codec``: banks' keys and values to and from their form on disk, and to 8-bit pages. torch on every device.

Not on the way of a token: banks are written once and read when a reference is loaded.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.kernels.registry import Case, Gate, Operation, Setup, Variant, relative_rms
from benchmarks.kernels.roofline import Work
from benchmarks.kernels.shapes import Model, Random, by_attention
from mem_triton.ops.block_codec import dequantise_pages, get_codec, quantise_pages

CODES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
ROUNDED = {"bf16": 3e-3, "fp16": 5e-4, "fp32": 1e-6}  # a product rounded once to the dtype
LOST = {"bf16": 3e-3, "int8": 1e-2, "fp8": 4e-2}  # by coding normal numbers, see the op's README
ON_DISK, IN_POOL = 2, 4  # bytes of a scale


class Layer(NamedTuple):
    keys: Tensor  # [n, Hkv, T, D]: n references of a layer
    values: Tensor


def cases(models: list[Model], dtype: str, gpu: bool) -> list[Case]:
    """References as one layer of a bank holds them, 8 kept tokens or all 128: written, and read."""
    found = []
    for references, tokens in ((5, 8), (80, 8), (1280, 8), (80, 128)) if gpu else ((5, 8), (80, 8), (5, 128)):
        for write in (1, 0):
            for model, names in by_attention(models):
                sizes = {
                    "references": references,
                    "tokens": tokens,
                    "write": write,
                    "kv_heads": model.kv_heads,
                    "head_dim": model.head_dim,
                }
                name = f"{'write' if write else 'read'} {references} references of {tokens}"
                found.append(Case("block_codec", names, name, dtype, sizes, model.layers))
    return found


def build(case: Case, device: str, seed: int) -> Layer:
    g, s = Random(device, seed), case.sizes
    shape = (s["references"], s["kv_heads"], s["tokens"], s["head_dim"])
    return Layer(*(g.normal(*shape, dtype=case.torch_dtype) for _ in range(2)))


def work(case: Case, codec: str, scale_bytes: int = ON_DISK) -> Work:
    """Numbers on one side, codes and their scales on the other; a product for each number."""
    s = case.sizes
    numbers = 2 * s["references"] * s["kv_heads"] * s["tokens"] * s["head_dim"]  # of keys and values
    scales = s["references"] * s["kv_heads"] * (s["head_dim"] + s["tokens"]) if codec in CODES else 0
    code_bytes = 1 if codec in CODES else 2
    return Work(numbers * (case.torch_dtype.itemsize + code_bytes) + scales * scale_bytes, numbers)


def worth(codes: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Keys and values of an encoding in fp64: keys have a scale by channel, values by token."""
    keys, values = codes["keys"].double(), codes["values"].double()
    if "key_scale" not in codes:
        return keys, values
    return keys * codes["key_scale"].double().unsqueeze(2), values * codes["value_scale"].double().unsqueeze(3)


def variants(case: Case, layer: Layer, setup: Setup) -> list[Variant]:
    setup.left_out("pq", "it must be trained for minutes first; its README has its figures")
    return (writers if case.sizes["write"] else readers)(case, layer)


def writers(case: Case, layer: Layer) -> list[Variant]:
    """They refuse what they cannot represent, so the host waits for the data: no graph can hold them."""
    found, note = [], "looks for infinities and NaN, timed without a CUDA graph"

    def judge(codec: str) -> Gate:
        def error(got: Any) -> float:
            return relative_rms(*zip(worth(got if isinstance(got, dict) else got._asdict()), layer, strict=True))

        return Gate(error, LOST[codec])

    for name in ("bf16", *CODES):
        call = functools.partial(get_codec(name).encode, *layer)
        found.append(Variant(f"{name} codec", call, judge(name), work(case, name), note=note, in_graph=False))
    for name, kind in CODES.items():
        call = functools.partial(quantise_pages, *layer, kind)
        found.append(Variant(f"{name} pages", call, judge(name), work(case, name, IN_POOL), note=note, in_graph=False))

    def cast() -> dict[str, Tensor]:
        return {"keys": layer.keys.to(torch.bfloat16, copy=True), "values": layer.values.to(torch.bfloat16, copy=True)}

    return [*found, baseline(cast, judge("bf16"), work(case, "bf16"), in_graph=False)]


def readers(case: Case, layer: Layer) -> list[Variant]:
    """Codes are made beforehand."""
    found, dtype = [], case.torch_dtype

    def judge(codes: Mapping[str, Tensor]) -> Gate:
        wanted = functools.cache(lambda: worth(codes))
        return Gate(lambda got: relative_rms(*zip(got, wanted(), strict=True)), ROUNDED[case.dtype])

    for name in CODES if dtype == torch.bfloat16 else ("bf16", *CODES):  # bf16 from bf16 is the tensor itself
        codec = get_codec(name)
        codes = codec.encode(*layer)
        call = functools.partial(codec.decode, codes, dtype)
        found.append(Variant(f"{name} codec", call, judge(codes), work(case, name)))
    for name, kind in CODES.items():
        pages = quantise_pages(*layer, kind)
        call = functools.partial(dequantise_pages, pages, dtype)
        found.append(Variant(f"{name} pages", call, judge(pages._asdict()), work(case, name, IN_POOL)))
    halves = {"keys": layer.keys.to(torch.bfloat16), "values": layer.values.to(torch.bfloat16)}

    def cast() -> tuple[Tensor, Tensor]:
        return halves["keys"].to(dtype, copy=True), halves["values"].to(dtype, copy=True)

    return [*found, baseline(cast, judge(halves), work(case, "bf16"), in_graph=True)]


def baseline(call: Any, gate: Gate, cost: Work, in_graph: bool) -> Variant:
    note = "a copy in 16 bits, without checks"
    return Variant("torch cast", call, gate, cost, baseline=True, note=note, in_graph=in_graph)


OPERATION = Operation("block_codec", cases, build, variants)
