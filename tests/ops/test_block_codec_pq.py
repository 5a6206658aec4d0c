"""Product quantisation: trained by faiss, coded by us, with the same result as faiss and always the same bits."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load, save

from mem_triton.ops.block_codec import (
    CodecError,
    ProductCodec,
    bits,
    codec_from_state,
    factory_string,
    get_codec,
    quality,
    training,
)
from mem_triton.ops.block_codec.product import VectorCodec
from mem_triton.ops.block_codec.training import LEAST_SAMPLES, train_vectors

SMALL = "Residual2x5,PQ4x6"  # 34 bits for 16 channels, trained in a second; a rotation (OPQ) takes far longer


def make_blocks(count: int = 10, tokens: int = 256, head_dim: int = 16, seed: int = 0) -> list[SimpleNamespace]:
    """Blocks [2, 2, T, D] of heads that differ in mean and size, and whose channels hang together."""
    g = torch.Generator().manual_seed(7)
    means, sizes = torch.randn(2, 2, 2, 1, head_dim, generator=g) * 3, torch.rand(2, 2, 2, 1, 1, generator=g) * 5 + 0.1
    mixing = torch.randn(2, head_dim // 4, head_dim, generator=g)
    g = torch.Generator().manual_seed(seed)
    blocks = []
    for _ in range(count):
        x = torch.randn(2, 2, 2, tokens, head_dim // 4, generator=g) @ mixing[:, None, None]
        x = (x + 0.1 * torch.randn(x.shape, generator=g)) * sizes + means
        blocks.append(SimpleNamespace(keys=x[0], values=x[1]))
    return blocks


@pytest.fixture(scope="module")
def codec() -> ProductCodec:
    codec = get_codec("pq")
    codec.train(make_blocks(), SMALL)
    return codec


@pytest.mark.parametrize("factory", ["OPQ1_8,Residual2x4,PQ2x5", "Residual2x4,PQ2x8", "PQ8x4"])
def test_it_codes_as_faiss_does(factory, monkeypatch):
    """The same vectors as the faiss index that was trained, but for rounding, in as many bytes."""
    x = torch.randn(LEAST_SAMPLES, 16, generator=torch.Generator().manual_seed(0))
    indices, original = [], training._trained
    monkeypatch.setattr(training, "_trained", lambda *args: indices.append(args[1]) or original(*args))
    trained, index = train_vectors("keys", x, factory), indices[0]
    width = 8 if "_8" in factory else 16
    assert trained.rotation.shape == (width, 16)
    torch.testing.assert_close(trained.rotation @ trained.rotation.T, torch.eye(width), rtol=0, atol=1e-5)
    mine = VectorCodec(torch.zeros(1, 16), torch.ones(1), trained)
    head, some = torch.zeros(1, dtype=torch.int32), x[None, :500]
    codes = mine.encode(some, head)
    theirs = torch.from_numpy(index.sa_decode(index.sa_encode(some[0].numpy())))
    same = ((mine.decode(codes, head)[0] - theirs).abs().amax(1) <= 1e-4).float().mean()
    assert same >= 0.99, same  # a vector half-way between two centroids may go either way
    assert 0 <= index.sa_code_size() - codes.shape[-1] <= 1  # faiss fills each level up to whole bytes


def test_decoding_is_the_definition(codec):
    """Centroid by centroid in fp64: chosen parts side by side, levels added, turned back, scaled, moved."""
    block = make_blocks(1, 9, seed=3)[0]
    encoded = codec.encode(block.keys, block.values)
    decoded = codec.decode(encoded, torch.float32)
    for name, coder, got in zip(("keys", "values"), (codec.keys, codec.values), decoded, strict=True):
        for layer, head, token in ((0, 0, 0), (1, 0, 4), (1, 1, 8)):
            index = bits.unpack(encoded[name][layer, head, token][None], coder.widths)[0].tolist()
            total, at = 0, 0
            for level in coder.trained.levels:
                total = total + torch.cat([part[i] for part, i in zip(level, index[at:], strict=False)]).double()
                at += len(level)
            want = total @ coder.trained.rotation.double()
            want = want * coder.scale[2 * layer + head] + coder.mean[2 * layer + head]
            torch.testing.assert_close(got[layer, head, token].double(), want, rtol=1e-5, atol=1e-5)


def test_b8_quantised_vectors_are_bounded_and_reported(codec):
    """Nearest centroids: never worse than the mean, and reported as they are."""
    block = make_blocks(1, 128, seed=5)[0]
    report = quality(codec, block)
    keys, values = codec.decode(codec.encode(block.keys, block.values), torch.float32)
    for x, got, error in ((block.keys, keys, report.key_error), (block.values, values, report.value_error)):
        assert error == pytest.approx(float((got - x).norm() / x.norm()), rel=1e-4)
        assert error < 0.25 and (got - x).norm() < 0.5 * (x - x.mean(2, keepdim=True)).norm()
    assert report.bytes_per_vector == pytest.approx(5, abs=0.02) and report.ratio < 0.16
    assert min(report.key_cosine, report.value_cosine) > 0.95
    # Negative control: codes of other tokens are nowhere near.
    encoded = codec.encode(block.keys, block.values)
    encoded["keys"] = encoded["keys"].roll(1, dims=2)
    assert (codec.decode(encoded, torch.float32)[0] - block.keys).norm() > 2 * (keys - block.keys).norm()


def test_b8_decoding_gives_the_same_bits_in_any_company(codec):
    """Alone, with others, by layer, by head, after the disk and from a reloaded codec."""
    block = make_blocks(1, 77, seed=6)[0]
    encoded = codec.encode(block.keys, block.values)
    whole = codec.decode(encoded, torch.bfloat16)
    encoded = load(save(encoded))
    again = codec_from_state("pq", codec.state()).decode(encoded, torch.bfloat16)
    part = codec.decode({n: t[1:, 1:] for n, t in encoded.items()}, torch.bfloat16)
    one = codec.decode({n: t if n == "head" else t[:, :, 5:6] for n, t in encoded.items()}, torch.bfloat16)
    for i in range(2):
        assert torch.equal(whole[i], again[i])
        assert torch.equal(whole[i][1:, 1:], part[i])
        assert torch.equal(whole[i][:, :, 5:6], one[i])
    assert {n: t.dtype for n, t in encoded.items()} == {
        "keys": torch.uint8,
        "values": torch.uint8,
        "head": torch.int32,
    }


def test_statistics_of_each_head_are_worth_it(codec):
    """Heads differ in mean and size; one set of centroids without their statistics would be far worse."""
    block, blocks = make_blocks(1, 128, seed=5)[0], make_blocks()
    x = torch.cat([b.keys for b in blocks], 2).flatten(0, 1)
    trained = train_vectors("keys", x.flatten(0, 1), SMALL)
    bare = VectorCodec(torch.zeros(4, 16), torch.ones(4), trained)
    head = torch.arange(4, dtype=torch.int32).view(2, 2)
    error = (bare.decode(bare.encode(block.keys, head), head) - block.keys).norm() / block.keys.norm()
    assert error > 1.2 * quality(codec, block).key_error


def test_the_class_follows_the_head_size_and_the_samples():
    many = 39 << 14
    assert factory_string(80, many) == "OPQ20_80,Residual2x14,PQ8x10"  # the paper's
    for head_dim in (32, 64, 80, 96, 128, 192, 256):
        for samples in (LEAST_SAMPLES, 100_000, many):
            coarse, fine = factory_string(head_dim, samples).split(",")[1:]
            coarse, (parts, width) = int(coarse[len("Residual2x") :]), map(int, fine[2:].split("x"))
            spent, budget = 2 * coarse + parts * width, 8 * round(14 * head_dim / 80)
            assert 0.85 * budget <= spent <= budget and head_dim % parts == 0 and width <= 10
            assert 39 << max(coarse, width) <= samples
    with pytest.raises(CodecError, match=r"^head_dim=7: "):
        factory_string(7, many)


@pytest.mark.parametrize("widths", [[14, 14, *[10] * 8], [5], [1, 7, 8, 3]])
def test_bits_are_packed_without_gaps(widths):
    g = torch.Generator().manual_seed(0)
    indices = torch.stack([torch.randint(1 << w, (50,), generator=g) for w in widths], 1)
    indices[0], indices[1] = 0, torch.tensor([(1 << w) - 1 for w in widths])
    codes = bits.pack(indices, widths)
    assert codes.shape == (50, -(-sum(widths) // 8)) and codes.dtype == torch.uint8
    assert torch.equal(bits.unpack(codes, widths), indices)
    number = [int.from_bytes(bytes(row.tolist()), "little") for row in codes]
    assert [n & ((1 << widths[0]) - 1) for n in number] == indices[:, 0].tolist()


def test_errors_say_what_to_do(codec):
    fresh, block = get_codec("pq"), make_blocks(1)[0]
    assert not fresh.trained and codec.trained
    for act in (
        lambda: fresh.encode(block.keys, block.values),
        fresh.state,
        lambda: fresh.decode({"head": 0}, torch.half),
    ):
        with pytest.raises(CodecError, match=r"'pq' is not trained; call train"):
            act()
    with pytest.raises(CodecError, match=r"^codec: 'pq' must be trained on samples"):
        codec_from_state("pq", None)
    with pytest.raises(CodecError, match=rf"^keys: 1024 vectors are too few .* at least {LEAST_SAMPLES}"):
        fresh.train([block])
    with pytest.raises(CodecError, match=r"^samples: need blocks"):
        fresh.train([])
    with pytest.raises(CodecError, match=r"^samples: need blocks"):
        fresh.train([*make_blocks(2), *make_blocks(1, head_dim=8)])
    with pytest.raises(CodecError, match=r"^factory: 'IVF10,Flat' is not of the class"):
        fresh.train(make_blocks(), "IVF10,Flat")
    with pytest.raises(CodecError, match=r"^keys: 10240 vectors cannot train the 16384 centroids"):
        fresh.train(make_blocks(), "Residual2x14,PQ4")
    with pytest.raises(CodecError, match=r"^factory: 'PQ5' does not fit vectors of 16"):
        fresh.train(make_blocks(), "PQ5")
    with pytest.raises(CodecError, match=r"^keys: 1 x 2 heads of 16, the codec was trained for 4 of 16"):
        codec.encode(block.keys[:1], block.values[:1])
    with pytest.raises(CodecError, match=r"^values: infinite or NaN"):
        codec.encode(block.keys, block.values / 0)
    with pytest.raises(CodecError, match=r"^state: not the state of a 'pq' codec"):
        ProductCodec.from_state(b"nonsense")
    old = load(codec.state())
    old["version"] += 1
    with pytest.raises(CodecError, match=r"^state: version 2, this mem_triton reads 1"):
        ProductCodec.from_state(save(old))


def test_faiss_is_needed_for_training_only(codec, tmp_path):
    """In a process without faiss a trained codec works, and training names the extra that brings it."""
    block = make_blocks(1, 5)[0]
    (tmp_path / "state").write_bytes(codec.state())
    (tmp_path / "block").write_bytes(save({"keys": block.keys, "values": block.values}))
    script = f"""
import sys
sys.modules["faiss"] = None
import torch
from safetensors.torch import load
from mem_triton.ops.block_codec import codec_from_state, CodecError
from mem_triton.ops.block_codec.training import train_vectors
codec = codec_from_state("pq", open({str(tmp_path / "state")!r}, "rb").read())
block = load(open({str(tmp_path / "block")!r}, "rb").read())
keys, _ = codec.decode(codec.encode(block["keys"], block["values"]), torch.float32)
try:
    train_vectors("keys", torch.zeros(20000, 16), None)
except CodecError as error:
    print(error, keys.double().sum().item())
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    want = codec.decode(codec.encode(block.keys, block.values), torch.float32)[0].double().sum().item()
    assert run.stdout.strip() == (
        f"faiss is not installed; training 'pq' needs it: pip install 'mem-triton[pq]' {want}"
    ), run.stderr
