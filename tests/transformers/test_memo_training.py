"""``mem-triton train memo`` on tiny random models: packing, resuming, early ends, what comes out, what is refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mem_triton.systems.memo.training.recipe import recipe_of
from mem_triton.systems.memo.training.rows import Row, RowError, of_epoch, read_data, read_rows
from mem_triton.systems.recipes import RecipeError
from mem_triton_transformers.memo_training import packing, run
from mem_triton_transformers.memo_training.packing import IGNORED, Tokens, packed, packs, padded, tokens_of
from mem_triton_transformers.memo_training.trainer import Plan, Watcher
from mem_triton_transformers.runs.folders import TrainingError
from mem_triton_transformers.runs.journal import read
from tests.support.models import save_tiny_model, tiny_model, tiny_tokenizer

SMALL = {"preset": "small", "epochs": 3, "batch": 8, "dtype": "float32", "weights": "float32"}


def row(question: str, answer: str, **more) -> dict:
    return {
        "prompt": [{"role": "user", "content": question}],
        "completion": [{"role": "assistant", "content": answer}],
        **more,
    }


def rows() -> list[dict]:
    known = [row(f"k{i}?", f"{i % 3}") for i in range(12)]
    return known + [row(f"u{i}?", "no", epoch=i % 3) for i in range(6)]


def written(path: Path, some: list | None = None) -> Path:
    lines = rows() if some is None else some
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "llama", "llama")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A folder as `memo build` makes it."""
    made = tmp_path_factory.mktemp("data")
    written(made / "train.jsonl")
    written(made / "eval.jsonl", [row(f"k{i}!", f"{i % 3}") for i in range(5)])
    return made


@pytest.fixture(scope="module")
def whole(folder, data, tmp_path_factory) -> Path:
    """A run from its beginning to its end."""
    out = tmp_path_factory.mktemp("whole") / "memo"
    assert run.train(folder, data, out, name="tiny", command="mem-triton train memo", **SMALL)
    return out


def losses(out: Path) -> list[float]:
    return [line["loss"] for line in read(out / "training.jsonl") if "loss" in line]


def some_tokens(count: int = 5) -> list[Tokens]:
    tokenizer = tiny_tokenizer()
    made = [Row((("system", "Be brief."), ("user", f"q{i}" * (i + 1))), f"a{i}", where="x:1") for i in range(count)]
    return [tokens_of(tokenizer, one, 1000) for one in made]


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_packed_rows_have_the_logits_and_gradients_of_padded_ones_and_half_their_tokens(family: str) -> None:
    model = tiny_model(family, dtype=torch.float64)
    assert packs(model)
    found = {}
    for name, batch in (("packed", packed(some_tokens())), ("padded", padded(some_tokens(), 0))):
        model.zero_grad()
        labels = batch.pop("labels")
        logits = model(**batch, use_cache=False).logits
        if name == "packed":
            at = (labels[0] != IGNORED).nonzero()[:, 0]
            chosen, wanted = logits[0, at - 1], labels[0, at]
        else:
            kept = labels[:, 1:] != IGNORED
            chosen, wanted = logits[:, :-1][kept], labels[:, 1:][kept]
        torch.nn.functional.cross_entropy(chosen, wanted).backward()
        found[name] = wanted, chosen.detach(), [p.grad.clone() for p in model.parameters()], batch["input_ids"].numel()
    assert torch.equal(found["packed"][0], found["padded"][0])
    torch.testing.assert_close(found["packed"][1], found["padded"][1], rtol=1e-4, atol=1e-6)  # norms are fp32
    for mine, other in zip(found["packed"][2], found["padded"][2], strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-6)
    assert found["packed"][3] < 0.6 * found["padded"][3]


def test_a_row_in_a_pack_sees_the_prefix_and_itself_alone() -> None:
    tokens = some_tokens(3)
    first = packed(tokens)
    other = packed([tokens[0], Tokens((*tokens[1].ids[:-1], 7), tokens[1].answer), tokens[2]])
    model = tiny_model("llama", dtype=torch.float64, attn_implementation="sdpa")
    labels = first.pop("labels"), other.pop("labels")
    a, b = (model(**batch, use_cache=False).logits[0] for batch in (first, other))
    assert not torch.equal(*labels)
    changed = (first["input_ids"] != other["input_ids"])[0].nonzero()[:, 0].tolist()
    same = [i for i in range(a.shape[0]) if i not in changed]
    torch.testing.assert_close(a[same], b[same], rtol=0, atol=1e-12)


def test_the_loss_is_on_the_answer_and_the_end_of_its_turn_alone() -> None:
    tokenizer = tiny_tokenizer()
    made = tokens_of(tokenizer, Row((("user", "where?"),), "here"), 100)
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "where?"}], add_generation_prompt=True)
    prompt = prompt["input_ids"] if hasattr(prompt, "keys") else prompt
    assert list(made.ids[: -made.answer]) == prompt
    assert tokenizer.decode(made.ids[-made.answer :]).startswith("here") and made.answer > 4


