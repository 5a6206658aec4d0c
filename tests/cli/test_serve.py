"""``mem-triton serve``: the commands that it prints, and what it refuses before anything starts.

What they start is tested in ``tests/vllm_engine/test_memo_server.py`` and its sibling for SGLang.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file

from mem_triton.runtime import serving
from tests.cli.test_cli import run

WEIGHT = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def model(tmp_path) -> Path:
    folder = tmp_path / "M"
    folder.mkdir()
    save_file({WEIGHT: np.zeros((6, 4), np.float32)}, folder / "model.safetensors")
    return folder


def adapter(folder: Path, rank: int = 8, shape=(6, 4), layer: int = 0, **config) -> Path:
    folder.mkdir()
    name = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
    factors = {
        f"{name}.lora_A.weight": np.zeros((rank, shape[1]), np.float32),
        f"{name}.lora_B.weight": np.zeros((shape[0], rank), np.float32),
    }
    if layer:
        factors |= {key.replace(f"layers.{layer}", "layers.0"): value for key, value in factors.items()}
    save_file(factors, folder / "adapter_model.safetensors")
    said = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "base_model_name_or_path": "hub/M", **config}
    (folder / "adapter_config.json").write_text(json.dumps(said))
    return folder


@pytest.fixture(autouse=True)
def engines(monkeypatch):
    """Both engines are installed."""
    monkeypatch.setattr(serving, "find_spec", lambda name: name)
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)


def printed(*arguments) -> str:
    return run("serve", *with_print(arguments))


def with_print(arguments) -> list[str]:
    words = [str(argument) for argument in arguments]
    return [*words[:1], "--print", *words[1:]]


def section_of(words: list[str]) -> dict:
    return json.loads(words[words.index("--additional-config") + 1])["mem_triton"]


def test_vllm_s_command_serves_both_adapters_under_one_name(model, tmp_path):
    memory, executive = adapter(tmp_path / "a", 8), adapter(tmp_path / "b", 12)
    words = shlex.split(printed(model, "--memo", memory, "--memo-executive", executive, "--", "--port", 80))
    assert words[:4] == ["VLLM_PLUGINS=mem_triton", "vllm", "serve", str(model)]
    assert section_of(words)["memo"] == {"name": f"{model}+memo", "memory": "memo", "executive": "executive"}
    text = " ".join(words)
    assert f"--enable-lora --max-lora-rank 16 --max-loras 2 --lora-modules memo={memory} executive={executive}" in text
    assert words[-2:] == ["--port", "80"]


def test_the_executive_is_the_model_itself_under_the_name_that_it_is_served_by(model, tmp_path):
    words = shlex.split(printed(model, "--memo", adapter(tmp_path / "a"), "--", "--served-model-name", "m"))
    assert section_of(words)["memo"] == {"name": "m+memo", "memory": "memo", "executive": "m"}
    assert "--max-loras" not in words


def test_a_merged_memory_model_is_a_second_server_on_the_next_port(model, tmp_path):
    """Without LoRA in the first one. The second has its options but those that are the first one's own."""
    memory = adapter(tmp_path / "a", 8)
    own = ["--served-model-name", "m", "--port", 80, "--host", "0.0.0.0", "--api-key", "k", "--max-loras", 2]
    text = printed(model, "--memo", memory, "--memo-merged", "--", *own, "--dtype", "float32", "--enforce-eager")
    merge, second, first = text.strip().split("\n")
    assert merge == f"mem-triton memo merge {memory} --into-base --base {model} --out {memory}-merged"
    expected = f"vllm serve {memory}-merged --served-model-name memo --host 127.0.0.1 --port 81"
    assert second == f"{expected} --dtype float32 --enforce-eager &"
    words = shlex.split(first)
    assert section_of(words)["memo"]["memory"] == "http://127.0.0.1:81/v1#memo"
    assert "--lora-modules" not in words and "--enable-lora" not in words
    sglang = printed(model, "--memo", memory, "--memo-merged", "--engine", "sglang", "--", "--tp=2")
    assert "--served-model-name memo --host 127.0.0.1 --port 30001 --tp=2 &" in sglang
    assert not Path(f"{memory}-merged").exists(), "--print starts and writes nothing"


def test_a_merged_model_is_made_once_and_never_taken_for_another(model, tmp_path):
    from mem_triton.systems.memo.merging.arithmetic import MergeError
    from mem_triton.systems.memo.merging.into_base import merged_once

    memory, out = adapter(tmp_path / "a", 8), tmp_path / "a-merged"
    merged_once(memory, model, out)
    made = (out / "model.safetensors").stat().st_mtime_ns
    merged_once(memory, model, out)
    assert (out / "model.safetensors").stat().st_mtime_ns == made
    (memory / "adapter_config.json").write_text((memory / "adapter_config.json").read_text() + " ")
    with pytest.raises(MergeError, match=r"holds another merge than .*a into .*M; remove it"):
        merged_once(memory, model, out)
    with pytest.raises(MergeError, match="there already"):
        merged_once(memory, model, model)


def test_a_memory_model_elsewhere_needs_no_adapter(model):
    words = shlex.split(printed(model, "--memo", "http://h/v1#memo", "--memo-name", "both"))
    assert section_of(words)["memo"] == {"name": "both", "memory": "http://h/v1#memo", "executive": str(model)}
    assert "--enable-lora" not in words


