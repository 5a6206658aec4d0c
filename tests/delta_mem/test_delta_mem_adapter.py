"""Adapter folders: both formats, Hugging Face ids, and errors that name the tensor."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from mem_triton.config import ConfigError
from mem_triton.systems.delta_mem import (
    AdapterError,
    AttentionDims,
    DeltaMemAdapter,
    adapter,
    adapter_from_tensors,
    load_adapter,
    save_adapter,
)
from tests.support.models import random_adapter

DIMS = AttentionDims(hidden=12, q=16, k=8, v=8, o=12)
MODULES = {f"model.layers.{i}.self_attn": DIMS for i in range(3)}
FULL = {
    "rank": 4,
    "num_state_heads": 2,
    "couple_lambda": False,
    "trainable_delta_scale": True,
    "delta_scale_granularity": "head",
    "delta_o_rmsnorm": True,
}


def changed(base: DeltaMemAdapter, **flat: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """The adapter's flat tensors with layer 1's given ones replaced, or dropped if None."""
    tensors = base.tensors()
    for key, value in flat.items():
        name = f"model.layers.1.self_attn.{key}"
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value
    return tensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("config", [{}, FULL], ids=["default", "full"])
def test_a8_round_trip_in_both_formats(tmp_path: Path, config: dict, dtype: torch.dtype) -> None:
    original = random_adapter(MODULES, dtype=dtype, **config)
    assert len(original.tensors()) == 3 * (13 if config else 9)
    for format in ("pt", "safetensors"):
        loaded = load_adapter(save_adapter(original, tmp_path / format, format))
        assert loaded.config == original.config and loaded.fingerprint == original.fingerprint
        for name, tensor in loaded.tensors().items():
            assert tensor.dtype == dtype and torch.equal(tensor, original.tensors()[name])
    assert not list(tmp_path.glob("**/*.partial"))


def test_fingerprint_covers_config_names_dtypes_and_values() -> None:
    base = random_adapter(MODULES)
    prints = {base.fingerprint, random_adapter(MODULES, dtype=torch.bfloat16).fingerprint}
    prints.add(DeltaMemAdapter(base.config.model_copy(update={"alpha": 8.0}), base.layers).fingerprint)
    bias = base.layers["model.layers.1.self_attn"]["beta_bias"].clone()
    bias[0] = torch.nextafter(bias[0], torch.tensor(9.0))
    prints.add(adapter_from_tensors(base.config, changed(base, beta_bias=bias)).fingerprint)
    renamed = {name.replace("model.", "decoder."): tensor for name, tensor in base.tensors().items()}
    prints.add(adapter_from_tensors(base.config, renamed).fingerprint)
    half = random_adapter(MODULES, dtype=torch.bfloat16)
    same_bytes = {name: tensor.view(torch.float16) for name, tensor in half.tensors().items()}
    prints.add(adapter_from_tensors(half.config, same_bytes).fingerprint)
    assert len(prints) == 6
    shuffled = dict(reversed(base.tensors().items()))
    assert adapter_from_tensors(base.config, shuffled).fingerprint == base.fingerprint


def test_safetensors_win_where_both_files_lie(tmp_path: Path) -> None:
    old, new = random_adapter(MODULES, seed=1), random_adapter(MODULES, seed=2)
    save_adapter(old, tmp_path / "a", "pt")
    save_adapter(new, tmp_path / "b", "safetensors")
    shutil.copy(tmp_path / "b" / "delta_mem_adapter.safetensors", tmp_path / "a")
    assert load_adapter(tmp_path / "a").fingerprint == new.fingerprint
    with pytest.raises(AdapterError, match=r"delta_mem_adapter\.safetensors is there already"):
        save_adapter(old, tmp_path / "a", "pt")


@pytest.mark.parametrize("key", sorted(random_adapter(MODULES, **FULL).layers["model.layers.1.self_attn"]))
def test_missing_tensor_is_named(key: str) -> None:
    base = random_adapter(MODULES, **FULL)
    with pytest.raises(AdapterError, match=rf"model\.layers\.1\.self_attn\.{key} is missing"):
        adapter_from_tensors(base.config, changed(base, **{key: None}))


def test_extra_tensor_is_named() -> None:
    base = random_adapter(MODULES)
    for key in ("lambda_bias", "delta_scale_raw", "delta_o_rmsnorm_weight", "surprise"):
        with pytest.raises(AdapterError, match=rf"layers\.1\.self_attn\.{key} with shape \(8,\) is not part"):
            adapter_from_tensors(base.config, changed(base, **{key: torch.zeros(8)}))


@pytest.mark.parametrize("key", sorted(random_adapter(MODULES, **FULL).layers["model.layers.1.self_attn"]))
def test_misshaped_tensor_is_named_with_both_shapes(key: str) -> None:
    norm = key != "delta_o_proj"  # else its weight would disagree with the new delta_o_proj first
    base = random_adapter(MODULES, **FULL | {"delta_o_rmsnorm": norm})
    good = base.layers["model.layers.1.self_attn"][key]
    for bad in (torch.zeros(good.shape[0] + 1, *good.shape[1:]), good.unsqueeze(0)):
        with pytest.raises(AdapterError) as error:
            adapter_from_tensors(base.config, changed(base, **{key: bad})).layers_for(MODULES)
        assert f"model.layers.1.self_attn.{key} has shape {tuple(bad.shape)}" in str(error.value)
        assert bad.dim() == 3 or str(tuple(good.shape)) in str(error.value)


def test_integer_tensor_is_refused() -> None:
    base = random_adapter(MODULES)
    bad = torch.zeros(8, 12, dtype=torch.int8)
    with pytest.raises(AdapterError, match=r"layers\.1\.self_attn\.memory_k_proj has dtype torch\.int8"):
        adapter_from_tensors(base.config, changed(base, memory_k_proj=bad))


def test_layers_for_checks_names_and_widths() -> None:
    base = random_adapter(MODULES, delta_heads="q,o")
    packed = base.layers_for(MODULES)
    assert list(packed) == list(MODULES) and packed["model.layers.0.self_attn"].delta_k is None
    for field in AttentionDims._fields:
        wrong = MODULES | {"model.layers.1.self_attn": DIMS._replace(**{field: 99})}
        with pytest.raises(AdapterError, match=r"tensor model\.layers\.1\.self_attn\.\w+ has shape .* expected .*99"):
            base.layers_for(wrong)
    with pytest.raises(AdapterError, match=r"layers\.3\.self_attn\.memory_q_proj is missing"):
        base.layers_for(MODULES | {"model.layers.3.self_attn": DIMS})
    stage = {"model.layers.2.self_attn": DIMS}
    with pytest.raises(AdapterError, match=r"layers\.0\.self_attn\.memory_q_proj has no place in the model"):
        base.layers_for(stage)
    assert list(base.layers_for(stage, complete=False)) == list(stage)  # a pipeline stage


def test_target_layers_must_agree_with_the_tensors() -> None:
    some = random_adapter(MODULES, target_layers=(0, 2))
    assert list(some.layers_for(MODULES)) == ["model.layers.0.self_attn", "model.layers.2.self_attn"]
    every = random_adapter(MODULES)
    narrowed = DeltaMemAdapter(every.config.model_copy(update={"target_layers": (0, 2)}), every.layers)
    with pytest.raises(AdapterError, match=r"layers\.1\.self_attn.* the config does not target it"):
        narrowed.layers_for(MODULES)


def test_hugging_face_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, asked = random_adapter(MODULES), {}
    save_adapter(base, tmp_path, "pt")

    def download(repo_id: str, **options: object) -> str:
        asked.update(repo_id=repo_id, **options)
        return str(tmp_path)

    monkeypatch.setattr(adapter, "snapshot_download", download)
    assert load_adapter("owner/name", revision="v1").fingerprint == base.fingerprint
    assert (asked["repo_id"], asked["revision"]) == ("owner/name", "v1")
    assert sorted(asked["allow_patterns"]) == [
        "delta_mem_adapter.pt",
        "delta_mem_adapter.safetensors",
        "delta_mem_config.json",
        "mem_triton.json",
    ]
    with pytest.raises(AdapterError, match="revision='v1' only goes with a Hugging Face id"):
        load_adapter(tmp_path, revision="v1")


def test_fault16_an_adapter_says_whose_requests_it_is_for_and_a_server_overrides_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The paper's adapters say nothing and are for every request. What they say is no part of the fingerprint."""
    base = random_adapter(MODULES)
    save_adapter(base, tmp_path)
    assert load_adapter(tmp_path).scope == "all" and not (tmp_path / "mem_triton.json").exists()
    assert load_adapter(tmp_path, scope="sessions").scope == "sessions"
    (tmp_path / "mem_triton.json").write_text('{"scope": "sessions"}')
    said = load_adapter(tmp_path)
    assert said.scope == "sessions" and said.fingerprint == base.fingerprint
    assert load_adapter(tmp_path, scope="all").scope == "all"
    assert load_adapter(save_adapter(said, tmp_path / "copy", "pt")).scope == "sessions"
    assert load_adapter(save_adapter(base, tmp_path)).scope == "all", "what was saved last is what is read"
    (tmp_path / "mem_triton.json").write_text('{"scope": "sessions"}')
    monkeypatch.setattr(adapter, "snapshot_download", lambda *_, **__: str(tmp_path))
    assert load_adapter("owner/name").scope == "sessions"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("\x00\x01", "cannot be read as JSON"),
        ("[" * 100_000, "cannot be read as JSON"),
        ("[]", "holds a list, expected an object"),
        ("null", "holds null, expected an object"),
        ('{"scope": "session"}', 'scope is \'session\', expected "all" or "sessions"'),
        ('{"scope": null}', "scope is None"),
        ('{"scope": ["all"]}', r"scope is \['all'\]"),
        ('{"scop": "all"}', r"unknown key 'scop'\. Did you mean \"scope\""),
    ],
)
def test_fault16_a_damaged_scope_file_is_one_line_that_names_it(tmp_path: Path, text: str, message: str) -> None:
    save_adapter(random_adapter(MODULES), tmp_path)
    (tmp_path / "mem_triton.json").write_text(text)
    with pytest.raises(AdapterError, match=message) as error:
        load_adapter(tmp_path)
    assert str(tmp_path / "mem_triton.json") in str(error.value) and "\n" not in str(error.value)


