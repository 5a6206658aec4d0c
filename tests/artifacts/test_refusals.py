"""What cannot be imported is one line that names the file, the field and what to do; nothing is written then."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from mem_triton.store.bank.formats import locate as places
from mem_triton.store.bank.formats.cartridge import best_name
from mem_triton.store.errors import ArtifactError
from tests.cli.test_cli import refused, run
from tests.support.models import save_tiny_model
from tests.support.trained import chance_cache, load_model, save_adapter, save_cartridge, save_model

LISTS = ("trainable_keys", "trainable_values", "fixed_keys", "fixed_values")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("base") / "tiny-llama")


@pytest.fixture(scope="module")
def saved(base, tmp_path_factory) -> Path:
    """A good adapter of each kind, a good cartridge in a folder, and another whose model has another name."""
    from peft import CartridgeConfig, PromptTuningConfig

    folder = tmp_path_factory.mktemp("saved")
    save_adapter(folder / "adapter", base, CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=6))
    save_adapter(folder / "prompt", base, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=6))
    save_cartridge(folder / "run" / "cache_last.pt", *chance_cache(load_model(base), 6))
    return folder


def edited(folder: Path, target: Path, **fields: Any) -> Path:
    """A copy of an adapter whose config says something else."""
    shutil.copytree(folder, target)
    file = target / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    return target


def no_import(base: Path, source: Path, *options: object) -> str:
    """The line that an import is refused with; there is no bank then."""
    bank = source.parent / "refused.bank"
    line = refused("import", source, bank, "--model", base, *options)
    assert not bank.exists()
    return line


@pytest.mark.parametrize(
    ("fields", "messages"),
    [
        ({"num_layers": 3}, ["num_layers: 3, the model has 2", "import it with the model"]),
        ({"num_attention_heads": 4}, ["num_attention_heads (KV heads): 4, the model has 2"]),
        ({"token_dim": 128}, ["token_dim: 128, the model has 2 KV heads of 32"]),
        ({"num_virtual_tokens": 7}, ["prompt_embeddings is (6, 256)", "say [7, 256]", "fetch both"]),
        ({"num_virtual_tokens": "six"}, ["num_virtual_tokens: 'six', expected a whole number"]),
        ({"num_frozen_tokens": 9}, ["num_frozen_tokens: 9, expected 0 to 6"]),
        ({"task_type": "SEQ_2_SEQ_LM"}, ["task_type: 'SEQ_2_SEQ_LM', expected CAUSAL_LM"]),
        ({"num_transformer_submodules": 2}, ["num_transformer_submodules: 2, expected 1; encoder-decoder"]),
        ({"peft_type": "LORA"}, ["peft_type: 'LORA' holds no keys and values", "LoRA"]),
        ({"base_model_name_or_path": "meta-llama/Llama-3.2-1B"}, ["meta-llama/Llama-3.2-1B", "--force"]),
    ],
)
def test_an_adapter_that_does_not_fit_names_the_field(base, saved, tmp_path, fields, messages):
    line = no_import(base, edited(saved / "adapter", tmp_path / "bad", **fields))
    assert str(tmp_path / "bad" / "adapter_") in line and all(message in line for message in messages), line
    assert "imported" in run("import", saved / "adapter", tmp_path / "good.bank", "--model", base), "the control"


def test_embeddings_of_another_width_name_the_field(base, saved, tmp_path):
    line = no_import(base, edited(saved / "prompt", tmp_path / "bad", token_dim=96))
    assert "adapter_config.json: token_dim: 96, the model has 64" in line


def test_force_imports_what_was_trained_with_a_model_of_another_name(base, saved, tmp_path):
    other = edited(saved / "adapter", tmp_path / "other", base_model_name_or_path="somebody/else")
    said = run("import", other, tmp_path / "bank", "--model", base, "--force", both=True)
    assert "imported because of --force" in said and "other@1 imported" in said
    moved = edited(saved / "adapter", tmp_path / "moved", base_model_name_or_path=f"hub/{base.name.upper()}")
    assert "moved@1" in run("import", moved, tmp_path / "bank", "--model", base), "the same model, elsewhere"


@pytest.mark.parametrize(
    ("spoil", "messages"),
    [
        (lambda t: t["prompt_embeddings"].__setitem__((0, 0), float("nan")), ["prompt_embeddings holds NaN"]),
        (lambda t: t["prompt_embeddings"].__setitem__((0, 0), float("inf")), ["prompt_embeddings holds NaN or inf"]),
        (lambda t: t.update(classifier=torch.zeros(2)), ["classifier", "modules_to_save"]),
        (lambda t: t.update(x=t.pop("prompt_embeddings")), ["has no tensor prompt_embeddings"]),
        (lambda t: t.update(prompt_embeddings=t["prompt_embeddings"].int()), ["torch.int32, expected floats"]),
    ],
)
def test_tensors_of_an_adapter_that_cannot_be_are_named(base, saved, tmp_path, spoil, messages):
    folder = edited(saved / "adapter", tmp_path / "bad")
    tensors = load_file(folder / "adapter_model.safetensors")
    spoil(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")
    line = no_import(base, folder)
    assert "adapter_model.safetensors" in line and all(message in line for message in messages)


def test_files_that_are_cut_off_or_missing(base, saved, tmp_path):
    folder = edited(saved / "adapter", tmp_path / "bad")
    weights = folder / "adapter_model.safetensors"
    whole = weights.read_bytes()
    for size in (0, 5, len(whole) - 40):
        weights.write_bytes(whole[:size])
        assert "cut off: fetch it again" in no_import(base, folder)
    weights.unlink()
    assert "adapter_model.safetensors" in no_import(base, folder)
    (folder / "adapter_config.json").write_text("[" * 100_000)
    assert "adapter_config.json" in no_import(base, folder)
    cut = tmp_path / "cut.pt"
    whole = (saved / "run" / "cache_last.pt").read_bytes()
    for size in (0, 300, len(whole) // 2, len(whole) - 10):
        cut.write_bytes(whole[:size])
        assert "cut off: fetch it again" in no_import(base, cut)


def test_an_adapter_in_a_pickle_is_read_without_running_it(base, saved, tmp_path):
    folder = edited(saved / "adapter", tmp_path / "old")
    tensors = load_file(folder / "adapter_model.safetensors")
    (folder / "adapter_model.safetensors").unlink()
    torch.save(tensors, folder / "adapter_model.bin")
    assert "old@1 imported" in run("import", folder, tmp_path / "bank", "--model", base)
    torch.save({**tensors, "evil": Evil(tmp_path / "ran")}, folder / "adapter_model.bin")
    assert "posix.system" in no_import(base, folder) and not (tmp_path / "ran").exists()


class Evil:
    """Unpickled, it runs a command."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable, tuple]:
        return os.system, (f"touch {self.mark}",)


