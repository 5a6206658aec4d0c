"""Checkpoints that are converted without merging the adapter that reads."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from mem_triton.schema import ConfigError
from mem_triton.systems.base import FrontendServices
from mem_triton.systems.lora import Adapter, LoadedAdapters, files_of
from mem_triton.systems.memoryllm.frontend import PoolFrontEnd
from mem_triton.systems.memoryllm.request import parse
from mem_triton.systems.memoryllm.section import MemoryLLMSection
from mem_triton.systems.params import RequestParams
from mem_triton.systems.request import RequestError
from mem_triton_transformers import apply_mem_triton
from tests.cli.test_cli import refused, run
from tests.memoryllm import test_serving
from tests.memoryllm.test_convert import copied, served
from tests.support.pool_bench import make_pool_bench, unmerged_of


def test_base_and_adapters_stay_apart_and_come_back(tmp_path):
    """peft with the adapter that reads gives the merged model's logits."""
    from peft import PeftModel

    source = copied("adapters", tmp_path / "src")
    assert "read (LoRA)" in run("convert", "memoryllm", source, tmp_path / "apart", "--unmerged")
    run("convert", "memoryllm", source, tmp_path / "merged")
    before, apart = load_file(source / "model.safetensors"), served(tmp_path / "apart" / "model")
    name = "model.layers.1.self_attn.q_proj"
    assert torch.equal(apart.state_dict()[f"{name}.weight"], before[f"{name}.base_layer.weight"])
    ids, merged = torch.tensor([[5, 17, 42, 8]]), served(tmp_path / "merged" / "model")
    with torch.no_grad():
        right, alone = merged(ids).logits, apart(ids).logits
        logits = PeftModel.from_pretrained(apart, str(tmp_path / "apart" / "read"))(ids).logits
    assert (logits - right).abs().max() < 1e-5 * right.abs().max() < (alone - right).abs().max()
    run("convert", "memoryllm", "--back", tmp_path / "apart", tmp_path / "back")
    after = load_file(tmp_path / "back" / "model.safetensors")
    assert set(after) == set(before)
    for key, tensor in before.items():
        scale = 2.0 if ".lora_B." in key else 1.0  # lora_alpha / r, which lies in the factors now
        assert torch.allclose(after[key].float(), tensor.float() * scale, atol=1e-6), key


def test_a_model_of_transformers_is_refused_and_so_is_a_checkpoint_without_adapters(tmp_path):
    run("convert", "memoryllm", copied("adapters", tmp_path / "src"), tmp_path / "apart", "--unmerged")
    with pytest.raises(ConfigError, match="was converted with --unmerged"):
        apply_mem_triton(served(tmp_path / "apart" / "model"), {"memoryllm": {"pools": str(tmp_path / "apart/memory")}})
    told = refused("convert", "memoryllm", copied("plain", tmp_path / "plain"), tmp_path / "dst", "--unmerged")
    assert "has no adapter that reads" in told and not (tmp_path / "dst").exists()
    told = refused("convert", "memoryllm", "--back", tmp_path / "apart", tmp_path / "back", "--unmerged")
    assert "--unmerged: goes without --back" in told


def test_pools_are_read_by_the_adapter_that_reads_alone(tmp_path):
    bench = make_pool_bench(tmp_path / "bench")
    folder = unmerged_of(bench, tmp_path / "apart")
    section = MemoryLLMSection(pools=folder / "memory", gib=0.01)
    shape = test_serving.engine(bench, model=str(folder / "model"))
    front, loaded = PoolFrontEnd(shape, section, FrontendServices()), LoadedAdapters()
    read = str(folder / "read")
    loaded.loaded("r", read, files_of(read))
    answering = loaded.answering("r", "r", read)
    assert front.admit(parse({}), RequestParams(lora=answering)).version.id == "main@1"
    for lora in (None, Adapter("r:00000000")):
        with pytest.raises(RequestError, match="mem_pool: the pools were converted with --unmerged"):
            front.admit(parse({}), RequestParams(lora=lora))
        assert front.admit(parse({"mem_pool": ""}), RequestParams(lora=lora)) is None
    (folder / "read" / "adapter_config.json").write_text(json.dumps({"r": 1}))
    loaded.loaded("r", read, files_of(read))
    with pytest.raises(RequestError, match="converted with --unmerged"):
        front.admit(parse({}), RequestParams(lora=loaded.answering("r", "r", read)))