def test_bad_folders(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="neither a folder nor a Hugging Face id"):
        load_adapter(tmp_path / "nowhere" / "at" / "all")
    base, step = random_adapter(MODULES), tmp_path / "trainer" / "checkpoint-70"
    save_adapter(base, step, "pt")
    with pytest.raises(AdapterError, match=r"holds no delta_mem_config\.json; did you mean .*checkpoint-70"):
        load_adapter(tmp_path)
    assert load_adapter(step).fingerprint == base.fingerprint  # a trainer's checkpoint holds the same two files
    (step / "delta_mem_adapter.pt").unlink()
    with pytest.raises(AdapterError, match=r"holds neither delta_mem_adapter\.safetensors nor delta_mem_adapter\.pt"):
        load_adapter(step)
    config = json.loads((step / "delta_mem_config.json").read_text())
    (step / "delta_mem_config.json").write_text(json.dumps(config | {"slot_read_top_k": 2}))
    with pytest.raises(ConfigError, match="slot_read_top_k=2"):
        load_adapter(step)
    (step / "delta_mem_config.json").write_text("{")
    with pytest.raises(AdapterError, match="is not JSON"):
        load_adapter(step)


class Trap:
    """Pickles to a call that would leave a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def test_pickled_code_is_not_run(tmp_path: Path) -> None:
    base = random_adapter(MODULES)
    save_adapter(base, tmp_path, "pt")
    torch.save({**base.tensors(), "x": Trap(tmp_path / "sprung")}, tmp_path / "delta_mem_adapter.pt")
    with pytest.raises(AdapterError, match="not loaded for safety"):
        load_adapter(tmp_path)
    assert not (tmp_path / "sprung").exists()
    torch.load(tmp_path / "delta_mem_adapter.pt", weights_only=False)
    assert (tmp_path / "sprung").exists()  # control: the trap works
    for content in ([torch.zeros(1)], {"x": 1}):
        torch.save(content, tmp_path / "delta_mem_adapter.pt")
        with pytest.raises(AdapterError, match="expected a"):
            load_adapter(tmp_path)
