"""The converter of M+: a Llama, a pool with long-term rows, and back; what is missing or mis-shaped is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mem_triton.ops.reposition import rope_from_config
from mem_triton.store.bank.fingerprint import model_fingerprint
from mem_triton.systems.memoryllm.mplus import MPlusCheckpoint
from mem_triton.systems.memoryllm.pools import Pools
from tests.cli.test_cli import refused, run
from tests.memoryllm.test_convert import edited

MPLUS = Path(__file__).parents[1] / "data" / "mplus"
LLAMA_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "rope_theta": 500000.0,
    "max_position_embeddings": 131072,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
}


def copied(case: str, target: Path) -> Path:
    shutil.copytree(MPLUS / case, target)
    (target / "expected.safetensors").unlink()
    return target


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return bool((one.double() - other.double()).abs().max() < 1e-6)


@pytest.mark.parametrize("case", ["grown", "few"])
def test_a_checkpoint_of_mplus_becomes_a_llama_and_a_pool_and_comes_back(case, tmp_path):
    """By hand the authors' code at 5acaf52 reads what comes back: all names, the same picks, logits to 2e-6."""
    before = load_file(MPLUS / case / "model.safetensors")
    assert "main@1" in run("convert", "mplus", MPLUS / case, tmp_path / "dst")
    served = load_file(tmp_path / "dst" / "model" / "model.safetensors")
    assert not [name for name in served if "ltm" in name or "query_proj" in name or "key_proj" in name]
    with Pools.open(tmp_path / "dst" / "memory") as pools:
        assert pools.shape.rows == 32 and pools.shape.per_layer and pools.shape.long_term.read == 16
        state = pools.state("main")
        assert pools.verify() == [] and torch.equal(state.rows, before["memory"])
        for layer in range(3):
            (rows,) = state.long_term.rows(layer)
            assert torch.equal(rows.content[0], before[f"ltm.{layer}"])
            assert torch.equal(rows.keys, before[f"ltm_keys.{layer}"])
            assert torch.equal(state.long_term.ages_of(layer), before[f"ltm_ages.{layer}"].long())
            assert torch.equal(rows.frequencies, before[f"ltm_recall_frequencies.{layer}"].double())
    run("convert", "mplus", "--back", tmp_path / "dst", tmp_path / "back")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert set(back) == set(before)
    assert all(same(x, back[name]) for name, x in before.items() if "lora_" not in name and "base_layer" not in name)
    wanted, config = (json.loads((f / "config.json").read_text()) for f in (MPLUS / case, tmp_path / "back"))
    assert {k for k in wanted if wanted[k] != config.get(k)} <= {"lora_config", "torch_dtype"}


def test_frequencies_of_rope_are_written_and_are_the_ones_that_the_authors_round(tmp_path):
    run("convert", "mplus", MPLUS / "grown", tmp_path / "rounded")
    run("convert", "mplus", MPLUS / "grown", tmp_path / "exact", "--rope", "exact")
    configs = [json.loads((tmp_path / way / "model" / "config.json").read_text()) for way in ("rounded", "exact")]
    rounded, exact = (torch.tensor(rope_from_config(config).inv_freq, dtype=torch.float64) for config in configs)
    assert torch.equal(rounded, exact.float().bfloat16().double()) and not torch.equal(rounded, exact)
    prints = [model_fingerprint(tmp_path / way / "model") for way in ("rounded", "exact")]
    assert any("mem_triton_inv_freq" in line for line in prints[0].differences(prints[1])), "and is named"
    for given, message in (([1.0], "expected 4 numbers"), ("x", "expected 4 numbers"), ([1.0, 0, 1, 1], "above 0")):
        with pytest.raises(ValueError, match=message):
            rope_from_config({**configs[0], "mem_triton_inv_freq": given})