class Custom:
    pass


def test_a_class_in_a_cartridge_is_refused_by_name_and_never_run(base, saved, tmp_path):
    file, mark = tmp_path / "c.pt", tmp_path / "ran"
    good = torch.load(saved / "run" / "cache_last.pt", weights_only=False)
    torch.save({**good, "note": Evil(mark)}, file)
    assert "posix.system" in no_import(base, file) and not mark.exists()
    torch.save({**good, "note": Custom()}, file)
    assert "tests.artifacts.test_refusals.Custom" in no_import(base, file)
    torch.load(saved / "run" / "cache_last.pt", weights_only=False)
    torch.save({"note": Evil(mark)}, file)
    torch.load(file, weights_only=False)
    assert mark.exists(), "the control: read as the official loader does, it runs"
    with pytest.raises(Exception, match="ParameterList"):
        torch.load(saved / "run" / "cache_last.pt", weights_only=True)  # nothing was allowed for the process for good


def cartridge(saved: Path, target: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    held = torch.load(saved / "run" / "cache_last.pt", weights_only=False)
    change(held)
    torch.save(held, target)
    return target


def rows(held: dict[str, Any], name: str, change: Callable[[torch.Tensor], torch.Tensor], layer: int = 0) -> None:
    held[name] = nn.ParameterList(
        [nn.Parameter(change(x.detach()) if i == layer else x.detach()) for i, x in enumerate(held[name])]
    )


def hostile(held: dict[str, Any]) -> None:
    rows(held, "trainable_keys", lambda x: torch.zeros(1).expand(1, 2, 1 << 30, 32))


@pytest.mark.parametrize(
    ("change", "messages"),
    [
        (lambda h: h.update(trainable_keys=nn.ParameterList(list(h["trainable_keys"])[:1])), ["trainable_keys has 1"]),
        (lambda h: rows(h, "trainable_keys", lambda x: x[..., :16]), ["trainable_keys[0] is [1, 2, 5, 16]", "32]"]),
        (lambda h: rows(h, "fixed_values", lambda x: x[:, :1], 1), ["fixed_values[1] is [1, 1, 1, 32]", "1, 2, rows"]),
        (lambda h: rows(h, "trainable_values", lambda x: x[:, :, :3]), ["values have [4, 6] rows"]),
        (lambda h: rows(h, "trainable_keys", lambda x: x * float("nan")), ["trainable_keys[0] holds NaN or infinity"]),
        (lambda h: h.pop("fixed_values"), ["has no fixed_values"]),
        (lambda h: h.update(trainable_keys=3), ["trainable_keys is no list of tensors"]),
        (lambda h: h.update(attention_biases=[torch.zeros(1)]), ["attention_biases", "hybrid"]),
        (lambda h: h.update(gdn_state=[torch.zeros(1)]), ["gdn_state", "hybrid"]),
        (lambda h: h.update(more=[torch.zeros(1)]), ["holds more", "upgrade"]),
        (hostile, ["trainable_keys[0] is larger than what is stored"]),
    ],
)
def test_a_cartridge_that_does_not_fit_names_the_tensor(base, saved, tmp_path, change, messages):
    line = no_import(base, cartridge(saved, tmp_path / "bad.pt", change))
    assert "bad.pt" in line and all(message in line for message in messages)


def test_a_squeezed_pickle_is_refused(base, saved, tmp_path):
    squeezed = zipfile.ZipFile(tmp_path / "small.pt", "w", zipfile.ZIP_DEFLATED)
    with zipfile.ZipFile(saved / "run" / "cache_last.pt") as whole, squeezed as small:
        for name in whole.namelist():
            small.writestr(name, whole.read(name))
    assert "is compressed" in no_import(base, tmp_path / "small.pt")


def config_of(base: Path, target: Path, **fields: Any) -> Path:
    shutil.copytree(base, target)
    config = json.loads((target / "config.json").read_text()) | fields
    (target / "config.json").write_text(json.dumps(config))
    return target


ROPE = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rope_parameters": ROPE}, "rope_parameters.rope_type: keys of 'dynamic' cannot be moved"),
        ({"rope_parameters": {**ROPE, "rope_type": "longrope"}}, "rope_parameters.rope_type: keys of 'longrope'"),
        ({"sliding_window": 256}, "sliding_window: 256"),
        ({"layer_types": ["sliding_attention", "full_attention"]}, "layer_types: has sliding_attention"),
        ({"layer_types": ["linear_attention", "full_attention"]}, "layer_types: has linear_attention"),
        ({"attention_chunk_size": 64}, "attention_chunk_size: 64"),
        ({"kv_lora_rank": 512}, "kv_lora_rank: 512 (latent attention)"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder"),
        ({"max_position_embeddings": 6}, "6 rows, the model's max_position_embeddings is 6"),
    ],
)
def test_a_model_that_cannot_read_rows_names_the_field(base, saved, tmp_path, fields, message):
    model = config_of(base, tmp_path / "tiny-llama", **fields)
    line = no_import(model, edited(saved / "adapter", tmp_path / "adapter"))
    assert message in line


