"""The codecs without training: what they keep bit by bit, how far off the others are, and what they refuse."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import Tensor

from mem_triton.ops.block_codec import (
    CodecError,
    codec_from_state,
    dequantise_pages,
    get_codec,
    quality,
    quantise_pages,
)
from mem_triton.ops.block_codec.reference import error_bound, quantise
from mem_triton.ops.memory_attention.arguments.types import MemoryPages

FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SCALED = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


def make_block(
    tokens: int = 24, head_dim: int = 16, dtype: torch.dtype = torch.float32, seed: int = 0, size: float = 1.0
):
    """Keys with a few loud channels, as models have them; values with a few loud tokens."""
    g = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, 3, 2, tokens, head_dim, generator=g) * size
    keys[..., : max(1, head_dim // 8)] *= 30
    values[:, :, ::7] *= 10
    return SimpleNamespace(keys=keys.to(dtype), values=values.to(dtype))


def through_the_disk(codec, block, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Encoded, written as safetensors, read and decoded."""
    return codec.decode(load(save(codec.encode(block.keys, block.values))), dtype)


@pytest.mark.parametrize(
    "name,dtype",
    [
        ("fp32", torch.float32),
        ("fp32", torch.bfloat16),
        ("fp32", torch.float16),
        ("bf16", torch.bfloat16),
        ("fp16", torch.float16),
    ],
)
def test_b8_store_and_reload_is_bitwise_where_the_codec_holds_the_dtype(name, dtype):
    block = make_block(dtype=dtype)
    block.keys[0, 0, 0, :3] = torch.tensor([0.0, -0.0, torch.finfo(dtype).tiny], dtype=dtype)
    keys, values = through_the_disk(get_codec(name), block, dtype)
    raw = {2: torch.int16, 4: torch.int32}[keys.element_size()]
    assert torch.equal(keys.view(raw), block.keys.view(raw)) and torch.equal(values.view(raw), block.values.view(raw))
    report = quality(get_codec(name), block)
    assert report.key_error == report.value_error == 0
    assert report.bytes_per_vector == 16 * FLOATS[name].itemsize


def test_b8_a_lossy_codec_is_not_bitwise():
    """Negative control: the comparison above sees one rounding."""
    block = make_block()
    keys, _ = through_the_disk(get_codec("bf16"), block, torch.float32)
    assert not torch.equal(keys, block.keys)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    name=st.sampled_from(list(SCALED)),
    tokens=st.integers(1, 40),
    head_dim=st.sampled_from([1, 8, 20, 128]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    size=st.sampled_from([1e-3, 1.0, 50.0]),
    seed=st.integers(0, 50),
)
def test_b8_eight_bits_are_bounded_element_by_element(name, tokens, head_dim, dtype, size, seed):
    block = make_block(tokens, head_dim, dtype, seed, size)
    codec = get_codec(name)
    encoded = codec.encode(block.keys, block.values)
    for x, decoded, kind, dim in zip(
        (block.keys, block.values), codec.decode(encoded, torch.float32), ("key", "value"), (2, 3), strict=True
    ):
        codes, scale = encoded[f"{kind}s"], encoded[f"{kind}_scale"]
        assert codes.dtype == SCALED[name] and scale.shape == x.select(dim, 0).shape and scale.dtype == torch.bfloat16
        # A scale that bf16 rounds down makes the largest element saturate: one part in 256 of the range at most.
        bound = error_bound(x, scale, dim, SCALED[name])
        largest = torch.iinfo(torch.int8).max if name == "int8" else torch.finfo(torch.float8_e4m3fn).max
        clipped = (x.double().abs() - scale.double().unsqueeze(dim) * largest).clamp(min=0)
        assert ((decoded.double() - x.double()).abs() <= torch.maximum(bound, clipped * (1 + 2**-20))).all()
        assert (clipped <= 2**-8 * x.double().abs().amax(dim, keepdim=True)).all()


