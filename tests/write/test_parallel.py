"""Dense references for models that were not trained with sparse ones: how texts are cut, and what is stored of them."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch

from mem_triton.ops.reposition import RotaryEmbedding
from mem_triton.store.bank import Bank
from mem_triton.store.bank.fingerprint import model_fingerprint
from mem_triton.store.block import MemoryBlock
from mem_triton.store.pool.placement import place, tempered
from mem_triton.write import Document, WriteConfig, Writer, bank_spec
from mem_triton.write.config import PARALLEL
from mem_triton.write.head import MARKER, HeadError, chat_head, reads_sparse_references
from mem_triton.write.items import SEAM, parallel_items
from tests.cli.test_cli import run
from tests.memory3.support import RECALL, encoder, tokenizer

LONG = " ".join(f"The locker of person {i} is number {i * 7}." for i in range(40))


def config(**changes) -> WriteConfig:
    return WriteConfig(**{**PARALLEL, "kind": "parallel", **changes})


def texts(document: Document, **changes) -> list[str]:
    return [item.entry.text for item in parallel_items(document, tokenizer(), config(**changes), "")]


def test_a_short_document_is_one_reference_with_a_seam_behind_it():
    (item,) = parallel_items(Document("\n The locker is falcon. \n"), tokenizer(), config(), "")
    assert item.entry.text == "The locker is falcon."
    assert item.ids == tokenizer().encode("The locker is falcon." + SEAM, add_special_tokens=False)
    assert (item.entry.metadata["start"], item.entry.metadata["end"]) == (2, 23)


@pytest.mark.parametrize(("limit", "overlap"), [(40, 0), (40, 8), (64, 32), (200, 24)])
def test_a_long_one_is_cut_with_an_overlap_and_nothing_is_lost(limit, overlap):
    items = list(
        parallel_items(Document(LONG), tokenizer(), config(reference_tokens=limit, overlap_tokens=overlap), "")
    )
    assert len(items) > 1 and all(len(item.ids) <= limit for item in items)
    spans = [(item.entry.metadata["start"], item.entry.metadata["end"]) for item in items]
    assert spans[0][0] == 0 and spans[-1][1] == len(LONG)
    for (_, end), (start, _) in itertools.pairwise(spans):
        between = LONG[start:end] if start < end else ""
        assert LONG[min(start, end) : max(start, end)].strip() == between.strip(), "only blanks may be left out"
        assert bool(between.strip()) == (overlap > 0)
        assert len(tokenizer().encode(between, add_special_tokens=False)) <= overlap


def test_titles_stand_in_front_of_what_does_not_say_them():
    told = Document("The locker is falcon.", metadata={"heading": "Keys > East wing"})
    assert texts(told) == ["Keys > East wing\nThe locker is falcon."]
    assert texts(Document("# East wing\nFalcon.", metadata={"heading": "Keys > East wing"})) == ["# East wing\nFalcon."]
    first, *rest = texts(Document(f"Lockers of the house\n{LONG}"), reference_tokens=64, overlap_tokens=8)
    assert first.startswith("Lockers of the house\nThe locker")
    assert rest and all(text.startswith("Lockers of the house\n") for text in rest)
    assert texts(Document("x", metadata={"title": LONG}))[0] == "x", "a title that fills the reference is none"


def test_what_is_stored_is_the_text_under_the_head_of_a_chat(tmp_path):
    head = chat_head(tokenizer())
    assert head and tokenizer().encode(head, add_special_tokens=False)
    chosen = config(prefix_text=head)
    spec = bank_spec(chosen, model_fingerprint(RECALL), codec="fp32")
    with Bank.create(tmp_path / "bank", spec) as bank:
        writer = Writer(bank, encoder(), tokenizer(), chosen)
        (ref,) = writer.write([Document("The locker of Mara Stone is falcon.", name="a")]).added
        assert writer.write([Document("The locker of Mara Stone is falcon.", name="a")]).skipped == 1
        block, sink = bank.load(ref), bank.sink()
        whole = tokenizer().encode(f"{head}The locker of Mara Stone is falcon.{SEAM}", add_special_tokens=False)
        (expected,) = encoder().encode([whole])
        assert bank.spec.layers == tuple(range(encoder().num_layers))
        assert sink.tokens + block.tokens == len(whole), "the seams are between tokens"
        for name in ("keys", "values"):  # the head was read alone: sums of another length are rounded otherwise
            stored = torch.cat([getattr(sink, name), getattr(block, name)], 2)
            assert torch.allclose(stored, getattr(expected, name), rtol=0, atol=1e-4), name


def test_cold_entries_are_encoded_as_warm_ones(tmp_path):
    chosen = config(prefix_text=chat_head(tokenizer()))
    blocks = []
    for cold in (False, True):
        with Bank.create(tmp_path / str(cold), bank_spec(chosen, model_fingerprint(RECALL), codec="fp32")) as bank:
            writer = Writer(bank, encoder(), tokenizer(), chosen)
            (ref,) = writer.write([Document("The badge of Hugo Park is amber.", name="a")], cold=cold).added
            assert not cold or writer.fill([ref]) == [ref]
            blocks.append(bank.load(ref))
    assert torch.equal(blocks[0].keys, blocks[1].keys) and torch.equal(blocks[0].values, blocks[1].values)


@pytest.mark.parametrize("temperature", [0.5, 0.9, 1.0, 2.0])
def test_a_temperature_is_that_of_the_attention_to_entries(temperature):
    """Against softmax(q k / T) in fp64; what is not tempered differs, but at T = 1."""
    torch.manual_seed(0)
    keys, query = torch.randn(1, 2, 9, 16), torch.randn(2, 16, dtype=torch.float64)
    block = MemoryBlock(keys, torch.randn(1, 2, 9, 16), torch.arange(9, dtype=torch.int32).expand(1, 2, 9))
    rope = RotaryEmbedding(16, tuple(10000.0 ** (-i / 8) for i in range(8)))
    placed = place(block, [rope], "parallel", 128)
    assert placed.positions[0, 0].tolist() == list(range(-9, 0)), "it ends where the prompt begins"
    cooled = tempered(placed, temperature)

    def attention(some: torch.Tensor, t: float) -> torch.Tensor:
        return torch.softmax(torch.einsum("hd,hkd->hk", query, some[0].double()) / 4 / t, -1)

    error = (attention(cooled.keys, 1.0) - attention(placed.keys, temperature)).abs().max()
    assert error <= 4 * torch.finfo(torch.float32).eps
    assert torch.equal(cooled.values, placed.values)
    assert torch.equal(cooled.keys, placed.keys) == (temperature == 1.0)


def test_the_kind_follows_from_the_model(tmp_path):
    """A folder that says nothing gets dense references, one that says so sparse ones, as options of these ask for."""
    text = tmp_path / "text.txt"
    text.write_text("The locker of Mara Stone is falcon.\n")
    kinds = {}
    for name, model, options in (
        ("plain", RECALL, []),
        ("marked", RECALL.with_name("model-memory"), []),
        ("sparse", RECALL, ["--keep", "4"]),
    ):
        run("write", model, tmp_path / name, text, "--quiet", *options)
        info = json.loads(run("bank", "info", tmp_path / name, "--json"))
        kinds[name] = info["kind"]
    assert kinds == {"plain": "parallel", "marked": "memory3", "sparse": "memory3"}
    with Bank.open(tmp_path / "plain") as bank:
        assert (bank.spec.prefix_text, bank.spec.overlap_tokens) == (chat_head(tokenizer()), 64)


def test_a_head_of_ones_own(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The locker of Mara Stone is falcon.\n")
    for name, options, head in (
        ("raw", ["--head", "raw"], None),
        ("own", ["--head", "Notes: "], "Notes: "),
    ):
        run("write", RECALL, tmp_path / name, text, "--quiet", *options)
        with Bank.open(tmp_path / name) as bank:
            assert bank.spec.prefix_text == head and (bank.sink() is None) == (head is None)
    assert "prefix_text: the bank has" in run("write", RECALL, tmp_path / "own", text, "--head", "Other: ", code=2)
    assert "--head: is for kind" in run(
        "write", RECALL, tmp_path / "b", text, "--head", "x", "--kind", "prefix", code=2
    )
    assert "leave out --head" in run("write", RECALL, tmp_path / "b", text, "--head", "x", "--system", "y", code=2)
    assert "temperature: the bank has 1.0" in run("write", RECALL, tmp_path / "own", text, "--temperature", 0.9, code=2)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("said", ["{", "[]", '{"sparse_references": 1}', "\xff"])
def test_a_damaged_marker_is_named(tmp_path, said):
    folder = Path(shutil.copytree(RECALL, tmp_path / "model"))
    (folder / MARKER).write_text(said, encoding="latin-1")
    with pytest.raises(HeadError, match=MARKER):
        reads_sparse_references(folder)
    text = tmp_path / "text.txt"
    text.write_text("x")
    assert MARKER in run("write", folder, tmp_path / "b", text, code=2) and not (tmp_path / "b").exists()


def test_a_template_without_the_users_words_is_refused():
    class Strange:
        chat_template = "x"

        def apply_chat_template(self, *_, **__):
            return "nothing of it"

    with pytest.raises(HeadError, match="leaves the user's words out"):
        chat_head(Strange())


@pytest.mark.parametrize(
    "wrong",
    [
        {"keep_tokens": 4},
        {"context": "document"},
        {"overlap_tokens": 300},
        {"kind": "memory3", "overlap_tokens": 4},
    ],
)
def test_choices_that_do_not_go_together_are_refused(wrong):
    with pytest.raises(ValueError, match=r"parallel|overlap_tokens"):
        config(**wrong)
