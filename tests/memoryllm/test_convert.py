"""The converter: an ordinary Llama and a store of pools out of checkpoints of the authors' code, and back."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mem_triton.systems.memoryllm.checkpoint import Checkpoint
from mem_triton.systems.memoryllm.pools import Pools
from mem_triton.systems.memoryllm.records import PoolError
from mem_triton.systems.memoryllm.shape import LongTermShape, PoolShape
from mem_triton_transformers import apply_mem_triton, inject
from tests.cli.test_cli import refused, run
from tests.memoryllm.test_pools import GOLDEN
from tests.support.models import tiny_tokenizer

CASES = ("plain", "adapters")


def copied(case: str, target: Path) -> Path:
    shutil.copytree(GOLDEN / case, target)
    (target / "expected.safetensors").unlink()
    return target


def edited(source: Path, config: dict[str, Any] | None = None, change: Callable[[dict], Any] | None = None) -> Path:
    file = source / "config.json"
    said = {**json.loads(file.read_text()), **(config or {})}
    file.write_text(json.dumps({key: value for key, value in said.items() if value != "gone"}))
    if change is not None:
        tensors = load_file(source / "model.safetensors")
        change(tensors)
        save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    return source


def served(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_becomes_a_llama_and_pools_and_comes_back(case, tmp_path):
    source = copied(case, tmp_path / "src")
    said = run("convert", "memoryllm", source, tmp_path / "dst")
    before = load_file(source / "model.safetensors")
    model = served(tmp_path / "dst" / "model")
    assert type(model).__name__ == "LlamaForCausalLM"
    with Pools.open(tmp_path / "dst" / "memory") as pools:
        info = pools.info("main")
        assert pools.shape.per_layer == (case == "adapters") and pools.verify() == []
        if case == "plain":
            assert info.version == 0 and "has no rows yet" in said
        else:
            assert info.version == 1 and "main@1" in said and torch.equal(pools.rows("main@1"), before["memory"])
    name = "model.layers.1.self_attn.q_proj"
    if case == "adapters":
        a, b = (before[f"{name}.lora_{x}.decoder_adapter.weight"].double() for x in "AB")
        merged = before[f"{name}.base_layer.weight"].double() + 2.0 * b @ a
        assert (model.state_dict()[f"{name}.weight"] - merged).abs().max() < 1e-6, "what reads is merged"
    else:
        assert torch.equal(model.state_dict()[f"{name}.weight"], before[f"{name}.weight"])
    run("convert", "memoryllm", "--back", tmp_path / "dst", tmp_path / "back")
    back = Checkpoint(tmp_path / "back", "float32")
    assert back.shape == Checkpoint(source, "float32").shape and back.initialized == (case == "adapters")
    assert torch.equal(back.tensor("bos_embedding"), before["bos_embedding"])
    if case == "adapters":
        assert torch.equal(back.tensor("memory"), before["memory"])
        for adapter, other in (("default", "default"), ("decoder_adapter", "decoder_adapter")):
            weight = {}
            for where, tensors in (("before", before), ("back", load_file(tmp_path / "back" / "model.safetensors"))):
                lora = json.loads(((source if where == "before" else tmp_path / "back") / "config.json").read_text())
                scale = lora["lora_config"]["lora_alpha"] / lora["lora_config"]["r"]
                a, b = (tensors[f"{name}.lora_{x}.{other}.weight"].double() for x in "AB")
                weight[where] = tensors[f"{name}.base_layer.weight"].double() + scale * b @ a
            assert (weight["before"] - weight["back"]).abs().max() < 1e-6, f"{adapter} gives the same weights"
    run("convert", "memoryllm", tmp_path / "back", tmp_path / "again")
    again = served(tmp_path / "again" / "model").state_dict()
    assert all((x - again[n]).abs().max() < 1e-6 for n, x in model.state_dict().items())


def test_shards_and_precision(tmp_path):
    source = copied("adapters", tmp_path / "src")
    tensors = load_file(source / "model.safetensors")
    run("convert", "memoryllm", source, tmp_path / "one")
    names, files = sorted(tensors), {}
    for i in range(3):  # a linear's adapters and its weight lie in different files
        files |= dict.fromkeys(names[i::3], f"model-{i + 1:05d}-of-00003.safetensors")
        save_file({n: tensors[n] for n in names[i::3]}, source / f"model-{i + 1:05d}-of-00003.safetensors")
    (source / "model.safetensors").unlink()
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    run("convert", "memoryllm", source, tmp_path / "three")
    one, three = served(tmp_path / "one" / "model"), served(tmp_path / "three" / "model")
    assert all(torch.equal(x, three.state_dict()[n]) for n, x in one.state_dict().items())
    assert len(list((tmp_path / "three" / "model").glob("*.safetensors"))) == 3
    run("convert", "memoryllm", source, tmp_path / "half", "--dtype", "bfloat16")
    with Pools.open(tmp_path / "half" / "memory") as pools:
        assert pools.rows("main").dtype == torch.bfloat16
    assert load_file(next((tmp_path / "half" / "model").glob("*.safetensors"))).popitem()[1].dtype == torch.bfloat16
    (source / "model-00002-of-00003.safetensors").unlink()
    assert "model-00002-of-00003.safetensors is missing" in refused("convert", "memoryllm", source, tmp_path / "x")


def test_the_tokenizer_puts_no_bos_before_a_text(tmp_path):
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    source = copied("plain", tmp_path / "src")
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    tokenizer.bos_token = "<|im_start|>"
    tokenizer.save_pretrained(source)
    assert AutoTokenizer.from_pretrained(source).encode("a")[0] == 1, "the control"
    run("convert", "memoryllm", source, tmp_path / "dst")
    assert AutoTokenizer.from_pretrained(tmp_path / "dst" / "model").encode("a") == tokenizer.encode("a")[1:]


def spoilt_factor(tensors: dict[str, torch.Tensor]) -> None:
    name = "model.layers.1.mlp.down_proj.lora_A.decoder_adapter.weight"
    name = next(n for n in tensors if n.endswith(name))
    tensors[name] = tensors[name][:3].clone()


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        ({"num_tokens": "gone"}, None, "num_tokens is None"),
        ({"num_blocks": 0}, None, "num_blocks is 0"),
        ({"num_blocks": 5}, None, "num_memory_tokens is 32, num_blocks * num_tokens 40"),
        ({"num_blocks": 5, "num_memory_tokens": 40}, None, "memory is [3, 32, 32], config.json says [3, 40, 32]"),
        ({"num_ltm_blocks": 10}, None, "num_ltm_blocks: this is M+; use `mem-triton convert mplus`"),
        ({"lora_config": None}, None, "lora_config is missing"),
        ({"lora_config": {"r": 4}}, None, "lora_config needs r and lora_alpha, numbers above 0"),
        ({"lora_config": [0]}, None, "lora_config needs r and lora_alpha, numbers above 0, and is [0]"),
        ({"lora_config": {"r": 0, "lora_alpha": 8}}, None, "lora_config needs r and lora_alpha, numbers above 0"),
        ({"vocab_size": 97}, None, "model.embed_tokens.weight is [96, 32]"),
        (None, lambda t: t.pop("memory"), "has no tensor memory"),
        (None, lambda t: t.pop("bos_embedding"), "has no tensor bos_embedding"),
        (None, lambda t: t.pop("model.layers.1.mlp.down_proj.lora_B.decoder_adapter.weight"), "down_proj.lora_B.dec"),
        (None, spoilt_factor, "lora_A.decoder_adapter is [3, "),
        (None, lambda t: t["memory"].__setitem__((0, 0, 0), float("nan")), "memory: holds NaN"),
    ],
)
def test_a_checkpoint_that_cannot_be_names_what_is_wrong_and_leaves_nothing(tmp_path, config, change, message):
    source = edited(copied("adapters", tmp_path / "src"), config, change)
    assert message in refused("convert", "memoryllm", source, tmp_path / "dst")
    assert not (tmp_path / "dst").exists()


def test_files_and_options_that_cannot_be(tmp_path):
    source = copied("plain", tmp_path / "src")
    assert "--dtype" in refused("convert", "memoryllm", source, tmp_path / "dst", "--dtype", "int3")
    assert "is there already" in refused("convert", "memoryllm", source, source)
    assert "is no store of pools" in refused("convert", "memoryllm", "--back", source, tmp_path / "out")
    weights = (source / "model.safetensors").read_bytes()
    for data in (weights[:100], weights[:-50], b""):
        (source / "model.safetensors").write_bytes(data)
        assert "fetch the checkpoint again" in refused("convert", "memoryllm", source, tmp_path / "dst")
    (source / "config.json").write_text("[")
    assert "config.json" in refused("convert", "memoryllm", source, tmp_path / "dst")
    assert not (tmp_path / "dst").exists()


def test_the_pools_of_a_converted_checkpoint_on_the_command_line(tmp_path):
    run("convert", "memoryllm", copied("adapters", tmp_path / "src"), tmp_path / "dst")
    memory, out = tmp_path / "dst" / "memory", tmp_path / "out.safetensors"
    assert json.loads(run("pool", "list", memory, "--json"))[0]["version"] == 1
    assert json.loads(run("pool", "info", memory, "--json"))["keys_and_values_bytes"] == 2 * 3 * 33 * 2 * 8 * 4
    assert "forked mine@1" in run("pool", "fork", memory, "main", "mine")
    assert "exported mine@1" in run("pool", "export", memory, "mine@1", out)
    assert torch.equal(load_file(out)["memory"], load_file(GOLDEN / "adapters" / "model.safetensors")["memory"])
    assert "stored mine@1" in run("pool", "snapshot", memory, "mine") and "removed 0" in run(
        "pool", "compact", memory, "mine"
    )
    assert "all well: 2 pools" in run("pool", "verify", memory)
    assert "main" in run("pool", "list", memory) and "rows" in run("pool", "info", memory)
    (memory / "pools" / "notes.txt").write_text("mine")
    run("pool", "fork", memory, "main", "broken")
    (memory / "pools" / "broken" / "pool.json").write_text("{")
    listed = run("pool", "list", memory, both=True)
    assert "mine" in listed and "notes.txt: has no pool.json" in listed and "broken/pool.json" in listed
    assert json.loads(run("pool", "info", memory, "--json"))["pools"] == 2
    problems = run("pool", "verify", memory, code=1)
    assert "notes.txt: has no pool.json, so it is no pool" in problems and "broken/pool.json" in problems
    shutil.rmtree(memory / "pools" / "broken")
    (memory / "pools" / "notes.txt").unlink()
    run("pool", "delete", memory, "main")
    assert 'pool "main" is unknown' in refused("pool", "export", memory, "main", out)
    assert '"mine@4" is gone or not there yet' in refused("pool", "export", memory, "mine@4", out)
    (next((memory / "pools" / "mine").glob("*.snapshot.*"))).write_bytes(b"x")
    assert "snapshot.safetensors" in run("pool", "verify", memory, code=1)


def test_tied_embeddings_and_the_7b_branchs_configuration(tmp_path):
    """Its code has four keys fewer, and a first write of it adds no embedding."""
    source = edited(copied("plain", tmp_path / "src"), change=lambda t: t.pop("lm_head.weight"))
    gone = dict.fromkeys(("num_memory_tokens", "drop_memory_per_layer", "add_decoder_lora", "lora_config"), "gone")
    edited(source, {**gone, "tie_word_embeddings": True})
    run("convert", "memoryllm", source, tmp_path / "dst")
    model = served(tmp_path / "dst" / "model")
    assert model.lm_head.weight is model.get_input_embeddings().weight
    ids = load_file(GOLDEN / "plain" / "expected.safetensors")["long.ids"]
    apply_mem_triton(model, {"memoryllm": {"pools": str(tmp_path / "dst" / "memory")}})
    inject(model, ids)
    zeroed = edited(copied("plain", tmp_path / "zero"), change=lambda t: t["new_memory_positional_emb"].zero_())
    run("convert", "memoryllm", zeroed, tmp_path / "other")
    twin = served(tmp_path / "other" / "model")
    apply_mem_triton(twin, {"memoryllm": {"pools": str(tmp_path / "other" / "memory")}})
    inject(twin, ids)
    with Pools.open(tmp_path / "dst" / "memory") as pools, Pools.open(tmp_path / "other" / "memory") as zero:
        assert not pools.shape.embedding_first and zero.shape.embedding_first
        assert (pools.rows("main") - zero.rows("main")).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["memory.json", "weights.safetensors"])
def test_fault19_what_lies_beside_the_pools_has_a_digest(tmp_path, name):
    """Damage anywhere in it is an error, or changes nothing that is read."""
    from mem_triton.systems.memoryllm.convert import load_weights

    run("convert", "memoryllm", copied("adapters", tmp_path / "src"), tmp_path / "dst")
    memory = tmp_path / "dst" / "memory"

    def read() -> tuple[Any, ...]:
        with Pools.open(memory) as pools:
            return pools.shape, pools.about, {key: x.tolist() for key, x in load_weights(memory).items()}

    good, file, draw, errors = read(), memory / name, random.Random(0), 0
    data = file.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little") if name.endswith("safetensors") else len(data)
    for at in [draw.randrange(header) for _ in range(100)] + [draw.randrange(len(data)) for _ in range(30)]:
        file.write_bytes(data[:at] + bytes([data[at] ^ (1 << draw.randrange(8))]) + data[at + 1 :])
        try:
            assert read() == good, at
        except PoolError:
            errors += 1
    assert errors > 60


def test_the_doctor_tells_what_a_version_takes(tmp_path):
    """The sizes of the published 8B: 12,801 rows of 32 layers, 8 KV heads of 128 channels, in bf16."""
    shape = PoolShape(layers=32, rows=12800, hidden=4096, tokens=256, dtype="bfloat16")
    Pools.create(tmp_path / "memory", shape, {"model": {"kv_heads": 8, "head_dim": 128}}).close()
    report = json.loads(run("doctor", "--json", "--pools", tmp_path / "memory"))
    assert report["pools"]["keys_and_values_bytes"] == 2 * 32 * 12801 * 8 * 128 * 2
    assert report["pools"]["hidden_bytes"] == 32 * 12800 * 4096 * 2 and "chosen_bytes" not in report["pools"]
    mplus = replace(shape, rows=10240, long_term=LongTermShape(2560, 60 * 256, 1.0, 1e-3, 1024))
    Pools.create(tmp_path / "mplus", mplus, {"model": {"kv_heads": 8, "head_dim": 128}}).close()
    report = json.loads(run("doctor", "--json", "--pools", tmp_path / "mplus"))
    assert report["pools"]["chosen_bytes"] == 2 * 32 * 2560 * 8 * 128 * 2, "of each request that reads"
    assert "is no store of pools" in run("doctor", "--pools", tmp_path, code=1)