def test_keys_are_scaled_by_channel_and_values_by_token():
    """The other way round a loud channel would swallow its neighbours: that is why it is done so."""
    block = make_block(128, 64)
    report = quality(get_codec("int8"), block)
    assert report.key_error < 0.01 and report.value_error < 0.01
    other = SimpleNamespace(keys=block.keys.mT.contiguous(), values=block.values.mT.contiguous())
    quiet = slice(16, None)  # of the channels, beside the loud ones
    decoded = get_codec("int8").decode(get_codec("int8").encode(other.keys, other.values), torch.float32)[0].mT
    wrong = (decoded - block.keys)[..., quiet].norm() / block.keys[..., quiet].norm()
    right = get_codec("int8").decode(get_codec("int8").encode(block.keys, block.values), torch.float32)[0]
    assert wrong > 5 * (right - block.keys)[..., quiet].norm() / block.keys[..., quiet].norm()


@pytest.mark.parametrize("name", [*FLOATS, *SCALED])
def test_part_of_a_block_decodes_to_the_same_bits(name):
    """What is written is laid out by layer and head, so that a bank can read some of them alone."""
    block, codec = make_block(), get_codec(name)
    encoded = codec.encode(block.keys, block.values)
    assert all(tensor.shape[:2] == (3, 2) for tensor in encoded.values())
    whole = codec.decode(encoded, torch.bfloat16)
    part = codec.decode({n: t[1:, 1:] for n, t in encoded.items()}, torch.bfloat16)
    for a, b in zip(part, whole, strict=True):
        assert torch.equal(a, b[1:, 1:])


@pytest.mark.parametrize("tiny", [0.0, 1e-41])
def test_zeros_stay_zeros_and_so_do_numbers_too_small_for_a_scale(tiny):
    for name in SCALED:
        zeros = torch.zeros(1, 1, 4, 8)
        zeros[..., ::2] = tiny
        assert all((x == 0).all() for x in get_codec(name).decode(get_codec(name).encode(zeros, zeros), torch.float32))


def test_the_quality_report_is_what_happened():
    block = make_block(64, 32)
    for name, error in (("fp32", 0), ("bf16", 2e-3), ("fp16", 3e-4), ("int8", 1e-2), ("fp8", 4e-2)):
        report = quality(get_codec(name), block)
        keys, _ = get_codec(name).decode(get_codec(name).encode(block.keys, block.values), torch.float32)
        assert report.key_error == pytest.approx(
            float((keys - block.keys).norm() / block.keys.norm()), rel=1e-4, abs=1e-9
        )
        assert (report.key_error > error / 20 or error == 0) and max(report.key_error, report.value_error) <= error
        assert report.key_cosine == pytest.approx(1, abs=error**2 + 1e-9)
        stored = sum(t.nbytes for t in get_codec(name).encode(block.keys, block.values).values())
        assert report.bytes_per_token * 64 == report.bytes_per_vector * 2 * 3 * 2 * 64 == stored
        assert report.ratio == pytest.approx(stored / (block.keys.numel() * 4))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_a_codec_cannot_hold_is_refused_by_name(bad):
    block = make_block()
    block.values[1, 0, 3, 2] = bad
    for name in SCALED:
        with pytest.raises(CodecError, match=r"^values: infinite or NaN"):
            get_codec(name).encode(block.keys, block.values)
        with pytest.raises(CodecError, match=r"^values: infinite or NaN"):
            quantise_pages(block.keys, block.values, SCALED[name])
    block = make_block()
    block.keys[0, 0, 0, 0] = 1e5
    with pytest.raises(CodecError, match=r"^keys: up to 1e\+05, more than fp16 holds"):
        get_codec("fp16").encode(block.keys, block.values)
    assert get_codec("bf16").encode(block.keys, block.values)["keys"].isfinite().all()


