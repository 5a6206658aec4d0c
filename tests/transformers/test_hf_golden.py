"""Ours against golden numbers of the official code (tests/data/make_golden.py): A4, A5, A8, A12."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import DynamicCache

from mem_triton.systems.delta_mem import (
    DeltaMemAdapter,
    DeltaMemConfig,
    adapter_from_tensors,
    load_adapter,
    save_adapter,
)
from mem_triton_transformers import (
    apply_mem_triton,
    get_memory,
    load_memory,
    save_memory,
    set_memory_write,
    set_write_segments,
)
from tests.support.models import random_adapter, tiny_model

DATA = Path(__file__).resolve().parent.parent / "data"
ABOUT = json.loads((DATA / "golden.json").read_text())
GOLDEN = load_file(DATA / "golden.safetensors")
CALLS = [
    {key: GOLDEN[f"call.{i}.{key}"] for key in ("input_ids", "attention_mask", "message_ids", "sentence_ids")}
    for i in range(3)
]
LOGITS_TOLERANCE = 2e-5  # fp32, both sides; logits are of order 1
STATE_TOLERANCE = 5e-6


def part(prefix: str) -> dict[str, torch.Tensor]:
    return {key.removeprefix(prefix): value for key, value in GOLDEN.items() if key.startswith(prefix)}


def golden_model(family: str = "qwen3", attention: str = "eager") -> torch.nn.Module:
    model = tiny_model(family, attn_implementation=attention, **ABOUT["model"])
    model.load_state_dict(part(f"model.{family}."))  # whatever torch's random stream gives today
    return model


def golden_adapter(variant: str, **config: object) -> DeltaMemAdapter:
    settings = DeltaMemConfig.from_dict({**ABOUT["variants"].get(variant, {"rank": 4}), **config})
    return adapter_from_tensors(settings, part(f"{variant}.adapter."))


def run(variant: str, adapter: DeltaMemAdapter, attention: str = "eager") -> list[tuple[torch.Tensor, dict]]:
    """Logits and states after each of the three calls."""
    model = golden_model("smollm3" if variant == "smollm3" else "qwen3", attention)
    apply_mem_triton(model, {"delta": {"adapter": adapter}})
    cache, results = DynamicCache(), []
    for i, call in enumerate(CALLS):
        set_memory_write(model, not (variant == "frozen" and i == 1))
        if variant in ("message_mean", "sentence_mean"):
            set_write_segments(model, call["message_ids"], call["sentence_ids"] if "sentence" in variant else None)
        with torch.no_grad():
            output = model(input_ids=call["input_ids"], attention_mask=call["attention_mask"], past_key_values=cache)
        results.append((output.logits, get_memory(model)))
    return results


def logits_difference(ours: torch.Tensor, golden: torch.Tensor, call: int) -> float:
    valid = CALLS[call]["attention_mask"][:, -ours.shape[1] :].bool()  # a padded token's logits mean nothing
    return (ours - golden)[valid].abs().max().item()


def check(variant: str, results: list[tuple[torch.Tensor, dict]]) -> None:
    loose = 5 if variant == "raw_qk" else 1  # keys of any length: states grow in between, and rounding with them
    for i, (logits, states) in enumerate(results):
        assert logits_difference(logits, GOLDEN[f"{variant}.logits.{i}"], i) < loose * LOGITS_TOLERANCE, (
            f"logits, call {i}"
        )
        expected = part(f"{variant}.state.{i}.")
        assert states.keys() == expected.keys()
        for name, state in states.items():
            reference = expected[name].unsqueeze(1) if expected[name].dim() == 3 else expected[name]
            limit = loose * STATE_TOLERANCE * max(1.0, reference.abs().max().item())
            assert (state - reference).abs().max() < limit, (name, i)


SSW = ("message_mean", "message_mean_no_ids", "sentence_mean")


@pytest.mark.parametrize("variant", [name for name in ABOUT["variants"] if name not in (*SSW, "smollm3")])
def test_a4_parity_with_the_official_code(variant: str) -> None:
    check(variant, run(variant, golden_adapter(variant)))


@pytest.mark.parametrize("heads", ABOUT["head_subsets"])
def test_a4_every_subset_of_heads(heads: str) -> None:
    results = run("heads", golden_adapter("heads", delta_heads=list(heads)))
    for i in (1, 2):
        assert logits_difference(results[i][0], GOLDEN[f"heads.{heads}.logits.{i}"], i) < LOGITS_TOLERANCE


def test_a4_head_subsets_differ() -> None:
    """Control: the subsets are told apart by far more than the tolerance."""
    goldens = [GOLDEN[f"heads.{heads}.logits.1"] for heads in ABOUT["head_subsets"]]
    gaps = [(a - b).abs().max().item() for n, a in enumerate(goldens) for b in goldens[:n]]
    assert min(gaps) > 1000 * LOGITS_TOLERANCE


@pytest.mark.parametrize("variant", SSW)
def test_a5_message_and_sentence_means_match_the_official_code(variant: str) -> None:
    check(variant, run(variant, golden_adapter(variant)))


def test_a5_without_ids_equals_token_writes() -> None:
    adapter = golden_adapter("message_mean_no_ids")
    per_token = DeltaMemAdapter(adapter.config.model_copy(update={"memory_write_granularity": "token"}), adapter.layers)
    for (ours, _), (expected, _) in zip(run("message_mean_no_ids", adapter), run("tsw", per_token), strict=True):
        assert torch.equal(ours, expected)


def test_a8_official_adapter_folder_is_read() -> None:
    adapter = load_adapter(DATA / "official")
    assert adapter.config == golden_adapter("tsw").config
    assert all(torch.equal(tensor, golden_adapter("tsw").tensors()[name]) for name, tensor in adapter.tensors().items())
    check("tsw", run("tsw", adapter))


def test_a8_our_adapter_folder_is_what_the_official_loader_takes(tmp_path: Path) -> None:
    save_adapter(golden_adapter("tsw"), tmp_path, format="pt")
    ours, theirs = (
        json.loads((folder / "delta_mem_config.json").read_text()) for folder in (tmp_path, DATA / "official")
    )
    assert ours == theirs  # every key and value, archived ones included
    ours, theirs = (torch.load(f / "delta_mem_adapter.pt", weights_only=True) for f in (tmp_path, DATA / "official"))
    assert ours.keys() == theirs.keys()
    assert all(
        torch.equal(tensor, theirs[name]) and tensor.dtype == theirs[name].dtype for name, tensor in ours.items()
    )


def test_a8_default_config_is_the_official_one() -> None:
    assert DeltaMemConfig().to_dict() == ABOUT["official_config_defaults"]


def test_a8_official_state_file_is_read_and_written(tmp_path: Path) -> None:
    model = golden_model()
    apply_mem_triton(model, {"delta": {"adapter": golden_adapter("tsw")}})
    load_memory(model, DATA / "official" / "delta_state.pt")
    expected = part("tsw.state.0.")
    assert all(torch.equal(state.squeeze(1), expected[name]) for name, state in get_memory(model).items())
    save_memory(model, tmp_path / "delta_state.pt")
    ours, theirs = (torch.load(f / "delta_state.pt", weights_only=True) for f in (tmp_path, DATA / "official"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)  # [B, r, r] for one head


def test_a12_smollm3_nope_layers() -> None:
    model = golden_model("smollm3")
    assert model.config.no_rope_layers == [1, 0]
    check("smollm3", run("smollm3", golden_adapter("smollm3")))


def test_sdpa_later_turns_are_not_ignored() -> None:
    """The official code inverts sdpa's boolean masks: on a KV cache its memory stands still. Ours equals eager."""
    frozen, alive = part("tsw_sdpa.state.1."), part("tsw.state.1.")
    for name, state in part("tsw_sdpa.state.0.").items():
        padded_row, full_row = 1, 0
        assert torch.equal(frozen[name][full_row], state[full_row])  # the official bug, as recorded
        assert (alive[name] - state).abs().max() > 0.1  # what it does under eager
        assert not torch.equal(part("tsw.state.0.")[name][padded_row], state[padded_row])
    check("tsw", run("tsw", golden_adapter("tsw"), attention="sdpa"))


def test_golden_can_fail() -> None:
    """Control: another adapter, and an ignored mask, are far outside the tolerances."""
    wrong = random_adapter(golden_model(), seed=5, **ABOUT["variants"]["tsw"])
    with pytest.raises(AssertionError, match="logits"):
        check("tsw", run("tsw", wrong))
