"""Nothing that a user or a file can cause is a traceback: one line that names what is wrong, exit code 0, 1 or 2."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mem_triton.config import ConfigError, load_config
from mem_triton.store.bank import Bank, NewEntry
from mem_triton.store.bank.fingerprint import FingerprintError, model_fingerprint
from mem_triton.systems.delta_mem import AdapterError, load_adapter
from tests.cli.fuzz_case import (
    WORDS,
    check,
    commands,
    copied,
    outcome,
    soak,
    spoil,
    spoil_arguments,
    spoil_json,
    spoil_tensor,
)
from tests.memory3.support import RECALL, TEXT
from tests.support.soak import SECONDS

ADAPTER = RECALL.parent / "adapter"
SOON = 40


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a bank, a model, texts and an export, all of them good."""
    folder = tmp_path_factory.mktemp("fuzz")
    texts = [{"id": f"i{i}", "text": sentence + ".", "n": i} for i, sentence in enumerate(TEXT.split(".")[:-1])]
    (folder / "facts.jsonl").write_text("\n".join(map(json.dumps, texts)))
    copied(RECALL, folder / "model")
    bank = str(folder / "bank")
    assert check(["write", str(folder / "model"), bank, str(folder / "facts.jsonl"), "--reference-tokens", "24"]) == 0
    with Bank.open(bank, writable=True) as opened:
        opened.add([NewEntry("plain", "plain text"), NewEntry("theirs", "their text", tenant="acme")])
        opened.export(folder / "good.tar", ["plain"])
    return folder


def run_one(place: Path, work: Path, seed: int, only_arguments: bool) -> int:
    chance = random.Random(seed)
    bank = copied(place / "bank", work / "bank")
    for name in ("facts.jsonl", "good.tar"):
        (work / name).write_bytes((place / name).read_bytes())
    model, text = place / "model", work / "facts.jsonl"
    command = chance.choice(commands(bank, model, text, work))
    if only_arguments or chance.random() < 0.5:
        command = spoil_arguments(command, chance)
    if not only_arguments:
        if command[0] == "write" and chance.random() < 0.5:
            model = copied(place / "model", work / "model")
            command = [str(model) if word == str(place / "model") else word for word in command]
            spoil(chance.choice([path for path in model.iterdir() if path.suffix in (".json", ".safetensors")]), chance)
        else:
            spoil(chance.choice([text, bank / "bank.json", work / "good.tar"]), chance)
    return check(command)


@pytest.fixture
def work(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)  # some words are relative paths
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # the variable is read by the first import
    (tmp_path / "work").mkdir()
    return tmp_path / "work"


def test_fault22_spoilt_arguments_are_one_line(place, work):
    codes = {run_one(place, work, seed, only_arguments=True) for seed in range(SOON)}
    assert {0, 2} <= codes, "some still work, and some are refused"


def test_fault22_spoilt_files_are_one_line(place, work):
    assert 2 in {run_one(place, work, seed, only_arguments=False) for seed in range(1000, 1000 + SOON)}


@pytest.mark.slow
@pytest.mark.timeout(SECONDS + 600)
def test_fault22_soak_of_spoilt_arguments_and_files(place, work):
    soak(lambda seed: run_one(place, work, seed, only_arguments=seed % 2 == 0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layers", "0-99999999999"], "--layers: '0-99999999999' is more layers than any model has"),
        (["--dtype", "float128"], "--dtype: 'float128' is not one of auto, float32"),
        (["--device", "tpu"], "--device: 'tpu' cannot be used here"),
        (["--device", "meta"], "--device: 'meta' cannot be used here"),
        (["--keep", "9" * 30], "--keep: "),
        (["--embedder", "lexicl"], 'embedder "lexicl" is unknown'),
        (["--tenant", "acme corp"], "--tenant: 'acme corp' must be 1 to 128 letters"),
        (["--commit", "abc"], "--commit"),
    ],
)
def test_fault22_options_that_cannot_be_are_named(place, work, arguments, message):
    write = ["write", str(place / "model"), str(work / "new"), str(place / "facts.jsonl")]
    code, out, err = outcome([*write, *arguments])
    assert (code, out, len(err.splitlines())) == (2, "", 1) and message in err, err
    assert not (work / "new").exists(), "a refused write leaves nothing behind"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_fault22_a_device_that_is_not_there_is_named(place, work):
    err = outcome(["write", str(place / "model"), "b", str(place / "facts.jsonl"), "--device", "cuda"])[2]
    assert err.startswith("mem-triton: --device: 'cuda' cannot be used here: ") and len(err.splitlines()) == 1


def test_fault22_numbers_without_end_are_refused(place, work):
    for arguments in (["list", "--limit", "9" * 20], ["search", "x", "--top-k", "9" * 20]):
        code, _, err = outcome(["bank", arguments[0], str(place / "bank"), *arguments[1:]])
        assert code == 2 and len(err.splitlines()) == 1 and arguments[-2] in err


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("[]", "holds a list, expected an object"),
        ("null", "holds null, expected an object"),
        ("7", "holds a number, expected an object"),
        ('{"text_config": [1]}', "text_config holds a list"),
        ('{"num_attention_heads": 0, "hidden_size": 64}', "num_attention_heads is 0, expected a whole number above 0"),
        ('{"num_attention_heads": true, "hidden_size": 64}', "num_attention_heads is True"),
        ('{"num_attention_heads": 6, "hidden_size": 64, "num_key_value_heads": 4}', "num_key_value_heads is 4"),
        ('{"architectures": 3}', "architectures is 3"),
        ("[" * 100_000, "config.json"),
    ],
)
def test_fault22_a_models_config_is_refused_by_field(tmp_path, config, message):
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(FingerprintError) as error:
        model_fingerprint(tmp_path)
    assert message in str(error.value) and str(tmp_path / "config.json") in str(error.value)