def test_names_and_states():
    for name in (*FLOATS, *SCALED):
        codec = get_codec(name)
        assert codec.name == name and codec.trained and codec.state() == b""
        assert type(codec_from_state(name, codec.state())) is type(codec)
    for make in (get_codec, lambda name: codec_from_state(name, None)):
        with pytest.raises(CodecError, match=r"^codec: 'int4' is unknown, expected one of fp32, .*pq"):
            make("int4")


@pytest.mark.parametrize("dtype", SCALED.values(), ids=list(SCALED))
@pytest.mark.parametrize("layers", [(), (3,)], ids=["pages", "layers_of_pages"])
def test_pages_are_as_the_attention_kernel_reads_them(dtype, layers):
    g = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, *layers, 5, 2, 16, 32, generator=g)
    pages = quantise_pages(keys, values, dtype)
    assert isinstance(pages, MemoryPages)
    assert pages.keys.dtype == pages.values.dtype == dtype and pages.keys.shape == keys.shape
    assert pages.key_scale.shape == (*layers, 5, 2, 32) and pages.value_scale.shape == (*layers, 5, 2, 16)
    assert pages.key_scale.dtype == pages.value_scale.dtype == torch.float32
    worth = pages.keys.float() * pages.key_scale[..., None, :], pages.values.float() * pages.value_scale[..., None]
    for x, mine, scale, dim, got in zip(
        (keys, values), worth, (pages.key_scale, pages.value_scale), (-2, -1), dequantise_pages(pages), strict=True
    ):
        assert torch.equal(mine, got)
        assert ((mine.double() - x).abs() <= error_bound(x, scale, dim, dtype)).all()


def test_empty_places_of_a_page_widen_no_scale():
    keys, values = torch.randn(2, 4, 2, 16, 8, generator=torch.Generator().manual_seed(0))
    tokens = torch.tensor([16, 5, 1, 0])
    spoiled = keys.clone(), values.clone()
    for x in spoiled:
        x.masked_fill_((torch.arange(16) >= tokens[:, None])[:, None, :, None], 1e30)
    pages = quantise_pages(*spoiled, torch.int8, tokens)
    for n, count in enumerate(tokens.tolist()):
        alone = quantise_pages(keys[n : n + 1, :, :count], values[n : n + 1, :, :count], torch.int8) if count else None
        assert (pages.keys[n, :, count:] == 0).all() and (pages.values[n, :, count:] == 0).all()
        if alone:
            assert torch.equal(alone.keys[0], pages.keys[n, :, :count])
            assert torch.equal(alone.key_scale[0], pages.key_scale[n])


def test_wrong_pages_are_named():
    keys = torch.zeros(4, 2, 16, 8)
    with pytest.raises(CodecError, match=r"^dtype: torch.float16, pages of 8 bits"):
        quantise_pages(keys, keys, torch.float16)
    with pytest.raises(CodecError, match=r"^values: shape \(4, 2, 16, 4\)"):
        quantise_pages(keys, keys[..., :4], torch.int8)
    with pytest.raises(CodecError, match=r"^tokens: shape \(3,\), expected \(4,\)"):
        quantise_pages(keys, keys, torch.int8, torch.zeros(3))


@pytest.mark.parametrize("dtype", SCALED.values(), ids=list(SCALED))
def test_the_bound_sees_a_wrong_code(dtype):
    """Negative control of ``error_bound``: a code off by one step, or a scale by a tenth."""
    x = torch.randn(16, 32, generator=torch.Generator().manual_seed(0))
    codes, scale = quantise(x, 0, dtype)
    bound, good = error_bound(x, scale, 0, dtype), codes.float() * scale
    assert ((good - x).abs() <= bound).all()
    one_off = codes.view(torch.int8).clone()
    one_off[3, 4] += 1 if one_off[3, 4] != 127 else -1
    for wrong in (one_off.view(dtype).float() * scale, good * 1.1):
        assert not ((wrong - x).abs() <= bound).all()