def test_frequencies_of_llama_3_1_are_rounded_as_transformers_computes_them():
    """At the text's first position, 12,801, 12 of 64 channel pairs are off by more than a radian from exact ones."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    checkpoint = object.__new__(MPlusCheckpoint)
    checkpoint.config = LLAMA_8B
    ours = torch.tensor(checkpoint.frequencies(), dtype=torch.float64)
    theirs, _ = ROPE_INIT_FUNCTIONS["llama3"](LlamaConfig(**LLAMA_8B), "cpu")
    assert torch.equal(ours, theirs.bfloat16().double())
    exact = torch.tensor(rope_from_config(LLAMA_8B).inv_freq, dtype=torch.float64)
    assert int((12_801 * (ours - exact).abs() > 1).sum()) == 12


def test_a_copy_with_the_published_configurations_numbers_sharded(tmp_path):
    """32 layers, 50 blocks of 256 of which 10 are long-term, 5,120 rows; narrow, and split over three files."""
    config = json.loads((MPLUS / "few" / "config.json").read_text()) | {
        **{"num_hidden_layers": 32, "num_blocks": 50, "num_tokens": 256, "num_ltm_blocks": 10},
        **{"num_memory_tokens": 12_800, "ltm_initial_size": 5_120, "update_ltm_frequency": 60},
        **{"hidden_size": 8, "head_dim": 2, "intermediate_size": 8, "selector_hidden_dim": 4},
        **{"selector_layers": list(range(32)), "initial_rf_when_moving_stm_to_ltm": 10},
    }
    source = tmp_path / "src"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(config))
    shapes = {"model.embed_tokens.weight": (96, 8), "lm_head.weight": (96, 8), "model.norm.weight": (8,)}
    shapes |= {"memory": (32, 10_240, 8), "bos_embedding": (32, 1, 8), "new_memory_positional_emb": (1, 1, 8)}
    for layer in range(32):
        shapes |= {f"ltm.{layer}": (5_120, 8), f"ltm_keys.{layer}": (5_120, 4)}
        shapes |= {f"ltm_{part}.{layer}": (5_120,) for part in ("ages", "recall_frequencies")}
        stem = f"model.layers.{layer}"
        shapes |= {f"{stem}.self_attn.{x}_proj.weight": (4, 8) for x in ("query", "key")}
        shapes |= {f"{stem}.self_attn.{x}_proj.weight": (8, 8) for x in "qo"}
        shapes |= {f"{stem}.self_attn.{x}_proj.weight": (4, 8) for x in "kv"}
        shapes |= {f"{stem}.mlp.{x}_proj.weight": (8, 8) for x in ("gate", "up", "down")}
        shapes |= {f"{stem}.{x}_layernorm.weight": (8,) for x in ("input", "post_attention")}
    names, files = sorted(shapes), {}
    for i in range(3):
        file = f"model-{i + 1:05d}-of-00003.safetensors"
        save_file({name: torch.ones(shapes[name], dtype=torch.bfloat16) for name in names[i::3]}, source / file)
        files |= dict.fromkeys(names[i::3], file)
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    run("convert", "mplus", source, tmp_path / "dst")
    info = json.loads(run("pool", "info", tmp_path / "dst" / "memory", "--json"))
    assert info["rows"] == 10_240 and info["dtype"] == "bfloat16"
    assert info["long_term"] == {"read": 2_560, "merge": 15_360, "first": 10.0, "decay": 1.0, "keys": 4}
    assert len(list((tmp_path / "dst" / "model").glob("*.safetensors"))) == 3
    with Pools.open(tmp_path / "dst" / "memory") as pools:
        assert pools.state("main").long_term.count(31) == (5_120, 0)


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        ({"num_ltm_blocks": "gone"}, None, "this is no M+; use `mem-triton convert memoryllm`"),
        ({"num_ltm_blocks": 6}, None, "num_ltm_blocks is 6, of num_blocks 6, which leaves no pool"),
        ({"update_ltm_mode": "decay"}, None, "update_ltm_mode is 'decay'"),
        ({"update_ltm_frequency": None}, None, "update_ltm_frequency is None"),
        ({"decay_frequency": 0}, None, "decay_frequency is 0"),
        ({"num_selector_layers": 3}, None, "num_selector_layers is 3"),
        ({"ltm_initial_size": 21}, None, "ltm.0 is [20, 32], config.json says [21, 32]"),
        ({"ltm_initial_size": 0}, None, "ltm_initial_size is 0"),
        ({"selector_hidden_dim": 8}, None, "ltm_keys.0 is [20, 16], config.json says [20, 8]"),
        ({"hidden_act": "tanh"}, None, "hidden_act is 'tanh'"),
        ({"num_blocks": 7}, None, "num_memory_tokens is 48, num_blocks * num_tokens 56"),
        (None, lambda t: t.pop("ltm.2"), "has no tensor ltm.2"),
        (None, lambda t: t.pop("ltm_ages.1"), "has no tensor ltm_ages.1"),
        (None, lambda t: t.pop("model.layers.1.self_attn.query_proj.2.weight"), "query_proj.2.weight"),
        (None, lambda t: t.__setitem__("ltm_keys.1", torch.zeros(19, 16)), "ltm_keys.1 is [19, 16]"),
        (None, lambda t: t["ltm.1"].__setitem__((0, 0), float("nan")), "ltm.1 holds NaN"),
        (None, lambda t: t["ltm_ages.1"].__setitem__(0, float("inf")), "ltm_ages.1 holds NaN or infinity"),
    ],
)
def test_what_is_missing_or_does_not_fit_is_named_and_nothing_is_left(tmp_path, config, change, message):
    source = edited(copied("grown", tmp_path / "src"), config, change)
    assert message in refused("convert", "mplus", source, tmp_path / "dst")
    assert not (tmp_path / "dst").exists()


def test_each_converter_names_the_other_and_options_are_checked(tmp_path):
    source = copied("few", tmp_path / "src")
    assert "use `mem-triton convert mplus`" in refused("convert", "memoryllm", source, tmp_path / "dst")
    assert "--rope: 'half' is not one of bf16, exact" in refused("convert", "mplus", source, "x", "--rope", "half")
    assert not (tmp_path / "dst").exists()