def test_fault22_a_models_files_are_refused_or_read(tmp_path):
    """Whatever is in config.json and in the headers of the weights."""
    for seed in range(300):
        chance = random.Random(seed)
        folder = copied(RECALL, tmp_path / "model")
        path = chance.choice([folder / "config.json", *folder.glob("*.safetensors")])
        spoil(path, chance)
        try:
            model_fingerprint(folder)
        except FingerprintError as error:
            assert str(folder) in str(error), seed


def spoilt_adapter(folder: Path, seed: int) -> None:
    """One of: a spoilt config, a spoilt file of either form, a spoilt tensor."""
    chance = random.Random(seed)
    tensors = folder / "delta_mem_adapter.safetensors"
    way = chance.randrange(4)
    if way == 0:
        path = folder / "delta_mem_config.json"
        path.write_text(json.dumps(spoil_json(json.loads(path.read_text()), chance)))
    elif way == 1:
        spoil(tensors, chance)
    elif way == 2:
        spoil_tensor(tensors, chance)
    else:
        torch.save(load_file(tensors), folder / "delta_mem_adapter.pt")
        tensors.unlink()
        spoil(folder / "delta_mem_adapter.pt", chance)


def test_fault22_damaged_adapters_are_refused_or_sound(tmp_path):
    refused = 0
    for seed in range(160):
        folder = copied(ADAPTER, tmp_path / "adapter")
        spoilt_adapter(folder, seed)
        try:
            adapter = load_adapter(folder)
        except (AdapterError, ConfigError) as error:
            assert str(folder) in str(error), (seed, error)
            refused += 1
            continue
        assert abs(adapter.config.alpha) < 1e7 and all(torch.isfinite(t).all() for t in adapter.tensors().values()), (
            seed
        )
    assert refused > 80


@pytest.mark.parametrize("alpha", ["NaN", "Infinity", "-Infinity", "1e300", '"x"', "null", "[]"])
def test_fault22_an_alpha_that_is_no_number_is_refused(tmp_path, alpha):
    folder = copied(ADAPTER, tmp_path / "adapter")
    config = json.loads((folder / "delta_mem_config.json").read_text())
    text = json.dumps({**config, "alpha": "ALPHA"}).replace('"ALPHA"', alpha)
    (folder / "delta_mem_config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"delta_mem_config\.json: .*alpha"):
        load_adapter(folder)


@pytest.mark.parametrize("key", ["online_gain", "delta_scale_max", "delta_o_rmsnorm_eps", "beta_bias_init"])
def test_fault22_other_numbers_of_an_adapter_are_finite(tmp_path, key):
    folder = copied(ADAPTER, tmp_path / "adapter")
    config = json.loads((folder / "delta_mem_config.json").read_text())
    (folder / "delta_mem_config.json").write_text(json.dumps({**config, key: float("inf")}))
    with pytest.raises(ConfigError, match=rf"delta_mem_config\.json: .*{key}"):
        load_adapter(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_fault22_weights_that_are_no_numbers_are_refused(tmp_path, value):
    folder = copied(ADAPTER, tmp_path / "adapter")
    path = folder / "delta_mem_adapter.safetensors"
    tensors = load_file(path)
    name = sorted(tensors)[0]
    tensors[name].view(-1)[3] = value
    save_file(tensors, path)
    with pytest.raises(AdapterError, match=f"tensor {name} holds NaN or infinity"):
        load_adapter(folder)


@pytest.mark.parametrize("data", ["[]", "null", "7", '"x"', "[" * 100_000, "{", '{"rank": 1e400}'])
def test_fault22_an_adapters_config_is_an_object(tmp_path, data):
    folder = copied(ADAPTER, tmp_path / "adapter")
    (folder / "delta_mem_config.json").write_text(data)
    with pytest.raises((AdapterError, ConfigError), match=r"delta_mem_config\.json"):
        load_adapter(folder)


def test_fault22_a_configuration_file_is_refused_by_name(tmp_path):
    good = {"delta": {"adapter": "a"}, "session_dir": "s", "memory": {"bank": "b", "retrieval": {"top_k": 5}}}
    path = tmp_path / "mem.yaml"
    for seed in range(300):
        chance = random.Random(seed)
        text = json.dumps(spoil_json(good, chance))
        odd = ["a: " + "9" * 5000, "[" * 3000, "? {1: 2}", "2020-01-01: x", "x: [", chance.choice(WORDS)]
        text = chance.choice([text, text, text[: chance.randrange(len(text) + 1)], chance.choice(odd)])
        path.write_text(text, errors="replace")
        try:
            load_config(path)
        except ConfigError as error:
            assert str(path) in str(error) and "\n" not in str(error), seed


def test_fault22_half_a_surrogate_pair_finds_what_it_can(place):
    with Bank.open(place / "bank") as bank:
        assert bank.search("badge of Hugo \ud83d", 1)[0].ref == bank.search("badge of Hugo", 1)[0].ref
        assert len(bank.search("\ud83d", 1)) == 1
        stock, asked = bank.embedder.embed, []
        bank.embedder.embed = lambda texts: asked.extend(texts) or stock(texts)
        bank.search("badge \ud83d", 1)
        assert asked == ["badge ?"], "no embedder sees what is no text"
