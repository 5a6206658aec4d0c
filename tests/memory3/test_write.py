"""The write path on the recall model and its tokenizer: idempotent, resumable, exact."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from mem_triton.ops.block_codec import CodecError, ProductCodec
from mem_triton.store.bank import Bank, BankError
from mem_triton.store.bank.fingerprint import model_fingerprint
from mem_triton.systems.explicit.retrieval import Retriever
from mem_triton.systems.explicit.training import train_product_codec
from mem_triton.write import Document, WriteConfig, Writer, bank_spec, chunks_of, config_of, dense, prefix_ids, sparsify
from mem_triton.write.items import windows_of
from tests.memory3.support import RECALL, TEXT, encoder, tokenizer
from tests.support.models import tiny_tokenizer

SENTENCES = [sentence.strip() + "." for sentence in TEXT.split(".")[:-1]]


def new_bank(path: Path, config: WriteConfig, **options) -> Bank:
    return Bank.create(path, bank_spec(config, model_fingerprint(RECALL), codec="fp32", **options))


def writer(bank: Bank, config: WriteConfig | None = None, **options) -> Writer:
    return Writer(bank, encoder(), tokenizer(), config, **options)


def facts(*which: int) -> list[Document]:
    return [Document(SENTENCES[i], f"facts.txt:{i}", f"fact.{i}") for i in which or range(len(SENTENCES))]


def same(a, b) -> bool:
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("keys", "values", "positions"))


def test_an_entry_is_its_text_encoded_alone_after_the_prefix(tmp_path):
    with new_bank(tmp_path / "bank", WriteConfig()) as bank:
        report = writer(bank).write(facts(0))
        (ref,) = report.added
        entry = bank.resolve(ref)
        assert (entry.text, entry.source, entry.tokens) == (SENTENCES[0], "facts.txt:0", 8)
        assert entry.metadata == {"start": 0, "end": len(SENTENCES[0])} and entry.id.startswith("fact.0:")
        prefix = tokenizer().encode("Reference:", add_special_tokens=False)  # this tokenizer has no BOS token
        ids = tokenizer().encode(SENTENCES[0], add_special_tokens=False)
        assert bank.token_ids(ref) == ids
        text = encoder().encode([ids], layers=[0, 1], prefix_ids=prefix)[0]
        assert same(bank.load(ref), sparsify(text, 8, scale=encoder().scale))
        assert same(bank.sink(), dense(encoder().encode([prefix])[0]))


def test_a_second_write_adds_nothing(tmp_path):
    with new_bank(tmp_path / "bank", WriteConfig()) as bank:
        first = writer(bank).write(facts())
        assert len(first.added) == 6 and first.skipped == 0 and first.tokens == 48
        revision = bank.revision
        again = writer(bank).write(facts() + facts(2))
        assert (again.added, again.filled, again.skipped, again.tokens) == ([], [], 7, 0)
        assert bank.revision == revision
        assert again.characters == sum(map(len, SENTENCES)) + len(SENTENCES[2])


def test_a_text_said_twice_is_written_once(tmp_path):
    with new_bank(tmp_path / "bank", WriteConfig()) as bank:
        report = writer(bank, commit=4).write(facts(0, 0, 1, 0))
        assert (len(report.added), report.skipped) == (2, 2)


def test_tenants_have_their_own_and_everybodys_are_shared(tmp_path):
    with new_bank(tmp_path / "bank", WriteConfig()) as bank:
        mine, theirs = (writer(bank).write(facts(0), tenant=name).added for name in ("acme", "umbrella"))
        assert len(mine) == len(theirs) == 1 and mine != theirs
        writer(bank).write(facts(1))
        assert writer(bank).write(facts(1), tenant="acme").skipped == 1
        assert [bank.resolve(ref, tenant="acme").tenant for ref in mine] == ["acme"]
        assert not bank.knows(theirs[0], tenant="acme")


@pytest.mark.parametrize("batch_size", [2, 16])
def test_batches_write_what_single_texts_do(tmp_path, batch_size):
    blocks = []
    for size in (1, batch_size):
        with new_bank(tmp_path / str(size), WriteConfig(keep_tokens=None)) as bank:
            report = writer(bank, batch_size=size, commit=5).write([*facts(), Document("Noted.", name="short")])
            blocks.append([bank.load(ref) for ref in report.added])
    for a, b in zip(*blocks, strict=True):
        assert torch.equal(a.positions, b.positions)
        torch.testing.assert_close(a.keys, b.keys, rtol=0, atol=2e-5 * float(a.keys.abs().max()))


def test_an_interrupted_write_keeps_its_groups_and_is_resumed(tmp_path):
    whole, path = tmp_path / "whole", tmp_path / "bank"

    def dying():
        yield from facts(0, 1, 2, 3)
        raise KeyboardInterrupt

    with new_bank(whole, WriteConfig()) as bank:
        writer(bank).write(facts())
        expected = {entry.id: bank.load(entry.ref) for entry in bank.list()}
    with new_bank(path, WriteConfig()) as bank, pytest.raises(KeyboardInterrupt):
        writer(bank, commit=3).write(dying())
    with Bank.open(path, writable=True) as bank:
        assert len(bank.list()) == 3
        report = writer(bank).write(facts())
        assert (len(report.added), report.skipped) == (3, 3)
        assert {entry.id for entry in bank.list()} == set(expected)
        assert all(same(bank.load(entry.ref), expected[entry.id]) for entry in bank.list())


def test_b9_a_warm_entry_is_bit_for_bit_a_cold_one(tmp_path):
    """Cold: only the text is there until retrieval finds it. What is stored then is what a warm bank has."""
    with new_bank(tmp_path / "warm", WriteConfig()) as warm, new_bank(tmp_path / "cold", WriteConfig()) as cold:
        writer(warm).write(facts())
        report = writer(cold).write(facts(), cold=True)
        assert len(report.added) == 6 and report.filled == []
        assert not any(entry.has_block for entry in cold.list())
        question = tokenizer().encode("What is the badge of Hugo Park?")
        options = {"decode": tokenizer().decode, "top_k": 3}
        assert Retriever(cold, **options).plan(question) == (), "cold entries need an encoder"
        plan = Retriever(cold, fill=writer(cold).fill, **options).plan(question)
        assert plan == Retriever(warm, **options).plan(question) and len(plan) == 3
        assert sum(entry.has_block for entry in cold.list()) == 3
        assert all(same(warm.load(a.ref), cold.load(a.ref)) for a in plan)
        assert same(warm.sink(), cold.sink())
        revision = cold.revision
        assert Retriever(cold, fill=writer(cold).fill, **options).plan(question) == plan
        assert cold.revision == revision, "filled entries are encoded again"


def test_cold_entries_are_filled_by_a_later_write(tmp_path):
    with new_bank(tmp_path / "bank", WriteConfig()) as bank:
        cold = writer(bank).write(facts(), cold=True).added
        assert writer(bank).write(facts(), cold=True).skipped == 6
        report = writer(bank).write(facts(1))
        assert (report.added, report.filled) == ([], [cold[1]])
        assert sorted(writer(bank, commit=2).fill_cold().filled) == sorted(set(cold) - {cold[1]})
        assert all(entry.has_block for entry in bank.list()) and writer(bank).fill_cold().filled == []
        with pytest.raises(BankError, match="encoded alone later"):
            writer(bank, WriteConfig(context="document")).write(facts(), cold=True)


def test_a_document_encoded_whole_gives_references_that_know_what_came_before(tmp_path):
    options = {"reference_tokens": 17, "keep_tokens": None}
    with new_bank(tmp_path / "bank", WriteConfig(**options)) as bank:
        alone = writer(bank).write([Document(TEXT)]).added
        config = WriteConfig(context="document", **options)
        whole = writer(bank, config).write([Document(TEXT)]).added
        assert len(alone) == len(whole) == 3 and not set(alone) & set(whole)
        assert writer(bank, config).write([Document(TEXT)]).skipped == 3
        ids = tokenizer().encode(TEXT, add_special_tokens=False)
        keys = encoder().encode([ids], layers=[0, 1], prefix_ids=prefix_ids(tokenizer(), config.prefix_text))[0].keys
        blocks = [bank.load(ref) for ref in whole]
        assert torch.equal(torch.cat([block.keys for block in blocks], dim=2), keys)
        assert all(block.positions[0, 0].tolist() == list(range(block.tokens)) for block in blocks)
        apart = bank.load(alone[2]).keys[1]
        assert not torch.allclose(apart, blocks[2].keys[1, :, -apart.shape[1] :], atol=1e-2)


def test_a_long_document_is_encoded_in_windows_that_overlap(tmp_path):
    names, values = ("Mara Stone", "Hugo Park", "Nina Price"), ("amber", "cedar", "comet")
    text = " ".join(
        f"The {thing} of {name} is {value}."
        for thing in ("desk", "badge", "team", "locker")
        for name in names
        for value in values
    )
    prefix = prefix_ids(tokenizer(), "<s>Reference:")
    options = {"reference_tokens": 17, "keep_tokens": None, "window_tokens": 64 + len(prefix)}
    config = WriteConfig(context="document", **options)
    chunks = chunks_of(Document(text), tokenizer(), 17, blanks=True)
    windows = windows_of(chunks, 64)
    assert len(chunks) == 18 and len(set(windows.values())) >= 5 and len({w for w, _ in windows.values()}) <= 9
    for i, chunk in enumerate(chunks):
        window, place = windows[i]
        assert window[place : place + len(chunk.token_ids)] == chunk.token_ids and len(window) <= 64
        assert place >= min(chunk.first, 32), "a reference that knows too little of what came before"
    with new_bank(tmp_path / "bank", config) as bank:
        report = writer(bank, config, commit=7).write([Document(text)])
        assert len(report.added) == 18
        window, place = windows[11]
        whole = encoder().encode([window], layers=[0, 1], prefix_ids=prefix)[0]
        assert same(bank.load(report.added[11]), dense(whole.slice(place, place + len(chunks[11].token_ids))))
        with pytest.raises(BankError, match=rf"window_tokens: {32 - len(prefix)} tokens hold no two references of 17"):
            writer(bank, config.model_copy(update={"window_tokens": 32})).write([Document(text)])


def test_a_prefix_keeps_its_text_whole_in_all_layers(tmp_path):
    config = WriteConfig(kind="prefix")
    with new_bank(tmp_path / "bank", config) as bank:
        assert bank.spec.layers == (0, 1, 2, 3) and bank.spec.prefix_text is None and bank.sink() is None
        (ref,) = writer(bank).write([Document(TEXT, name="facts")]).added
        assert ref == "facts@1"
        assert same(bank.load(ref), dense(encoder().encode([tokenizer().encode(TEXT)])[0]))
        assert writer(bank).write([Document(TEXT, name="facts")]).skipped == 1
        assert writer(bank).write([Document(TEXT + " Noted.", name="facts")]).added == ["facts@2"]


def test_what_may_not_be_kept_is_never_kept(tmp_path):
    with new_bank(tmp_path / "bank", WriteConfig()) as bank:
        texts = [
            Document("<|im_end|>The badge<|im_end|> is amber.<|im_end|>", name="a"),
            Document("<|im_end|>", name="b"),
        ]
        report = writer(bank).write(texts)
        assert (len(report.added), report.empty) == (1, 1)
        ids = bank.token_ids(report.added[0])
        kept = bank.load(report.added[0]).positions
        assert kept.shape[2] > 0 and not {ids[i] for i in kept.flatten().tolist()} & set(tokenizer().all_special_ids)


def test_a_bank_is_written_as_it_was_made(tmp_path):
    with new_bank(tmp_path / "bank", WriteConfig(layers=(1, 2), keep_tokens=4)) as bank:
        config = config_of(bank.spec)
        assert (config.layers, config.keep_tokens, config.prefix_text) == ((1, 2), 4, "<s>Reference:")
        for name, value in (("keep_tokens", 8), ("layers", "all"), ("reference_tokens", 64), ("prefix_text", None)):
            with pytest.raises(BankError, match=f"{name}: the bank has .*, asked for"):
                writer(bank, config.model_copy(update={name: value}))
        with pytest.raises(BankError, match="kind: the bank has 'memory3', asked for 'prefix'"):
            writer(bank, WriteConfig(kind="prefix"))
        with pytest.raises(BankError, match="has no model"):
            Writer(bank, None, tokenizer()).write(facts(0))


def test_settings_are_checked():
    assert WriteConfig().layer_indices(36) == tuple(range(18)) and WriteConfig().layer_indices(1) == (0,)
    assert WriteConfig(layers="all").layer_indices(3) == (0, 1, 2)
    assert WriteConfig(kind="prefix").layer_indices(3) == (0, 1, 2)
    for bad in ({"layers": [3, 1]}, {"layers": []}, {"keep_tokens": 200}, {"keep": 3}, {"keep_tokens": 0}):
        with pytest.raises(ValidationError):
            WriteConfig(**bad)
    with pytest.raises(ValidationError, match="a prefix is its whole document"):
        WriteConfig(kind="prefix", context="document")
    with pytest.raises(ValueError, match=r"layers: the model has 0\.\.3, got \[4\]"):
        WriteConfig(layers=[4]).layer_indices(4)


def test_the_prefix_of_tokenizers_with_and_without_bos():
    plain = tiny_tokenizer()
    assert prefix_ids(plain, None) == []
    assert prefix_ids(plain, "<s>Reference:") == plain.encode("Reference:")
    assert prefix_ids(plain, "<s>") == []
    bos = tiny_tokenizer()
    bos.bos_token = "<|im_start|>"
    assert prefix_ids(bos, "<s>Reference:") == [1, *plain.encode("Reference:")]
    assert prefix_ids(bos, "Note:") == plain.encode("Note:")
    assert prefix_ids(bos, None) == []  # it has one, and starts no text with it


class QuickCodec(ProductCodec):
    """Without rotation and coarse code, which take a minute to train."""

    def train(self, samples, factory=None):
        super().train(samples, "PQ16x4")


def test_a_codec_is_trained_on_what_the_bank_will_store(tmp_path, monkeypatch):
    monkeypatch.setattr("mem_triton.systems.explicit.training.ProductCodec", QuickCodec)
    config = WriteConfig(keep_tokens=None, layers="all")
    words = [
        f"The {thing} of Mara Stone is {value} {i}."
        for i in range(20)
        for thing in ("desk", "team", "badge")
        for value in ("amber", "cedar", "comet")
    ]
    documents = [Document(text, name=f"d{i}") for i, text in enumerate(words)]
    asked: list[int] = []

    def counted():
        for document in documents:
            asked.append(1)
            yield document

    fingerprint = model_fingerprint(RECALL)
    state = train_product_codec(config, fingerprint, encoder(), tokenizer(), counted(), vectors=9984)
    assert 9984 / 100 < len(asked) < len(documents), "it stops when it has enough"
    spec = bank_spec(config, fingerprint, codec="pq")
    with Bank.create(tmp_path / "bank", spec, state) as bank:
        (ref,) = writer(bank, config).write([documents[-1]]).added
        block = bank.load(ref)
        ids = tokenizer().encode(words[-1], add_special_tokens=False)
        prefix = prefix_ids(tokenizer(), config.prefix_text)
        exact = encoder().encode([ids], prefix_ids=prefix)[0].keys
        error = (block.keys - exact).norm() / exact.norm()
        assert 0.001 < float(error) < 0.6, "not quantised, or not trained"
    with pytest.raises(CodecError, match="too few"):
        train_product_codec(config, fingerprint, encoder(), tokenizer(), documents[:3])


def test_fault21_a_transaction_ends_by_tokens_and_by_time(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("mem_triton.write.writer.time.monotonic", lambda: clock[0])

    def commits(path, step: float, **options) -> list[int]:
        with new_bank(path, WriteConfig()) as bank:
            seen = []

            def progress(report):
                clock[0] += step
                seen.append(len(report.added))

            writer(bank, **options).write(facts(), progress=progress)
        return seen

    assert commits(tmp_path / "a", 0) == [0, 0, 0, 0, 0, 0, 6], "told after each text; one transaction"
    tokens = len(tokenizer().encode(SENTENCES[0], add_special_tokens=False))
    assert commits(tmp_path / "b", 0, commit_tokens=2 * tokens)[-3:-1] == [4, 6]
    assert commits(tmp_path / "c", 3.0, commit_seconds=5.0)[2] == 3, "no more than so many seconds are lost"


def test_fault21_a_long_text_is_left_out_of_cold_ones_too(tmp_path, monkeypatch):
    with new_bank(tmp_path / "bank", WriteConfig()) as bank:
        refs = writer(bank).write(facts(), cold=True).added
        one = writer(bank)
        monkeypatch.setattr(one, "_too_long", lambda item: "too long" if item.ref == refs[2] else None)
        report = one.fill_cold()
        assert sorted(report.filled) == sorted(set(refs) - {refs[2]}) and report.problems == ["facts.txt:2: too long"]


def test_fault21_a_paragraph_that_files_share_is_retrieved_once(tmp_path):
    with new_bank(tmp_path / "bank", WriteConfig()) as bank:
        documents = [Document(SENTENCES[i], f"{name}.txt", f"{name}{i}") for name in "abcdefgh" for i in (0, 1)]
        assert len(writer(bank).write(documents).added) == 16
        plan = Retriever(bank, decode=tokenizer().decode, top_k=2).plan(tokenizer().encode(SENTENCES[0]))
        assert {bank.resolve(a.ref).text for a in plan} == {SENTENCES[0], SENTENCES[1]} and len(plan) == 2
