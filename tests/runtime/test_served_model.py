"""A bank and the model that an engine really computes: dtype, RoPE, sizes, quantisation (fault 14)."""

from __future__ import annotations

import json
import logging
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mem_triton.config import ConfigError, MemTritonConfig
from mem_triton.store.bank import Bank
from mem_triton.store.bank.fingerprint import model_fingerprint
from mem_triton.store.block import MemoryBlock
from mem_triton.systems.delta_mem.frontend import SessionFrontEnd
from mem_triton.systems.delta_mem.request import SessionRequest
from mem_triton.systems.engine import EngineShape
from mem_triton.systems.explicit.layout import open_bank
from mem_triton.systems.explicit.section import MemorySection
from mem_triton.systems.explicit.worker import ExplicitMemory
from mem_triton.systems.params import RequestParams
from mem_triton.systems.request import RequestError
from mem_triton.systems.served_model import served
from tests.store.bank_case import spec
from tests.support.host import host
from tests.support.models import random_adapter, save_tiny_model, tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def bank(model, tmp_path_factory) -> Path:
    folder, fingerprint = tmp_path_factory.mktemp("bank") / "b", model_fingerprint(model)
    shape = {"layers": (0,), "kv_heads": fingerprint.kv_heads, "head_dim": fingerprint.head_dim}
    Bank.create(folder, spec(fingerprint=fingerprint, **shape)).close()
    return folder


def shape_of(folder: Path, **changes) -> EngineShape:
    """An engine's that serves the folder as it is."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    usual = EngineShape(
        engine="vLLM",
        model=str(folder),
        revision=None,
        hf_config=config.to_dict(),
        dtype=torch.float32,
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        tp_size=1,
        pp_spans=((0, config.num_hidden_layers),),
        max_requests=4,
        max_step_tokens=64,
        max_model_len=512,
    )
    return replace(usual, **changes)


def opened(bank: Path, shape: EngineShape) -> None:
    open_bank(shape, MemorySection(bank=bank)).close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fault14_a_bank_of_another_dtype_is_said_once(model, bank, caplog, dtype):
    with caplog.at_level(logging.WARNING):
        opened(bank, shape_of(model, dtype=dtype))
    said = [record.getMessage() for record in caplog.records if "holds float32" in record.getMessage()]
    assert len(said) == (dtype != torch.float32)
    assert all(f"computes in {str(dtype)[6:]}" in line and "--dtype float32" in line for line in said)


def test_fault14_a_constant_prefix_that_the_engine_s_dtype_cannot_hold_is_refused_at_start(model, tmp_path):
    fingerprint = model_fingerprint(model)
    heads, dim, layers = fingerprint.kv_heads, fingerprint.head_dim, range(fingerprint.num_layers)
    fields = {"layers": (0,), "kv_heads": heads, "head_dim": dim, "prefix_text": "x"}
    big = torch.full((len(layers), heads, 3, dim), 70000.0)
    with Bank.create(tmp_path / "b", spec(fingerprint=fingerprint, **fields)) as made:
        made.set_sink(MemoryBlock(big, big, torch.arange(3, dtype=torch.int32).expand(big.shape[:3]).contiguous()))
    section = MemorySection(bank=tmp_path / "b", pool_gib=2**-10)

    def start(dtype: torch.dtype) -> None:
        ExplicitMemory(shape_of(model, dtype=dtype), section, host(list(layers)))

    start(torch.bfloat16)
    with pytest.raises(ConfigError, match=r"constant prefix has numbers beyond torch\.float16"):
        start(torch.float16)


def refused(bank: Path, shape: EngineShape, *messages: str) -> None:
    with pytest.raises(ConfigError) as raised:
        opened(bank, shape)
    for message in (r"mem_triton\.memory\.bank: ", *messages):
        assert re.search(message, str(raised.value)), str(raised.value)


THETA = {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}}
YARN = {"rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (THETA, r"RoPE: the folder has .*10000\.0.*, the engine .*5000\.0"),
        (YARN, "RoPE: .*, the engine .*yarn"),
        ({"num_hidden_layers": 1}, "num_hidden_layers: the folder has 2, the engine 1"),
        ({"rms_norm_eps": 1e-5}, "rms_norm_eps: the folder has 1e-06, the engine 1e-05"),
        ({"hidden_act": "gelu"}, "hidden_act: the folder has silu, the engine gelu"),
        ({"attention_bias": True}, "attention_bias: the folder has False, the engine True"),
    ],
)
@pytest.mark.parametrize(("engine", "option"), [("vLLM", "--hf-overrides"), ("SGLang", "--json-model-override-args")])
def test_fault14_what_overrides_change_in_keys_and_values_is_refused_by_name(
    model, bank, changes, message, engine, option
):
    stock = shape_of(model, engine=engine)
    opened(bank, stock)
    refused(bank, replace(stock, hf_config={**stock.hf_config, **changes}), message, option)


def test_fault14_what_changes_no_key_and_value_is_served(model, bank):
    """A longer context, windows that an engine has options of its own for, and names that engines rewrite."""
    stock = shape_of(model)
    for changes in (
        {"max_position_embeddings": 8192},
        {"sliding_window": 64, "layer_types": ["sliding_attention"] * 2},
        {"architectures": ["X"], "torch_dtype": "bfloat16", "vocab_size": 1024, "model_type": "other"},
        {"rope_theta": 10000, "rope_parameters": None},
    ):
        opened(bank, replace(stock, hf_config={**stock.hf_config, **changes}))


def edited(model: Path, folder: Path, **changes) -> Path:
    """A copy of the model's folder with another config.json. A field that is None is left out."""
    shutil.copytree(model, folder)
    config = {**json.loads((folder / "config.json").read_text()), **changes}
    config = {name: value for name, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def bank_of(model: Path, folder: Path) -> Path:
    fingerprint = model_fingerprint(model)
    shape = {"layers": (0,), "kv_heads": fingerprint.kv_heads, "head_dim": fingerprint.head_dim}
    Bank.create(folder, spec(fingerprint=fingerprint, **shape)).close()
    return folder


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_parameters": None, "rope_theta": 10000.0},
        {"rope_parameters": None, "rope_theta": 20000, "rope_scaling": {"type": "linear", "factor": 2}},
        {"rope_parameters": {"rope_theta": 10000.0, **YARN["rope_parameters"]}, "max_position_embeddings": 16384},
    ],
)
def test_fault14_a_config_of_any_generation_is_served_as_engines_read_it(model, tmp_path, changes):
    """Engines rewrite RoPE settings; comparing with config.json as it is written would refuse them."""
    folder = edited(model, tmp_path / "m", **changes)
    bank = bank_of(folder, tmp_path / "b")
    opened(bank, shape_of(folder))
    raw = json.loads((folder / "config.json").read_text())
    opened(bank, shape_of(folder, hf_config=raw))
    refused(bank, shape_of(folder, hf_config={**shape_of(folder).hf_config, **THETA}), "RoPE")


