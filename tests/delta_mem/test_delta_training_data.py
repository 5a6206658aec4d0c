"""Conversations and recipes of ``mem-triton train delta``: what is read, and what is said of what is not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mem_triton.systems.delta_mem.training.conversations import DataError, read_conversations
from mem_triton.systems.delta_mem.training.recipe import parse_layers, recipe_of
from mem_triton.systems.delta_mem.training.tokens import session_of
from mem_triton.systems.recipes import RecipeError
from tests.support.models import tiny_tokenizer

USER, REPLY = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
SYSTEM = {"role": "system", "content": "s"}
GOOD = json.dumps({"messages": [USER, REPLY]})


def read(tmp_path: Path, *lines: str) -> list:
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8", errors="surrogatepass")
    return read_conversations(path)


def test_the_last_turn_of_a_chat_is_asked_and_what_is_before_it_told(tmp_path: Path) -> None:
    (found,) = read(tmp_path, json.dumps({"messages": [SYSTEM, USER, REPLY, USER, REPLY], "stage": 2, "group": "g"}))
    assert [m.role for m in found.told[0]] == ["system", "user", "assistant"] and len(found.told) == 1
    assert [m.role for m in found.asked] == ["system", "user", "assistant"]
    assert (found.stage, found.group, found.where) == (2, "g", f"{tmp_path}/data.jsonl:1")
    assert [m.role for m in found.in_context()] == ["system", "user", "assistant", "user", "assistant"]


def test_requests_are_chats_of_their_own(tmp_path: Path) -> None:
    one, two = read(tmp_path, "", json.dumps({"requests": [[USER], [USER, REPLY], [USER]]}), GOOD)
    assert [len(chat) for chat in one.told] == [1, 2] and one.where.endswith(":2")
    assert two.told == () and two.asked[-1].content == "b"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("{", r":2: not JSON"),
        ("[]", r":2: holds a list, expected \{\"messages\""),
        ('{"text": "a"}', ":2: has only text; expected"),
        (json.dumps({"messages": [USER], "requests": [[USER]]}), ":2: has both requests and messages"),
        ('{"messages": []}', r":2: messages is \[\], expected a list of messages"),
        ('{"requests": [[]]}', r":2: requests\[0\] is \[\]"),
        ('{"messages": [{"role": "user"}]}', r":2: messages\[0\] is .*expected"),
        ('{"messages": [{"role": "human", "content": "a"}]}', r"\[0\].role is 'human', expected system, user"),
        ('{"messages": [{"role": "user", "content": " "}]}', r"\[0\].content is ' ', expected a text"),
        ('{"messages": [{"role": "user", "content": 7}]}', r"\[0\].content is 7"),
        ('{"messages": [{"role": "user", "content": "\\ud83d"}]}', "half of a surrogate pair"),
        (json.dumps({"messages": [USER, USER]}), "message 1 .* is the user's; user and assistant take turns"),
        (json.dumps({"messages": [USER, SYSTEM]}), "system message that is not its first"),
        (json.dumps({"messages": [SYSTEM]}), "no message of the user"),
        (json.dumps({"messages": [USER], "stage": "x"}), "stage is 'x', expected an integer"),
        (json.dumps({"messages": [USER], "group": 3}), "group is 3, expected a text"),
    ],
)
def test_bad_rows_are_named_with_file_line_and_fix(tmp_path: Path, line: str, expected: str) -> None:
    with pytest.raises(DataError, match=expected) as error:
        read(tmp_path, GOOD, line)
    assert f"{tmp_path}/data.jsonl:2" in str(error.value)


def test_files_and_folders_that_hold_nothing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="DATA: there is no"):
        read_conversations(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"holds no \.jsonl or \.ndjson file"):
        read_conversations(tmp_path / "empty")
    (tmp_path / "latin.jsonl").write_bytes(b"\xe9\n")
    with pytest.raises(DataError, match="not UTF-8"):
        read_conversations(tmp_path / "latin.jsonl")
    with pytest.raises(DataError, match="holds no rows"):
        read(tmp_path, "", " ")


def test_a_folder_that_datasets_saved_is_read(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [{"messages": [USER, REPLY], "stage": 1}, {"messages": [USER, REPLY, USER, REPLY], "stage": 0}]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)}).save_to_disk(tmp_path / "splits")
    for name in ("one", "splits"):
        found = read_conversations(tmp_path / name)
        assert [len(c.told) for c in found] == [0, 1] and found[1].where == f"{tmp_path / name}, row 1"
    datasets.Dataset.from_list([{"messages": [{"role": "x", "content": "a"}]}]).save_to_disk(tmp_path / "bad")
    with pytest.raises(DataError, match="bad, row 0: messages"):
        read_conversations(tmp_path / "bad")
    datasets.DatasetDict({"dev": datasets.Dataset.from_list(rows)}).save_to_disk(tmp_path / "dev")
    with pytest.raises(DataError, match="none called train"):
        read_conversations(tmp_path / "dev")


def test_rows_that_are_too_long_or_whose_template_does_not_continue_are_refused(tmp_path: Path) -> None:
    (found,) = read(tmp_path, json.dumps({"messages": [USER, REPLY, USER, REPLY]}))
    tokenizer = tiny_tokenizer()
    assert session_of(tokenizer, found, 512, 512).context is not None
    with pytest.raises(DataError, match=r":1: the asked request has \d+ tokens, at most 5: cut it, or --asked-tokens"):
        session_of(tokenizer, found, 5, 512)
    with pytest.raises(DataError, match=r"what is told has \d+ tokens, at most 5: cut it, or --told-tokens"):
        session_of(tokenizer, found, 512, 5)
    tokenizer.chat_template = "{{ messages[0].content }}{% if add_generation_prompt %}?{% endif %}"
    with pytest.raises(DataError, match="chat template does not continue its own generation prompt"):
        session_of(tokenizer, found, 512, 512)


def test_the_paper_s_recipe_is_the_default() -> None:
    paper = recipe_of("paper")
    config = paper.adapter_config(36)
    assert (config.rank, config.alpha, config.delta_heads, config.beta_bias_init) == (8, 16.0, ("q", "o"), -1.5)
    assert config.output_init == "base_slice_fixed" and config.target_layers == ()
    assert (paper.rate, paper.warmup, paper.batch, paper.schedule) == (2e-4, 0.1, 32, "cosine")
    assert (paper.asked_tokens, paper.told_tokens, paper.state_only) == (512, 8192, 0.2)
    assert recipe_of("small").layer_indices(30) == tuple(range(10, 18))


def test_rates_warm_up_and_end() -> None:
    paper, small = recipe_of("paper"), recipe_of("small")
    assert paper.rate_at(0, 100) == pytest.approx(2e-5) and paper.rate_at(9, 100) == paper.rate_at(10, 100) == 2e-4
    assert paper.rate_at(99, 100) < 2e-7
    assert small.rate_at(50, 100) == small.rate_at(79, 100) == 2e-3 and small.rate_at(99, 100) == pytest.approx(1e-4)
    assert recipe_of("small", epochs=2).steps == 0 and recipe_of("small", epochs=2, steps=7).steps == 7


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"rank": 0}, "--rank: "),
        ({"rate": -1}, "--rate: "),
        ({"delta_heads": "q,x"}, "--delta_heads|--delta-heads"),
        ({"layers": "x"}, "--layers: 'x' is no list"),
        ({"layers": "9-3"}, "--layers"),
        ({"start": "warm"}, "--start"),
        ({"layers": "1-99999999"}, "beyond 4096"),
    ],
)
def test_bad_options_are_named(given: dict, expected: str) -> None:
    with pytest.raises(RecipeError, match=expected):
        recipe_of("small", **given)


def test_layers_are_those_of_the_model() -> None:
    assert parse_layers("3,5, 7-9") == (3, 5, 7, 8, 9)
    with pytest.raises(RecipeError, match="names layer 40, but the model has 30"):
        recipe_of("small", layers="2,40").layer_indices(30)
    with pytest.raises(RecipeError, match="--preset: 'huge' is none of paper, small"):
        recipe_of("huge")
