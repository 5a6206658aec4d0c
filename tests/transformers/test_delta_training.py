"""``mem-triton train delta`` on tiny random models: gradients, chunks, resuming, what comes out, what is refused."""

from __future__ import annotations

import csv
import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from mem_triton.systems.delta_mem import load_adapter
from mem_triton.systems.delta_mem.training.conversations import read_conversations
from mem_triton.systems.delta_mem.training.recipe import Recipe, recipe_of
from mem_triton.systems.delta_mem.training.tokens import Request, Session, session_of
from mem_triton_transformers import (
    apply_mem_triton,
    get_memory,
    remove_mem_triton,
    reset_memory,
    set_memory_write,
    trainable_adapter,
)
from mem_triton_transformers.delta_training import checkpoint
from mem_triton_transformers.delta_training.evaluate import evaluate
from mem_triton_transformers.delta_training.forward import SessionRunner, another
from mem_triton_transformers.delta_training.losses import keep_loss, memory_loss
from mem_triton_transformers.delta_training.run import train
from mem_triton_transformers.runs.journal import read
from tests.support.models import random_adapter, save_tiny_model, tiny_model, tiny_tokenizer

RECIPE = recipe_of(
    "small",
    rank=4,
    state_heads=2,
    layers="all",
    steps=6,
    batch=4,
    rows=2,
    reply_tokens=4,
    contrast=0.3,
    causal=0.3,
    anchor=0.1,
    kl=0.2,
    sparsity=0.5,
    state_only=0.7,
    told_tokens=400,
    asked_tokens=300,
    dtype="float32",
)


def chat(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def rows() -> list[dict]:
    told = [
        {"requests": [chat(f"k{i} is {i % 5}", "ok"), chat(f"k{i}?", f"{i % 5}")], "stage": i % 2, "group": "one"}
        for i in range(10)
    ]
    return [*told, {"messages": chat("a is 1", "ok", "a?", "1")}, {"messages": chat("hello")}, {"messages": chat("x")}]


def write_rows(path: Path, some: list[dict] | None = None) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in some or rows()))
    return path


def sessions(seed: int = 0, count: int = 3, told: int = 2, length: int = 7) -> list[Session]:
    generator = torch.Generator().manual_seed(seed)

    def request(tokens: int, reply: int) -> Request:
        return Request(tuple(torch.randint(4, 260, (tokens,), generator=generator).tolist()), reply)

    def session(i: int) -> Session:
        earlier = tuple(request(length + i + j, 4) for j in range(told - i % 2))
        asked = request(6, 4)
        return Session(earlier, asked, (True, False), request(12, 10))

    return [session(i) for i in range(count)]


def runner_of(model: torch.nn.Module, chunk_tokens: int = 4096) -> tuple[SessionRunner, dict]:
    adapter = random_adapter(model, strength=0.2, rank=4, num_state_heads=2)
    parameters = trainable_adapter(model, adapter)
    return SessionRunner(model, chunk_tokens), parameters


def losses(runner: SessionRunner, causal: float = 0.3) -> torch.Tensor:
    """The loss of a recipe in which everything counts, from the state alone, and of what must stay."""
    some = sessions()
    wide = {"margin": 1.0, "anchor_margin": 1.0, "sparsity_target": 0.0}  # gentle curves, no kinks
    recipe = RECIPE.model_copy(update={"state_only": 1.0, "keep_replies": 1.0, "causal": causal, **wide})
    memory = memory_loss(runner, recipe, random.Random(1), some).loss
    return memory + keep_loss(runner, recipe, some[:2], some[1:]).loss


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_gradients_of_all_losses_match_finite_differences_in_fp64(family: str) -> None:
    runner, parameters = runner_of(tiny_model(family, dtype=torch.float64))
    for parameter in parameters.values():  # fp32, as it trains, would round the differences away
        parameter.data = parameter.data.double()
    losses(runner, causal=0).backward()  # another session's memory is a constant to that loss
    generator, step = torch.Generator().manual_seed(0), 2.0**-12
    for name, parameter in parameters.items():
        direction, found = torch.randn(parameter.shape, generator=generator).sign(), []
        with torch.no_grad():
            for sign in (1, -1):
                parameter.add_(direction, alpha=sign * step)
                found.append(losses(runner, causal=0).item())
                parameter.sub_(direction, alpha=sign * step)
        slope = (found[0] - found[1]) / (2 * step)
        assert (parameter.grad * direction).sum().item() == pytest.approx(slope, rel=1e-2, abs=1e-4), (
            name
        )  # norms and softmax are fp32