def test_fault14_an_architecture_that_transformers_does_not_know_is_compared_as_it_is_written(model, tmp_path, caplog):
    folder = edited(model, tmp_path / "m", model_type="my_own", rope_parameters=None, rope_theta=500.0)
    bank, raw = bank_of(folder, tmp_path / "b"), json.loads((folder / "config.json").read_text())
    stock = replace(shape_of(model), model=str(folder), hf_config=raw)
    opened(bank, stock)
    assert "transformers does not know the architecture" in caplog.text
    refused(bank, replace(stock, hf_config={**raw, "rope_theta": 600.0}), "RoPE")
    refused(bank, replace(stock, hf_config={**raw, "hidden_act": "gelu"}), "hidden_act")


@pytest.mark.parametrize("written", ["config.json", "text_config", "hf_quant_config.json"])
def test_fault14_a_bank_of_weights_that_are_not_quantised_is_not_read_by_an_engine_that_quantises(
    model, bank, tmp_path, written
):
    opened(bank, shape_of(model))
    refused(bank, shape_of(model, quantization="fp8"), r"quantises the weights \(fp8\)", "--quantization")
    said = {"quantization_config": {"quant_method": "fp8"}}
    config = json.loads((model / "config.json").read_text())
    changes = {"config.json": said, "text_config": {"text_config": config | said}}.get(written, {})
    folder = edited(model, tmp_path / "m", **changes)
    if written == "hf_quant_config.json":
        (folder / written).write_text("{}")
    quantised, engine = bank_of(folder, tmp_path / "b"), replace(shape_of(model), model=str(folder))
    opened(quantised, replace(engine, quantization="modelopt"))
    refused(quantised, engine, "whose weights are quantised .*computes without quantisation")


READ = SessionRequest("alice", write=False)


def front_end(shape: EngineShape, folder: Path) -> SessionFrontEnd:
    adapter = random_adapter(tiny_model())
    return SessionFrontEnd(shape, MemTritonConfig(session_dir=folder), replace(adapter, scope="all"))


def tell(front: SessionFrontEnd) -> None:
    lease = front.open(SessionRequest("alice"), RequestParams())
    front.store.commit(lease, bytes(front.store.layout.state_bytes), 3)
    front.store.close(lease)


def test_fault14_a_session_belongs_to_the_model_as_the_engine_computed_it(model, tmp_path, caplog):
    stock = shape_of(model)
    tell(front_end(stock, tmp_path / "s"))
    assert front_end(stock, tmp_path / "s").open(READ, RequestParams()).start.version == 1
    other = shutil.copytree(model, tmp_path / "tuned")
    save_tiny_model(other, seed=1)
    rope = {**stock.hf_config, "rope_parameters": {"rope_type": "default", "rope_theta": 20000.0}}
    for field, shape in (
        ("weights", shape_of(other)),
        ("rope", replace(stock, hf_config=rope)),
        ("quantization", replace(stock, quantization="fp8")),
    ):
        front = front_end(shape, tmp_path / "s")
        with pytest.raises(RequestError, match=f'made with another {field} .*"mem_reset": 1'):
            front.open(READ, RequestParams())
        lease = front.open(SessionRequest("alice", reset=True), RequestParams())
        assert lease.start.data is None
        front.store.close(lease)
    assert "alice" not in caplog.text
    half = front_end(replace(stock, dtype=torch.bfloat16), tmp_path / "s")
    assert half.open(READ, RequestParams()).start.version == 1
    assert "float32, this server computes in bfloat16" in caplog.text


def test_fault14_sessions_of_weights_without_a_version_are_served_with_a_warning(model, tmp_path, caplog):
    """GGUF, an object store, a model that is not in Hugging Face's cache: nothing is downloaded for it."""
    folder = shutil.copytree(model, tmp_path / "m")
    for file in folder.glob("*.safetensors"):
        file.unlink()
    for name in (str(folder), "nobody/nothing", "s3://nobody/nothing"):
        caplog.clear()
        shape = shape_of(model, model=name)
        assert sorted(served(shape)) == ["dtype", "quantization", "rope"]
        assert "are not compared with the weights" in caplog.text
