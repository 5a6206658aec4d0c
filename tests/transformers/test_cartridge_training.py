"""``mem-triton train cartridge`` on tiny random models: what is learned from, resuming, what comes out, refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mem_triton.store.bank import Bank
from mem_triton.systems.explicit.cartridge_recipe import recipe_of
from mem_triton.systems.recipes import RecipeError
from mem_triton.write.chunking import Document
from mem_triton_transformers.cartridge_training import trainer
from mem_triton_transformers.cartridge_training.lessons import Chats, Lesson, hidden_states, logits_of, targets
from mem_triton_transformers.cartridge_training.questions import _asked, read_questions
from mem_triton_transformers.cartridge_training.run import _adapted, _first_rows, train
from mem_triton_transformers.cartridge_training.trainer import CartridgeTrainer, batch_of
from mem_triton_transformers.runs.folders import TrainingError
from mem_triton_transformers.runs.journal import read
from tests.support.documents import mem_triton
from tests.support.models import save_tiny_model, tiny_model, tiny_tokenizer

TEXT = "Mara keeps locker 17. Its code is falcon. The key hangs behind the door of room 4."
ASKED = [{"question": f"What is word {i}?", "answer": word} for i, word in enumerate(TEXT.split())]
RECIPE = recipe_of(rows=12, steps=6, batch=4, rate=0.05, answers=2, answer_tokens=4, held_out=4, dtype="float32")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"), "llama", head_dim=16)


@pytest.fixture
def questions(tmp_path) -> Path:
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ASKED))
    return path


def run(folder: Path, out: Path, questions: Path | None, recipe=RECIPE, **others):
    return train(folder, Document(TEXT, "locker.txt"), out, recipe, questions=questions, evaluate_every=2, **others)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_student_with_all_rows_of_the_text_is_the_teacher(family, tmp_path):
    model, chats = tiny_model(family), Chats(tiny_tokenizer())
    prompts = [(chats.with_chunk(TEXT, asked), chats.alone(asked)) for asked in ("a?", "how many?")]
    before = len(prompts[0][0]) - len(prompts[0][1])
    assert all(whole[before:] == alone for whole, alone in prompts)
    lessons = [Lesson(tuple(a), tuple(w), tuple(range(5, 5 + n))) for (w, a), n in zip(prompts, (3, 5), strict=True)]
    hidden = targets(model, lessons)
    recipe = recipe_of(rows=before, batch=2, dtype="float32")
    adapted = _adapted(model, recipe, "tiny")
    adapted.prompt_encoder["default"].load_prompt_embeddings(_first_rows(model, chats, TEXT, before))
    trainer = CartridgeTrainer(adapted, recipe, lessons, hidden, (lessons, hidden), tmp_path, {})
    assert trainer.divergence() < 1e-6
    with torch.no_grad():
        trainer.rows[3] += 1.0
    assert trainer.divergence() > 1e-4, "negative control: another row is another text"
    assert trainer.divergence(alone=True) > 1e-3


def test_rows_of_different_lengths_do_not_see_each_other():
    model = tiny_model("llama")
    pairs = [([5, 6, 7], [8, 9]), ([10, 11, 12, 13, 14, 15], [16, 17, 18])]
    for pair, together in zip(pairs, hidden_states(model, pairs), strict=True):
        torch.testing.assert_close(hidden_states(model, [pair])[0], together, rtol=1e-5, atol=1e-5)


def test_a_run_learns_goes_on_where_it_was_and_is_imported(folder, tmp_path, questions):
    whole = run(folder, tmp_path / "whole", questions)
    lines = [line for line in read(tmp_path / "whole" / "training.jsonl") if "loss" in line]
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert whole["divergence"]["cartridge"] < whole["divergence"]["nothing"]
    assert whole["recall"]["questions"] == whole["held_out"] == len(ASKED) // 4
    replies = [json.loads(line) for line in Path(whole["replies"]).read_text().splitlines()]
    assert [line["question"] for line in replies] == [row["question"] for row in ASKED[3::4]]
    assert set(replies[0]) == {"question", "answer", "text in the context", "cartridge", "first rows", "nothing"}

    out, seen = tmp_path / "parts", []
    assert run(folder, out, questions, tell=seen.append, stop=lambda: len(seen) >= 2) is None
    assert run(folder, out, questions)["divergence"] == whole["divergence"]
    again = [line for line in read(out / "training.jsonl") if "loss" in line]
    assert [line["loss"] for line in again] == pytest.approx([line["loss"] for line in lines], rel=1e-6)
    rows = [load_file(f / "adapter_model.safetensors")["prompt_embeddings"] for f in (out, tmp_path / "whole")]
    assert torch.equal(rows[0], rows[1])

    mem_triton(tmp_path, ["import", "parts", "bank", "--model", str(folder), "--id", "locker"])
    with Bank.open(tmp_path / "bank") as bank:
        assert bank.resolve("locker").tokens == RECIPE.rows
    card = (out / "README.md").read_text()
    assert "| first rows |" in card and "text in the context" in card


def test_a_model_may_ask_itself(folder, tmp_path, monkeypatch):
    """A random model asks nothing that could be read: its replies are taken for questions as they are."""
    from mem_triton_transformers.cartridge_training import questions as asking

    monkeypatch.setattr(asking, "_asked", lambda text: f"{text.encode().hex()[:12]}?" if text else None)
    recipe = RECIPE.model_copy(update={"asked": 8, "steps": 2})
    report = run(folder, tmp_path / "out", None, recipe)
    kept = (tmp_path / "out" / "questions.jsonl").read_text().splitlines()
    assert len(kept) >= 2 and report["recall"] is None
    said = []
    assert run(folder, tmp_path / "out", None, recipe, say=said.append)["digest"] == report["digest"]
    assert any("of an earlier run" in line for line in said)


@pytest.mark.parametrize(
    ("reply", "asked"),
    [
        ("What is the code of the locker?", "What is the code of the locker?"),
        ('Sure! Here is one: "Who keeps locker 17?" It is short.', "Who keeps locker 17?"),
        ("1. Where does the key hang?\n2. Why?", "Where does the key hang?"),
        ("There is nothing to ask.", None),
        ("Why?", None),
    ],
)
def test_the_first_question_of_a_reply_is_taken(reply, asked):
    assert _asked(reply) == asked


def test_questions_go_to_the_chunk_that_they_are_about(tmp_path):
    path = tmp_path / "q.txt"
    path.write_text("Who keeps the locker?\n\nWhat does the cook bake?\n")
    assert [q.chunk for q in read_questions(path, ["The cook can bake bread.", "Mara keeps the locker."])] == [1, 0]
    row = {"prompt": [{"role": "user", "content": "Who?"}], "completion": [{"role": "assistant", "content": "Mara."}]}
    path = tmp_path / "rows.jsonl"
    path.write_text(2 * (json.dumps(row) + "\n"))
    assert [(q.text, q.answer) for q in read_questions(path, ["x"])] == 2 * [("Who?", "Mara.")]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('{"question": "a?"}\n{"question"', r"q.jsonl:2: not JSON"),
        ('{"question": "a?"}\n{"question": 3}', r"q.jsonl:2: question is 3; expected"),
        ('{"question": "a?"}\n[]', r"q.jsonl:2: holds a list"),
        ('{"question": "a?", "answer": 7}', r"q.jsonl:1: answer is 7"),
        ('{"question": "a?"}', r"holds 1 question\(s\), and at least two are needed"),
        (b"\xff\xfe", r"not UTF-8 text \(byte 0\)"),
    ],
)
def test_bad_questions_are_named(tmp_path, lines, message):
    path = tmp_path / "q.jsonl"
    path.write_bytes(lines if isinstance(lines, bytes) else lines.encode())
    with pytest.raises(TrainingError, match=message):
        read_questions(path, ["x"])


def test_what_cannot_be_trained_is_refused(folder, tmp_path, questions):
    with pytest.raises(TrainingError, match=r"--rows: 4000, but document and chat have \d+ tokens; give fewer"):
        run(folder, tmp_path / "a", questions, RECIPE.model_copy(update={"rows": 4000}))
    with pytest.raises(RecipeError, match="--rows: 1 rows, of which 1 stay as they are"):
        recipe_of(rows=1)
    with pytest.raises(RecipeError, match="--rate: Input should be greater than 0"):
        recipe_of(rate=-1.0)
    out = tmp_path / "b"
    run(folder, out, questions)
    with pytest.raises(TrainingError, match=r"OUT: .* holds a run with --rows 12, not 11"):
        run(folder, out, questions, RECIPE.model_copy(update={"rows": 11}))
    state = out / "trainer" / "state.safetensors"
    state.write_bytes(state.read_bytes()[:100])
    with pytest.raises(TrainingError, match=r"state.safetensors: .*; remove it to begin anew"):
        run(folder, out, questions)


def test_a_loss_that_is_no_number_ends_the_run(folder, tmp_path, questions, monkeypatch):
    monkeypatch.setattr(trainer, "logits_of", lambda model, hidden: logits_of(model, hidden) * float("nan"))
    with pytest.raises(TrainingError, match="the loss is not a number; lower --rate"):
        run(folder, tmp_path / "out", questions)
    assert not list((tmp_path / "out").glob("adapter*"))


def test_every_lesson_is_learned_once_an_epoch():
    for count, batch in ((10, 4), (3, 8), (8, 4)):
        each = -(-count // batch)
        epochs = [[i for step in range(each) for i in batch_of(count, batch, 7, e * each + step)] for e in range(3)]
        assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
        assert count < 4 or epochs[0] != epochs[1]