def test_the_backward_pass_in_chunks_is_that_of_the_whole() -> None:
    """Keys, values and states pass from chunk to chunk with their gradients; rows end in different chunks."""
    found = {}
    for chunk, recompute in ((4096, False), (5, False), (5, True)):
        runner, parameters = runner_of(tiny_model(dtype=torch.float64), chunk)
        runner.recompute = recompute
        loss = losses(runner)
        loss.backward()
        found[chunk, recompute] = loss.item(), {n: p.grad.clone() for n, p in parameters.items()}
    loss, gradients = found[4096, False]
    for key in ((5, False), (5, True)):
        assert found[key][0] == pytest.approx(loss, rel=1e-6)
        for name, gradient in gradients.items():
            torch.testing.assert_close(found[key][1][name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_with_recomputation_memory_does_not_grow_with_the_activations() -> None:
    """Bytes that the graph holds for the backward pass, for a request of 16 chunks."""

    def held(recompute: bool) -> int:
        runner, _ = runner_of(tiny_model(layers=4), 16)
        runner.recompute, seen = recompute, {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            kept.append(tensor)
            return tensor

        kept: list[torch.Tensor] = []  # so that no address is used twice
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            states = runner.tell([[Request(tuple(range(4, 260)), 250)]])
        states[0].sum().backward()
        return sum(seen.values())

    assert held(True) < held(False) / 4


def test_rows_with_fewer_requests_keep_their_states_meanwhile() -> None:
    runner, _ = runner_of(tiny_model())
    some = sessions(count=2)  # two requests, one request
    with torch.no_grad():
        together = runner.tell([s.told for s in some])
        for i, session in enumerate(some):
            alone = runner.tell([session.told])
            for a, b in zip(together, alone, strict=True):
                torch.testing.assert_close(a[i : i + 1], b, rtol=1e-4, atol=1e-6)


def test_the_frozen_model_is_what_it_was() -> None:
    model, some = tiny_model(), sessions()
    ids = torch.tensor([some[0].asked.ids])
    plain, logits = model.model(ids).last_hidden_state, model(ids).logits[0, 3:5]
    runner, _ = runner_of(model)
    rows, told = [some[0].asked.ids], runner.tell([some[0].told])
    assert torch.equal(runner.run(rows, None, write=False)[0], plain)
    assert not torch.equal(runner.run(rows, told, write=False)[0], plain)
    torch.testing.assert_close(runner.ask([some[0].asked], None, write=False).logits, logits)


def test_an_evaluation_tells_ones_own_memory_from_anothers() -> None:
    """Replies that the state alone decides: its own are right, another's and none are not."""
    runner, _ = runner_of(tiny_model())
    some = [s for s in sessions(count=8) if len(s.told) == 2]
    with torch.no_grad():
        states = runner.tell([s.told for s in some])
        fitting = []
        for i, session in enumerate(some):
            own = runner.ask([Request(session.asked.ids[:5], 4)], tuple(s[i : i + 1] for s in states), True)
            first = own.logits.argmax(-1).item()
            fitting.append(Session(session.told, Request((*session.asked.ids[:4], first), 4), (True,), group="g"))
        found = evaluate(runner, fitting, rows=8)["g"]
        assert found["own"]["exact"] == len(some) and found["own"]["interval"][0] > 0.4
        assert (
            found["another"]["exact"] < len(some) and found["own"]["recalled_loss"] < found["another"]["recalled_loss"]
        )
        moved = another(states)
        assert all(torch.equal(a[1], b[0]) for a, b in zip(moved, states, strict=True))


def tiny(tmp_path: Path) -> tuple[Path, Path]:
    return save_tiny_model(tmp_path / "model"), write_rows(tmp_path / "data.jsonl")


def test_a_run_that_was_stopped_goes_on_with_the_same_result(tmp_path: Path) -> None:
    model, data = tiny(tmp_path)
    whole = train(model, data, tmp_path / "whole", RECIPE, held_out=data, save_every=2, evaluate_every=2)
    count = iter(range(100))
    halves = {"held_out": data, "save_every": 2, "evaluate_every": 2}
    assert train(model, data, tmp_path / "halves", RECIPE, stop=lambda: next(count) == 2, **halves) is None
    assert [p.name for p in checkpoint.checkpoints(tmp_path / "halves")] == ["checkpoint-2", "checkpoint-3"]
    said: list[str] = []
    again = train(model, data, tmp_path / "halves", RECIPE, say=said.append, **halves)
    assert "going on from step 3 of 6" in said
    assert again["fingerprint"] == whole["fingerprint"] and again["held_out"] == whole["held_out"]
    logs = [[{**x, "seconds": 0} for x in read(tmp_path / f / "training.jsonl")] for f in ("whole", "halves")]
    assert logs[0] == logs[1] and [x["step"] for x in logs[0] if "loss" in x] == [1, 2, 3, 4, 5, 6]
    curve = list(csv.DictReader((tmp_path / "halves" / "loss.csv").open()))
    assert [int(line["step"]) for line in curve] == [1, 2, 3, 4, 5, 6]


def test_a_kill_before_the_last_evaluation_leaves_it_to_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data = tiny(tmp_path)
    options = {"held_out": data, "evaluate_every": 100}
    with monkeypatch.context() as patched:
        patched.setattr("mem_triton_transformers.delta_training.trainer.evaluate", lambda *a: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(model, data, tmp_path / "out", RECIPE, **options)
    assert train(model, data, tmp_path / "out", RECIPE, **options)["held_out"]["one"]["own"]["sessions"] == 10
    again = train(model, data, tmp_path / "out", RECIPE, **options)
    assert again["held_out"] and len([x for x in read(tmp_path / "out" / "training.jsonl") if "held_out" in x]) == 1


def test_without_the_moments_the_result_would_be_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = tiny(tmp_path)
    whole = train(model, data, tmp_path / "whole", RECIPE)
    count = iter(range(100))
    train(model, data, tmp_path / "halves", RECIPE, stop=lambda: next(count) == 2)
    monkeypatch.setattr(checkpoint, "restore", lambda *args: None)
    assert train(model, data, tmp_path / "halves", RECIPE)["fingerprint"] != whole["fingerprint"]


def test_a_killed_command_goes_on_with_the_same_result(tmp_path: Path) -> None:
    model, data = tiny(tmp_path)
    options = [
        "--preset",
        "small",
        "--rank",
        "2",
        "--layers",
        "all",
        "--steps",
        "12",
        "--batch",
        "2",
        "--rows",
        "2",
        "--save-every",
        "3",
        "--reply-tokens",
        "3",
        "--json",
    ]

    def command(out: Path) -> list[str]:
        return [sys.executable, "-m", "mem_triton.cli", "train", "delta", str(model), str(data), str(out), *options]

    run = {"capture_output": True, "text": True, "env": os.environ | {"OMP_NUM_THREADS": "1"}}
    whole = subprocess.run(command(tmp_path / "whole"), check=True, **run)
    process = subprocess.Popen(command(tmp_path / "killed"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not checkpoint.checkpoints(tmp_path / "killed") and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "README.md").exists()  # it was killed on its way
    (tmp_path / "killed" / "trainer" / "checkpoint-99.partial").mkdir()  # as a kill in the middle of a save leaves it
    again = subprocess.run(command(tmp_path / "killed"), check=True, **run)
    assert json.loads(again.stdout)["fingerprint"] == json.loads(whole.stdout)["fingerprint"]
    assert not (tmp_path / "killed" / "trainer" / "checkpoint-99.partial").exists()


def test_the_adapter_loads_in_transformers_and_the_card_says_how_it_was_made(tmp_path: Path) -> None:
    model, data = tiny(tmp_path)
    report = train(
        model, data, tmp_path / "out", RECIPE, held_out=data, command="mem-triton train delta …", name="tiny"
    )
    adapter = load_adapter(tmp_path / "out")
    assert adapter.fingerprint == report["fingerprint"] and adapter.scope == "sessions"
    loaded = apply_mem_triton(tiny_model(), {"delta": {"adapter": str(tmp_path / "out")}})
    with torch.no_grad():
        loaded(torch.arange(4, 12)[None])
    assert len(get_memory(loaded)) == 2
    reset_memory(loaded), remove_mem_triton(loaded)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "base_model: tiny" in card and "another session's" in card and "mem-triton train delta …" in card
    assert Recipe(**json.loads((tmp_path / "out" / "recipe.json").read_text())) == RECIPE
    train(model, data, tmp_path / "out", RECIPE.model_copy(update={"weights": "bfloat16"}), held_out=data)
    halved, name = load_adapter(tmp_path / "out").tensors(), "model.layers.0.self_attn.memory_q_proj"
    assert halved[name].dtype == torch.bfloat16
    torch.testing.assert_close(halved[name].float(), adapter.tensors()[name], rtol=1e-2, atol=1e-3)


def test_a_curriculum_waits_for_the_first_stage(tmp_path: Path) -> None:
    model, data = tiny(tmp_path)
    lines: list[dict] = []
    train(model, data, tmp_path / "slow", RECIPE, tell=lines.append)
    assert {line["stage"] for line in lines if "stage" in line} == {0}
    lines.clear()
    fast = RECIPE.model_copy(update={"advance": 1e-9, "plain_share": 0.0, "state_only": 1.0, "steps": 30})
    constant = [{"requests": [chat("a is 1", "ok"), chat("a?", "1")], "stage": s} for s in (0, 0, 3, 3)]
    train(
        model, write_rows(data, constant), tmp_path / "fast", fast.model_copy(update={"rate": 0.1}), tell=lines.append
    )
    assert [line["stage"] for line in lines if "loss" in line][-1] == 3


def test_own_replies_are_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mem_triton_transformers.delta_training.replies import with_replies

    model, tokenizer = tiny_model(), tiny_tokenizer()
    found = read_conversations(write_rows(tmp_path / "data.jsonl"))
    path = tmp_path / "replies.jsonl"
    first = with_replies(model, tokenizer, found, 4, path)
    assert all(c.asked[-1].role == "assistant" for c in first) and len(path.read_text().splitlines()) == 2
    path.write_text(path.read_text() + '{"key": "cut sho')
    monkeypatch.setattr(model, "generate", None)
    assert with_replies(model, tokenizer, found, 4, path) == first


def test_recalled_tokens_are_those_that_only_the_memory_can_know(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "d.jsonl", [{"requests": [chat("k is 77", "ok"), chat("k ?", "k 7")]}])
    session = session_of(tiny_tokenizer(), read_conversations(data)[0], 512, 512)
    text = [tiny_tokenizer().decode([i]) for i in session.asked.ids[session.asked.reply :]]
    assert [t for t, r in zip(text, session.recalled, strict=True) if r] == ["7"]
    assert (
        tiny_tokenizer().decode(session.told[0].ids).endswith("ok")
    )  # the end of turn is sampled last, never processed


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = tiny(tmp_path)
    real, calls = checkpoint.safetensors.torch.save_file, []

    def full(tensors: dict, path: Path, *args: object, **kwargs: object) -> None:
        calls.append(path)
        if "training_state" in str(path) and len([c for c in calls if "training_state" in str(c)]) > 1:
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(tensors, path, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint.safetensors.torch, "save_file", full)
        with pytest.raises(OSError, match="No space left"):
            train(model, data, tmp_path / "out", RECIPE, save_every=2)
    assert [p.name for p in checkpoint.checkpoints(tmp_path / "out")] == ["checkpoint-2"]
    whole = train(model, data, tmp_path / "whole", RECIPE, save_every=2)
    assert train(model, data, tmp_path / "out", RECIPE, save_every=2)["fingerprint"] == whole["fingerprint"]


def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path: Path) -> None:
    model, data = tiny(tmp_path)
    whole = train(model, data, tmp_path / "out", RECIPE, save_every=2)
    newest = checkpoint.checkpoints(tmp_path / "out")[-1] / "training_state.safetensors"
    newest.write_bytes(newest.read_bytes()[:100])
    said: list[str] = []
    assert train(model, data, tmp_path / "out", RECIPE, say=said.append)["fingerprint"] == whole["fingerprint"]
    assert "going on from step 4 of 6" in said


def test_another_recipe_or_data_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    model, data = tiny(tmp_path)
    train(model, data, tmp_path / "out", RECIPE)
    with pytest.raises(checkpoint.TrainingError, match=r"--rate 0.002, not 0.5; give the same options"):
        train(model, data, tmp_path / "out", RECIPE.model_copy(update={"rate": 0.5}))
    longer = train(model, data, tmp_path / "out", RECIPE.model_copy(update={"keep": 5.0, "steps": 8}))
    mixes = [line["mix"] for line in read(tmp_path / "out" / "training.jsonl") if "mix" in line]
    assert longer["steps"] == 8 and [(mix["keep"], mix["steps"]) for mix in mixes] == [(1.0, 6), (5.0, 8)]
    with pytest.raises(checkpoint.TrainingError, match="another data"):
        train(model, write_rows(data, rows()[:-1]), tmp_path / "out", RECIPE)


def test_what_cannot_be_trained_is_refused(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model, data = tiny(tmp_path)
    fused = tmp_path / "fused"
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=512)).save_pretrained(fused)
    tiny_tokenizer().save_pretrained(fused)
    with pytest.raises(ValueError, match="GPT2LMHeadModel has no self_attn with q_proj"):
        train(fused, data, tmp_path / "out", RECIPE)
    (tmp_path / "file").write_text("")
    with pytest.raises(checkpoint.TrainingError, match="cannot be written: Not a directory"):
        train(model, data, tmp_path / "file" / "out", RECIPE)
    silent = save_tiny_model(tmp_path / "silent")
    (silent / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="no chat template"):
        train(silent, data, tmp_path / "out", RECIPE)
    with pytest.raises(checkpoint.TrainingError, match="no row tells anything"):
        train(model, write_rows(data, [{"messages": chat("a", "b")}] * 3), tmp_path / "out", RECIPE)


def test_a_closed_form_start_lets_a_question_find_its_answer(tmp_path: Path) -> None:
    """Queries of what asks and keys of what answers agree within a session more than across; at random they do not."""
    from mem_triton_transformers.delta_training.start import _pairs, closed_form

    data = [
        {"requests": [chat(f"{chr(97 + i)} has {i % 7}", "ok"), chat(f"{chr(97 + i)}?", f"{i % 7}")]} for i in range(20)
    ]
    found = [session_of(tiny_tokenizer(), c, 99, 99) for c in read_conversations(write_rows(tmp_path / "d", data))]
    model, name = tiny_model(), "model.layers.1.self_attn"
    pairs = _pairs(model, [name], found)[name]
    config = RECIPE.adapter_config(2)
    parameters = trainable_adapter(model, config)

    def agreement() -> float:
        keys, queries = (
            torch.nn.functional.normalize(torch.tanh(torch.stack(x) @ parameters[f"{name}.memory_{p}_proj"].T), dim=-1)
            for x, p in ((pairs.there, "k"), (pairs.asking, "q"))
        )
        cosines = queries @ keys.T
        return (cosines.diagonal().mean() - cosines.mean()).item()

    with torch.no_grad():
        before = agreement()
        set_memory_write(model, False)
        closed_form(model, config, found, 0, parameters)
        assert agreement() > 0.3 > abs(before) + 0.1
    assert [text for text in pairs.tokens[:3]] == [found[i].asked.ids[found[i].asked.reply] for i in range(3)]
    with pytest.raises(ValueError, match="closed_form needs replies that repeat a token"):
        closed_form(model, config, sessions()[:0], 0, parameters)


def test_a_run_can_begin_with_a_closed_form(tmp_path: Path) -> None:
    model, data = tiny(tmp_path)
    recipe = RECIPE.model_copy(update={"start": "closed_form", "steps": 1})
    assert train(model, data, tmp_path / "out", recipe)["steps"] == 1