def test_a_window_that_is_switched_off_or_longer_than_the_context_is_none(base, saved, tmp_path):
    for i, fields in enumerate(({"sliding_window": 8, "use_sliding_window": False}, {"sliding_window": 4096})):
        model = config_of(base, tmp_path / str(i) / "tiny-llama", **fields)
        assert "@1 imported" in run("import", saved / "adapter", tmp_path / f"{i}.bank", "--model", model)


def test_banks_that_cannot_take_imports(base, saved, tmp_path):
    run("bank", "create", tmp_path / "sparse", "--model", base, "--kind", "memory3")
    line = refused("import", saved / "adapter", tmp_path / "sparse", "--model", base)
    assert "BANK: kind is memory3" in line
    other = save_tiny_model(tmp_path / "qwen", "qwen3")
    run("bank", "create", tmp_path / "theirs", "--model", other, "--kind", "prefix")
    assert "was made with another model" in refused("import", saved / "adapter", tmp_path / "theirs", "--model", base)
    run("bank", "create", tmp_path / "rounding", "--model", base, "--kind", "prefix", "--codec", "int8")
    said = run("import", saved / "adapter", tmp_path / "rounding", "--model", base, both=True)
    assert "so imports are rounded" in said
    (tmp_path / "note.txt").write_text("a text")
    run("write", base, tmp_path / "mine", tmp_path / "note.txt", "--kind", "prefix", "--quiet")
    line = refused("import", saved / "adapter", tmp_path / "mine", "--model", base, "--id", "note")
    assert '--id: "note" is the text of' in line
    line = refused("import", saved / "adapter", tmp_path / "mine", "--model", base, "--id", "capture:x")
    assert "kept for captures" in line


def test_options_that_mean_nothing(base, saved, tmp_path):
    one, two, bank = saved / "adapter", saved / "run", tmp_path / "bank"
    for arguments, message in (
        ([one, bank, "--as", "gguf"], "--as"),
        ([one, bank, "--id", "a b"], "--id"),
        ([one, bank, "--compose", "--id", "x"], "--compose: name at least two"),
        ([one, two, bank, "--compose"], "--id: a composed entry needs one"),
        ([one, two, bank, "--id", "x"], "--id, --file and --revision are of one SOURCE"),
        ([one, bank, "--file", "adapter_model.safetensors", "--as", "cartridge"], "--file"),
        ([one, bank, "--file", "none.pt"], "has no none.pt; it has README.md, adapter_config.json"),
        ([two / "cache_last.pt", bank, "--file", "x.pt"], "is a file itself"),
        ([one, bank, "--as", "cartridge"], "has no cartridge.pt, cache_last.pt or cache-step*.pt"),
        ([two, bank, "--as", "peft"], "has no adapter_config.json"),
        ([one, bank, "--revision", "main"], "--revision"),
        ([tmp_path / "nowhere", bank], "there is no file or folder"),
        ([tmp_path, bank], "has no adapter_config.json, cartridge.pt"),
    ):
        assert message in refused("import", *arguments, "--model", base), arguments
        assert not bank.exists()


