"""What is not supported is refused at start, with the reason and the fix."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from mem_triton import compat
from mem_triton.config import ConfigError
from mem_triton.systems.delta_mem import save_adapter
from tests.support.cases import request
from tests.support.models import random_adapter, save_tiny_model, tiny_model
from tests.vllm_engine.engine import run_engine

SECTION = {"delta": {"adapter": "somewhere"}}


def config(section=SECTION, load_format="mem_triton", model=None, parallel=None, **fields):
    models = {
        "use_mla": False,
        "is_hybrid": False,
        "is_attention_free": False,
        "is_encoder_decoder": False,
        "enable_prompt_embeds": False,
    }
    parallels = {
        "decode_context_parallel_size": 1,
        "prefill_context_parallel_size": 1,
        "enable_dbo": False,
        "data_parallel_size": 1,
    }
    return SimpleNamespace(
        additional_config={} if section is None else {"mem_triton": section},
        load_config=SimpleNamespace(load_format=load_format),
        model_config=SimpleNamespace(**{**models, "runner_type": "generate", **(model or {})}),
        parallel_config=SimpleNamespace(**{**parallels, **(parallel or {})}),
        device_config=SimpleNamespace(device_type=fields.pop("device", "cpu")),
        use_v2_model_runner=fields.pop("v2", True),
        **fields,
    )


def test_flag_and_section_must_come_together():
    from mem_triton_vllm.refusals import section_of

    assert section_of(config(None, "auto")) is None
    assert section_of(config()).delta.adapter == "somewhere"
    with pytest.raises(ConfigError, match="--load-format mem_triton needs its section"):
        section_of(config(None))
    with pytest.raises(ConfigError, match="add --load-format mem_triton"):
        section_of(config(load_format="auto"))
    with pytest.raises(ConfigError, match=r'mem_triton\.detla: unknown key\. Did you mean "delta"'):
        section_of(config({"detla": {}}))
    with pytest.raises(ConfigError, match="no memory is configured"):
        section_of(config({}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"use_mla": True}}, "multi-head latent attention"),
        ({"model": {"is_hybrid": True}}, "hybrid"),
        ({"model": {"is_encoder_decoder": True}}, "encoder-decoder"),
        ({"model": {"runner_type": "pooling"}}, "pooling"),
        ({"parallel": {"decode_context_parallel_size": 2}}, "decode-context-parallel-size.*whole sequence"),
        ({"parallel": {"enable_dbo": True}}, "enable-dbo"),
        ({"v2": False, "device": "cuda"}, "Model Runner V2"),
    ],
)
def test_engine_options_are_refused_with_a_reason(change, message):
    from mem_triton_vllm.refusals import check_engine

    check_engine(config())
    with pytest.raises(ConfigError, match=message):
        check_engine(config(**change))


def test_fault06_the_rust_front_end_is_refused_at_start(monkeypatch):
    from mem_triton_vllm.refusals import check_engine

    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "1")
    with pytest.raises(ConfigError, match=r"Rust front end.*unset VLLM_USE_RUST_FRONTEND"):
        check_engine(config())


def test_fault06_a_batch_file_drops_no_field():
    """``vllm run-batch`` has no HTTP: its bodies are looked at before they are served."""
    import asyncio
    import inspect

    from vllm.entrypoints.launchers import run_batch

    from mem_triton_vllm import http_fields

    http_fields.install()

    def outcome(**body):
        body = {"model": "m", "messages": [{"role": "user", "content": "x"}], **body}
        line = {"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": body}
        request = run_batch.BatchRequestInput.model_validate(line)
        served = []

        async def serve(body):
            served.append(body)
            raise ValueError("served")

        takes_tracker = "tracker" in inspect.signature(run_batch.run_request).parameters  # until vLLM 0.32
        rest = [run_batch.BatchProgressTracker()] if takes_tracker else []
        answer = asyncio.run(run_batch.run_request(serve, request, *rest))
        return answer.error.error.message, len(served)

    assert outcome() == ("served", 1)
    assert outcome(vllm_xargs={"mem_ids": ["a"]}) == ("served", 1)
    message, served = outcome(mem_ids=["a"])
    assert "belongs into vllm_xargs" in message and not served
    message, served = outcome(vllm_xargs={"mem_ids": ["a"]}, use_beam_search=True)
    assert "beam search" in message and not served


@pytest.mark.parametrize(
    ("parallel", "option"),
    [({"data_parallel_size": 2}, "--data-parallel-size 1"), ({"_api_process_count": 2}, "--api-server-count 1")],
)
def test_requests_that_name_a_memory_need_one_front_end(parallel, option):
    from mem_triton_vllm.refusals import segment_obstacle, session_obstacle

    for obstacle in (session_obstacle, segment_obstacle):
        assert obstacle(config(speculative_config=None)) is None
        assert option in obstacle(config(parallel=parallel, speculative_config=None))


def test_a_missing_touch_point_names_itself_and_the_range():
    from mem_triton_vllm.refusals import TOUCH_POINTS, check_touch_points

    check_touch_points()

    def gone() -> bool:
        raise AttributeError

    with pytest.raises(compat.UnsupportedVersionError, match=r"lacks .*: ModelState, splitting_ops.*vllm>=0\.32"):
        check_touch_points({**TOUCH_POINTS, "ModelState": gone, "splitting_ops": lambda: False})


def test_fault_versions_a_newer_vllm_is_warned_of_or_refused_by_name(monkeypatch, caplog):
    from mem_triton_vllm.refusals import TOUCH_POINTS, check_touch_points

    compat._warn.cache_clear()
    monkeypatch.setattr(compat, "installed_version", lambda name: compat.Version("0.40.0"))
    check_touch_points()
    assert "vllm 0.40.0 is newer than the range that mem_triton was tested with" in caplog.text

    def fails() -> bool:
        raise RuntimeError("moved")

    with pytest.raises(compat.UnsupportedVersionError, match=r"vLLM 0\.40\.0 lacks .*: op registration\. Supported"):
        check_touch_points({**TOUCH_POINTS, "op registration": fails})
    monkeypatch.setattr(compat, "installed_version", lambda name: compat.Version("0.31.0"))
    with pytest.raises(compat.UnsupportedVersionError, match=r"vllm 0\.31\.0 is older.*pip install"):
        check_touch_points()


@pytest.mark.engine
def test_sliding_window_models_are_refused(tmp_path):
    model = save_tiny_model(tmp_path / "m", "mistral", sliding_window=64)
    adapter = save_adapter(random_adapter(tiny_model("mistral")), tmp_path / "a")
    output = run_engine(model, [], memory={"delta": {"adapter": str(adapter)}}, fails=True)
    assert "sliding window" in output and "--disable-sliding-window" in output


@pytest.mark.engine
def test_sentence_writes_are_refused(bench, tmp_path):
    adapter = random_adapter(tiny_model(), memory_write_granularity="message_mean")
    save_adapter(adapter, tmp_path / "a")
    output = run_engine(bench.model, [], memory={"delta": {"adapter": str(tmp_path / "a")}}, fails=True)
    assert "vLLM serves token writes only" in output and "mem_triton_transformers" in output


@pytest.mark.engine
def test_an_adapter_of_another_model_names_the_tensor(bench, tmp_path):
    save_adapter(random_adapter(tiny_model(hidden=32)), tmp_path / "a")
    output = run_engine(bench.model, [], memory={"delta": {"adapter": str(tmp_path / "a")}}, fails=True)
    assert "model.layers.0.self_attn" in output and "has shape" in output


@pytest.mark.engine
def test_speculation_refuses_coarse_states_and_sessions(bench, prompts):
    speculation = {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}}
    coarse = {"delta": {**bench.memory["delta"], "tokens_per_state": 16}}
    assert "resumes after any accepted token" in run_engine(bench.model, [], memory=coarse, fails=True, **speculation)
    result = run_engine(
        bench.model,
        [[request(prompts[0], fields={"mem_session": "alice"})]],
        memory=bench.memory,
        errors_are_results=True,
        **speculation,
    )
    assert "sessions do not work with speculative decoding" in result["rounds"][0]["error"]


@pytest.mark.engine
def test_fault14_overrides_that_change_a_bank_s_keys_are_refused_at_start(memory_bench):
    """On the engine's own reading of the folder; a longer context, which changes none, is served."""
    prompt = [request([5, 6, 7], fields={"mem_ids": ["alpha"]})]
    longer = {"hf_overrides": {"max_position_embeddings": 8192}}
    assert run_engine(memory_bench.model, [prompt], memory=memory_bench.section(), **longer)["rounds"][0][0]["tokens"]
    rope = {"hf_overrides": {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}, "rms_norm_eps": 1e-3}}
    output = run_engine(memory_bench.model, [], memory=memory_bench.section(), fails=True, **rope)
    assert "RoPE: the folder has {'rope_theta': 10000.0}, the engine {'rope_theta': 5000.0}" in output
    assert "rms_norm_eps: the folder has 1e-06, the engine 0.001" in output and "--hf-overrides" in output
    output = run_engine(
        memory_bench.model,
        [],
        memory=memory_bench.section(),
        fails=True,
        dtype="bfloat16",
        quantization="fp8_per_tensor",
    )
    assert "the engine quantises the weights (fp8_per_tensor)" in output