def test_models_with_windows_are_not_packed() -> None:
    model = tiny_model("llama")
    model.config.sliding_window = 16
    assert not packs(model)
    model.config.sliding_window, model.config.layer_types = None, ["full_attention", "sliding_attention"]
    assert not packs(model) and model.config._attn_implementation == "eager"


def test_long_rows_are_padded_and_train_to_the_same_losses(folder, data, whole, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(packing, "LONGEST", 1)
    assert run.train(folder, data, tmp_path / "out", **SMALL)
    assert losses(tmp_path / "out") == pytest.approx(losses(whole), abs=1e-5)


def test_a_plan_shows_each_row_once_an_epoch_and_fresh_ones_in_their_own() -> None:
    some = [Row((("user", str(i)),), "a", epoch=None if i < 20 else i % 3) for i in range(32)]
    plan = Plan(some, recipe_of("small", epochs=7, batch=8, rows=3))
    begin = 0
    for epoch, end in enumerate(plan.ends):
        shown = [i for batch in plan.batches[begin * plan.parts : end * plan.parts] for i in batch]
        assert sorted(shown) == of_epoch(some, epoch) and {some[i].epoch for i in shown} == {None, epoch % 3}
        begin = end
    assert plan.parts == 3 and all(batch for batch in plan.batches) and max(map(len, plan.batches)) <= 3
    assert len(plan.batches) == plan.parts * plan.ends[-1]


def test_what_comes_out_is_an_adapter_with_card_log_and_curve(folder, whole) -> None:
    from peft import PeftModel

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), whole)
    config = json.loads((whole / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "tiny" and config["r"] == 16 and model is not None
    card = (whole / "README.md").read_text()
    assert "base_model: tiny" in card and "mem-triton train memo" in card and "| 3 |" in card
    lines = read(whole / "training.jsonl")
    assert [line["held_out"] for line in lines if "exact" in line] == [5, 5, 5]
    steps = [line for line in lines if "loss" in line]
    assert steps[-1]["loss"] < steps[0]["loss"] and all(line["tokens"] > 0 for line in steps)
    assert (whole / "loss.csv").read_text().splitlines()[0].startswith("step,epoch,loss")
    assert len((whole / "loss.csv").read_text().splitlines()) == 1 + len(steps)


def test_a_killed_run_goes_on_with_equal_losses(folder, data, whole, tmp_path) -> None:
    out = tmp_path / "memo"
    command = [sys.executable, "-m", "mem_triton.cli", "train", "memo", str(data), str(out), "--model", str(folder)]
    command += ["--preset", "small", "--epochs", "3", "--batch", "8", "--dtype", "float32", "--weights", "float32"]
    command += ["--save-every", "1", "--device", "cpu"]
    process = subprocess.Popen(command, env=os.environ, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and not (out / "trainer" / "checkpoint-3").exists():
        assert process.poll() is None, "ended before it was killed"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / "adapter_model.safetensors").exists()
    said = []
    assert run.train(folder, data, out, device="cpu", say=said.append, **SMALL)
    assert any("going on from step" in text for text in said)
    assert losses(out) == pytest.approx(losses(whole), abs=1e-6)


def test_a_checkpoint_that_a_kill_has_cut_short_is_passed_over(folder, data, whole, tmp_path) -> None:
    out = tmp_path / "memo"
    stops = iter([False, False, True])
    assert run.train(folder, data, out, save_every=1, stop=lambda: next(stops), **SMALL) is None
    (out / "trainer" / "checkpoint-3" / "whole").unlink()
    assert run.train(folder, data, out, **SMALL)
    assert losses(out) == pytest.approx(losses(whole), abs=1e-6)


def test_all_weights_can_be_trained(folder, data, tmp_path) -> None:
    out = tmp_path / "memo"
    report = run.train(folder, data, out, method="full", rate=1e-3, **SMALL)
    before, after = (AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32) for where in (folder, out))
    assert report["parameters"] == sum(p.numel() for p in before.parameters())
    pairs = zip(before.parameters(), after.parameters(), strict=True)
    assert all(not torch.equal(a, b) for a, b in pairs)
    assert AutoTokenizer.from_pretrained(out).chat_template


def test_a_run_ends_when_the_held_out_answers_do_not_rise_and_keeps_the_best(folder, data, tmp_path) -> None:
    """Nothing is learned at this rate, so the first epoch stays the best of the exact answers."""
    out = tmp_path / "memo"
    report = run.train(folder, data, out, rate=1e-9, patience=2, **{**SMALL, "epochs": 9})
    assert report["epochs"] == 3
    again = run.train(folder, data, out, rate=1e-9, patience=2, **{**SMALL, "epochs": 9})
    assert again["epochs"] == 3 and again["steps"] == report["steps"]


def test_greedy_decoding_gives_the_answers_that_count_as_exact(folder, tmp_path) -> None:
    some = [row(f"k{i}?", f"{i % 3}") for i in range(6)]
    out, file = tmp_path / "memo", written(tmp_path / "rows.jsonl", some)
    told = {**SMALL, "epochs": 12, "rate": 2e-2, "batch": 2, "patience": 0}
    report = run.train(folder, file, out, method="full", held_out=file, **told)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    right = 0
    for one in some:
        made = tokens_of(tokenizer, Row((("user", one["prompt"][0]["content"]),), one["completion"][0]["content"]), 99)
        prompt = torch.tensor([made.ids[: -made.answer]])
        said = model.generate(prompt, max_new_tokens=made.answer, do_sample=False, pad_token_id=0)[0, prompt.shape[1] :]
        right += said.tolist() == list(made.ids[-made.answer :])
    assert report["held_out"]["exact"] == right / len(some) and right > 0


def test_older_rows_are_mixed_in(folder, data, tmp_path) -> None:
    older = written(tmp_path / "older.jsonl", [row("old?", "yes")])
    assert run.train(folder, data, tmp_path / "out", mix=[older], **SMALL)["rows"] == len(rows()) + 1
    with pytest.raises(RowError, match="--mix: there is no file"):
        run.train(folder, data, tmp_path / "other", mix=[tmp_path / "nowhere.jsonl"], **SMALL)


BROKEN = {
    "[1]": "holds a list, expected",
    "{": "not JSON",
    '{"prompt": "a"}': "has no completion",
    '{"prompt": 3, "completion": "a"}': "prompt is 3, expected a text or a list",
    '{"prompt": "a", "completion": " "}': r"completion\[0\].content is ' ', expected a text that is not blank",
    '{"prompt": [{"role": "user"}], "completion": "a"}': r"prompt\[0\] is",
    '{"prompt": [{"role": "robot", "content": "a"}], "completion": "a"}': r"prompt\[0\].role is 'robot'",
    '{"prompt": [{"role": "assistant", "content": "a"}], "completion": "a"}': "prompt ends with the assistant",
    '{"prompt": "a", "completion": [{"role": "user", "content": "a"}]}': "completion is not one message",
    '{"prompt": "a", "completion": "b", "epoch": -1}': "epoch is -1, expected an integer",
    '{"prompt": "a", "completion": "\\ud800"}': "half of a surrogate pair",
}


@pytest.mark.parametrize("line", BROKEN)
def test_rows_that_cannot_be_used_name_file_row_and_field(line: str, tmp_path) -> None:
    file = written(tmp_path / "rows.jsonl", [row("a", "b"), line])
    with pytest.raises(RowError, match=BROKEN[line]) as error:
        read_rows(file)
    assert f"{file}:2" in str(error.value)


def test_places_without_rows_are_named(tmp_path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "latin.jsonl").write_bytes(b"\xff")
    for path, words in (
        (tmp_path / "empty.jsonl", "holds no rows"),
        (tmp_path / "latin.jsonl", "not UTF-8"),
        (tmp_path / "nowhere", "there is no file"),
        (tmp_path, "holds no train.jsonl"),
    ):
        with pytest.raises(RowError, match=words):
            read_data(path, None)


def test_a_row_that_is_too_long_and_another_run_are_refused_by_name(folder, data, whole, tmp_path) -> None:
    with pytest.raises(RowError, match=r"train.jsonl:1: has \d+ tokens, at most 8: cut it, or --most-tokens"):
        run.train(folder, data, tmp_path / "out", most_tokens=8, **SMALL)
    with pytest.raises(TrainingError, match=r"--batch 8, not 4; give the same options"):
        run.train(folder, data, whole, **{**SMALL, "batch": 4})
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingError, match="cannot be written"):
        run.train(folder, data, tmp_path / "file" / "out", **SMALL)