def test_sglang_s_command_comes_with_its_configuration_file(model, tmp_path):
    memory = adapter(tmp_path / "a", 12)
    text = printed(model, "--memo", memory, "--engine", "sglang", "--", "--port=80")
    said, _, command = text.partition("\nEND\n")
    assert yaml.safe_load(said.partition("\n")[2])["memo"]["memory"] == "memo"
    words = shlex.split(command)
    assert words[0] == "MEM_TRITON_CONFIG=mem.yaml" and words[2:4] == ["-m", "sglang.launch_server"]
    assert f"--enable-lora --max-lora-rank 12 --lora-paths memo={memory} --port=80" in " ".join(words)


def test_a_configuration_is_completed_by_the_options(model, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("mem_triton: {memo: {executive_schema: compact, executive: 'http://e/v1#e'}, session_dir: /s}")
    words = shlex.split(printed(model, "--config", path, "--memo", "http://h/v1#m", "--delta", "D"))
    section = section_of(words)
    assert section["memo"]["executive_schema"] == "compact" and section["delta"] == {"adapter": "D"}
    assert section["session_dir"] == "/s"
    assert section["memo"]["executive"] == "http://e/v1#e" and section["memo"]["name"] == f"{model}+memo"
    words = shlex.split(
        printed(model, "--config", path, "--memo", "http://h/v1#m", "--memo-executive", "http://o/v1#o")
    )
    assert section_of(words)["memo"]["executive"] == "http://o/v1#o"


def test_other_plugins_stay_in_vllm_s_list(model, monkeypatch):
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    assert printed(model, "--memo", "http://h/v1#m").startswith("VLLM_PLUGINS=other,mem_triton ")
    assert not printed(model, "--delta", "D").startswith("VLLM_PLUGINS")


def test_what_cannot_start_is_one_line_that_names_it(model, tmp_path, monkeypatch):
    good, broken = adapter(tmp_path / "good", 8), adapter(tmp_path / "broken", 8)
    (broken / "adapter_model.safetensors").write_bytes(b"x" * 20)
    wide = adapter(tmp_path / "wide", 8, (6, 5))
    deep = adapter(tmp_path / "deep", 8, layer=3)
    kind = adapter(tmp_path / "kind", 8, peft_type="IA3")
    cases = {
        "is an adapter of another base than": [model, "--memo", wide],
        "layers.3.self_attn.q_proj.weight is not in the model": [model, "--memo", deep],
        "is an adapter of hub/M, and not of other/M": ["other/M", "--memo", good],
        "has rank 8, and --max-lora-rank is 4": [model, "--memo", good, "--", "--max-lora-rank", 4],
        "must be a whole number": [model, "--memo", good, "--", "--max-lora-rank=x"],
        "nowhere: there is no such folder; give a LoRA": [model, "--memo", tmp_path / "nowhere"],
        "gone: there is no such folder; give the model's": [tmp_path / "gone", "--memo", good],
        "adapter_model.safetensors: cannot be read": [model, "--memo", broken],
        "peft_type is not LORA": [model, "--memo", kind],
        "--memo-executive, --memo-name and --memo-merged need --memo": [model, "--memo-name", "x"],
        "--memo-merged: merges a LoRA adapter": [model, "--memo", "http://h/v1#m", "--memo-merged"],
        "wide: is an adapter of another base": [model, "--memo", wide, "--memo-merged"],
        "--port x: must be a number": [model, "--memo", good, "--memo-merged", "--", "--port", "x"],
        "nothing to remember with": [model],
        "--engine llama: one of vllm, sglang": [model, "--memo", good, "--engine", "llama"],
        "--load-format is set by mem-triton serve": [model, "--memo", good, "--", "--load-format=auto"],
        "memo.dialekt: unknown key": [model, "--memo", good, "--config", tmp_path / "c.yaml"],
        "--config": [model, "--config", tmp_path / "none.yaml"],
        "must hold a table": [model, "--config", tmp_path / "list.yaml"],
    }
    (tmp_path / "c.yaml").write_text("memo: {dialekt: plain}")
    (tmp_path / "list.yaml").write_text("[1]")
    for message, arguments in cases.items():
        said = run("serve", *with_print(arguments), code=2, both=True)
        assert message in said and said.count("\n") == 1, said
    monkeypatch.setattr(serving, "find_spec", lambda name: None)
    for named, message in ((("--engine", "sglang"), "SGLang is not installed"), ((), "neither vLLM nor SGLang")):
        assert message in run("serve", model, "--memo", good, *named, code=2, both=True)


ENGINE = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
print(open(os.environ["MEM_TRITON_CONFIG"]).read(), *sys.argv[1:], flush=True)
time.sleep(60)
"""


def test_signals_and_the_exit_code_are_the_engine_s(model, tmp_path):
    """The engine takes the command's place. Here it is a script with SGLang's name."""
    package = tmp_path / "path" / "sglang"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "launch_server.py").write_text(ENGINE)
    env = {**os.environ, "PYTHONPATH": f"{package.parent}:{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, "-m", "mem_triton.cli", "serve", str(model), "--memo", "http://h/v1#m"]
    process = subprocess.Popen(
        [*command, "--engine", "sglang", "--", "--port", "1"], env=env, stdout=subprocess.PIPE, text=True
    )
    said = process.stdout.readline()
    assert json.loads(said[: said.rindex("}") + 1])["memo"]["memory"] == "http://h/v1#m" and said.endswith("--port 1\n")
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 7