def test_exports_that_mean_nothing(base, saved, tmp_path):
    bank, out = tmp_path / "bank", tmp_path / "out"
    run("import", saved / "adapter", bank, "--model", base)
    for arguments, message in (
        (["adapter", "--as", "peft"], "bank export BANK ID --as peft OUT"),
        (["adapter", "--as", "gguf", out], "--as"),
        (["adapter", out], "OUT: goes with --as peft"),
        (["nobody", "--as", "peft", out], "nobody"),
        (["adapter", "--as", "peft", saved], "is there already"),
    ):
        assert message in refused("bank", "export", bank, *arguments), arguments
    (tmp_path / "t.txt").write_text("The key of the east door is with Hugo, and the desk of Nina is cedar.")
    run("write", base, tmp_path / "sparse", tmp_path / "t.txt", "--quiet", "--kind", "memory3")
    assert "sparse" in refused("bank", "export", tmp_path / "sparse", "t", "--as", "peft", out)
    assert not out.exists()


def test_which_cartridge_of_a_folder_is_taken(base, saved, tmp_path):
    steps = ["cache-step9.pt", "cache-step100.pt", "cache-stepx.pt", "config.yaml"]
    assert best_name(steps) == "cache-step100.pt"
    assert best_name([*steps, "cache_last.pt"]) == "cache_last.pt"
    assert best_name([*steps, "cache_last.pt", "cartridge.pt"]) == "cartridge.pt"
    assert best_name(["model.pt"]) is None
    shutil.copy(saved / "run" / "cache_last.pt", tmp_path / "mine.pt")
    assert "x@1 imported" in run("import", tmp_path, tmp_path / "b", "--model", base, "--file", "mine.pt", "--id", "x")


def test_a_config_with_python_tags_gives_its_models_name_and_runs_nothing(base, saved, tmp_path):
    folder, mark = tmp_path / "run", tmp_path / "ran"
    shutil.copytree(saved / "run", folder)
    tags = f"evil: !!python/object/apply:os.system ['touch {mark}']\nkv: !!python/tuple [1, 2]\n"
    for name, text, stale in (
        ("a", f"{tags}model: !!python/object:cartridges.HF\n  pretrained_model_name_or_path: x/{base.name}\n", False),
        ("b", f"{tags}model:\n  value:\n    pretrained_model_name_or_path: meta/Other-1B\n", True),
        ("c", "model: [", False),
        ("d", "a: &a [*a]\nmodel: *a", False),
        ("e", "[" * 50_000, False),
        ("f", "\0", False),
    ):
        (folder / "config.yaml").write_text(text)
        said = run("import", folder, tmp_path / f"{name}.bank", "--model", base, both=True)
        assert "run@1 imported" in said and ("config.yaml names meta/Other-1B" in said) == stale, name
    assert not mark.exists()


def test_a_repository_is_asked_for_no_more_than_is_read(base, saved, tmp_path, monkeypatch):
    asked = []

    class Api:
        def list_repo_files(self, source: str, revision: str | None = None) -> list[str]:
            asked.append((source, revision))
            return ["README.md", "cache-step1.pt", "cache-step20.pt", "config.yaml", "other.pt"]

    def snapshot(source: str, revision: str | None = None, allow_patterns: list[str] | None = None, **_: Any) -> str:
        asked.append((source, revision, allow_patterns))
        shutil.copytree(saved / "run", tmp_path / "hub", dirs_exist_ok=True)
        (tmp_path / "hub" / "cache_last.pt").rename(tmp_path / "hub" / "cache-step20.pt")
        return str(tmp_path / "hub")

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    said = run("import", "somebody/cartridge-x", tmp_path / "bank", "--model", base, "--revision", "v2")
    assert "cartridge-x@1 imported" in said
    assert asked[0] == ("somebody/cartridge-x", "v2")
    assert asked[1][2][0] == "cache-step20.pt" and "other.pt" not in asked[1][2]


def test_a_repository_that_does_not_answer_is_one_line(base, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    line = refused("import", "somebody/none", tmp_path / "bank", "--model", base)
    assert '"somebody/none" is no file or folder, and Hugging Face did not give it' in line
    with pytest.raises(ArtifactError, match="somebody/x has no adapter_config"):
        places.choose("somebody/x", [], "auto", None)