def test_options_that_cannot_be_are_named() -> None:
    for given, words in (({"rate": -1}, "--rate"), ({"method": "half"}, "--method"), ({"batch": 0}, "--batch")):
        with pytest.raises(RecipeError, match=words):
            recipe_of("small", **given)
    with pytest.raises(RecipeError, match="--preset: 'huge' is none of paper, small"):
        recipe_of("huge")


def test_the_papers_preset_is_the_papers() -> None:
    lora, full, large = recipe_of("paper", 10**9), recipe_of("paper", method="full"), recipe_of("paper", 14 * 10**9)
    assert (lora.rank, lora.alpha, large.rank, large.alpha) == (8, 16, 16, 32)
    assert (full.rate, lora.rate) == (2e-5, 2e-4) and {full.epochs, lora.epochs} == {3} and full.batch == 512
    assert [full.rate_at(i, 40) for i in (0, 1, 20, 39)] == [0.5, 1, 1, 1]


def test_the_evaluation_that_a_kill_prevented_is_made_up_for(folder, data, whole, tmp_path, monkeypatch) -> None:
    out = tmp_path / "memo"
    real = Watcher.evaluate

    def killed(self, step):
        raise KeyboardInterrupt

    monkeypatch.setattr(Watcher, "evaluate", killed)
    with pytest.raises(KeyboardInterrupt):
        run.train(folder, data, out, **SMALL)
    monkeypatch.setattr(Watcher, "evaluate", real)
    run.train(folder, data, out, **SMALL)
    kept = ("step", "epoch", "held_out", "exact")
    found, wanted = (
        [[line[name] for name in kept] for line in read(where / "training.jsonl") if "exact" in line]
        for where in (out, whole)
    )
    assert found == wanted
