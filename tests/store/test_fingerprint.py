"""The fingerprint: the same for the same weights whatever files they lie in, another for anything that changes KV."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mem_triton.store.bank.fingerprint import Fingerprint, FingerprintError, model_fingerprint, sampled_digest
from tests.support.models import tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_model("qwen3", layers=2).save_pretrained(folder)
    return folder


@pytest.fixture
def copy(folder, tmp_path) -> Path:
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def edit(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    for key, value in changes.items():
        config.pop(key, None)
        if value is not None:
            config[key] = value
    (folder / "config.json").write_text(json.dumps(config))


def test_what_it_says(folder):
    f = model_fingerprint(folder)
    assert (f.architecture, f.num_layers, f.hidden_size) == ("Qwen3ForCausalLM", 2, 64)
    assert (f.query_heads, f.kv_heads, f.head_dim, f.dtype) == (4, 2, 32, "float32")
    assert f.rope == {"rope_theta": 10000.0} and len(f.weights) == 32
    assert Fingerprint.model_validate_json(f.model_dump_json()) == f and f.differences(f) == []


@pytest.mark.parametrize("family", ["qwen2", "llama", "mistral", "smollm3"])
def test_other_families(tmp_path, family):
    tiny_model(family, layers=2).save_pretrained(tmp_path)
    f = model_fingerprint(tmp_path)
    assert f.num_layers == 2 and f.kv_heads == 2 and ("no_rope_layers" in f.rope) == (family == "smollm3")


def test_other_files_of_the_same_weights_have_the_same_fingerprint(folder, copy):
    tensors = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, some in parts.items():
        save_file({name: tensors[name] for name in some}, copy / file, metadata={"format": "other"})
    index = {"weight_map": {name: file for file, some in parts.items() for name in some}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file({"extra": torch.ones(3)}, copy / "consolidated.safetensors")  # not in the index: not the model's
    assert model_fingerprint(copy) == model_fingerprint(folder)


def test_every_tensor_counts(folder, copy):
    """A fine-tune that moves one layer a little is another model."""
    tensors = load_file(copy / "model.safetensors")
    name = "model.layers.1.self_attn.k_proj.weight"
    tensors[name] = tensors[name] * 1.001
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    (difference,) = model_fingerprint(folder).differences(model_fingerprint(copy))
    assert difference.startswith("weights: bank has ")


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"num_key_value_heads": 4}, "kv_heads: bank has 2, model has 4"),
        ({"dtype": "bfloat16"}, "dtype: bank has float32, model has bfloat16"),
        (
            {"architectures": ["LlamaForCausalLM"]},
            "architecture: bank has Qwen3ForCausalLM, model has LlamaForCausalLM",
        ),
        (
            {"rope_parameters": {"rope_theta": 1000000, "rope_type": "default"}},
            "rope: bank has {'rope_theta': 10000.0}, model has {'rope_theta': 1000000.0}",
        ),
    ],
)
def test_a_difference_is_named(folder, copy, changes, difference):
    edit(copy, **changes)
    assert model_fingerprint(folder).differences(model_fingerprint(copy)) == [difference]


def test_rope_reads_the_same_from_configs_of_transformers_4_and_5(folder, copy):
    edit(copy, rope_parameters=None, rope_theta=10000, rope_scaling=None, dtype=None, torch_dtype="float32")
    assert model_fingerprint(copy) == model_fingerprint(folder)
    scaling = {"type": "yarn", "factor": 4, "original_max_position_embeddings": 1024}
    edit(copy, rope_scaling=scaling)
    old = model_fingerprint(copy).rope
    edit(copy, rope_scaling=None, rope_theta=None, rope_parameters=None)
    edit(
        copy,
        rope_parameters={"rope_theta": 10000.0, "rope_type": "yarn", **{k: scaling[k] for k in scaling if k != "type"}},
    )
    assert old == model_fingerprint(copy).rope and old["factor"] == 4.0


def test_a_model_that_also_sees_keeps_its_language_part(folder, copy):
    config = json.loads((copy / "config.json").read_text())
    outer = {"architectures": config.pop("architectures"), "text_config": config, "vision_config": {"hidden_size": 8}}
    (copy / "config.json").write_text(json.dumps(outer))
    assert model_fingerprint(copy) == model_fingerprint(folder)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "config.json").unlink(), "config.json: .*No such file"),
        (lambda f: (f / "config.json").write_text("{"), "config.json: "),
        (lambda f: edit(f, hidden_size="64"), "hidden_size is '64', expected a whole number"),
        (lambda f: (f / "model.safetensors").unlink(), r"no \*.safetensors; convert"),
        (lambda f: (f / "model.safetensors").write_bytes(b"version https://git-lfs"), "cannot read its weights"),
        (lambda f: (f / "model.safetensors").write_bytes(b"123"), "cannot read its weights"),
    ],
)
def test_a_folder_without_a_model_is_refused(copy, spoil, message):
    spoil(copy)
    with pytest.raises(FingerprintError, match=message):
        model_fingerprint(copy)


def test_large_weights_take_a_moment(tmp_path, folder):
    """Only samples are read: a file of 4 GiB that is one big hole, on any disk."""
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    count, size = 64, 64 << 20
    header = {
        f"t{i}": {"dtype": "BF16", "shape": [size // 2], "data_offsets": [i * size, (i + 1) * size]}
        for i in range(count)
    }
    data = json.dumps(header).encode()
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.write(len(data).to_bytes(8, "little") + data)
        file.truncate(8 + len(data) + count * size)
    start = time.process_time()
    first = model_fingerprint(tmp_path)
    assert time.process_time() - start < 1
    with open(tmp_path / "model.safetensors", "r+b") as file:
        file.seek(8 + len(data) + 40 * size)
        file.write(b"x")
    assert model_fingerprint(tmp_path).weights != first.weights


def test_a_sampled_digest_sees_other_bytes_and_other_lengths(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(1 << 20))
    digest = sampled_digest(path)
    path.write_bytes(bytes((1 << 20) - 1))
    assert sampled_digest(path) != digest
    path.write_bytes(bytes(1 << 20))
    assert sampled_digest(path) == digest
    path.write_bytes(bytes(1000) + b"x" + bytes((1 << 20) - 1001))
    assert sampled_digest(path) != digest
    path.write_bytes(b"")
    assert len(sampled_digest(path)) == 64
