"""From texts in a bank to tokens of an answer, in transformers: plans, retrieval, refreshing."""

from __future__ import annotations

import pytest
import torch

from benchmarks.recall import data
from mem_triton.store.bank import Bank
from mem_triton.store.bank.fingerprint import model_fingerprint
from mem_triton.store.pool.placement import place, place_sink
from mem_triton.store.pool.plan import FOREVER, Attachment
from mem_triton.systems.explicit.retrieval import Retriever
from mem_triton.write import Document, WriteConfig, Writer, bank_spec, dense
from mem_triton_transformers import (
    MemorySegment,
    TransformersEncoder,
    generate_with_retrieval,
    read_memory,
    read_plans,
    segments_of,
)
from mem_triton_transformers.explicit import model_ropes
from tests.memory3.support import RECALL
from tests.memory3.support import encoder as recall_encoder
from tests.support.models import save_tiny_model, tiny_model, tiny_tokenizer

OPTIONS = {"layers": 4, "seed": 3}
TEXTS = [
    "A raven sits in the old pine.",
    "Copper bells ring at noon.",
    "The glacier feeds nine rivers.",
    "Saffron is worth its weight.",
    "Nobody sails in that fog.",
    "The quarry closed long ago.",
    "Bees sleep in the lavender.",
]


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """A model, its encoder, and a folder of it."""
    folder = save_tiny_model(tmp_path_factory.mktemp("model"), **OPTIONS)
    model = tiny_model(**OPTIONS)
    return model, TransformersEncoder(model, tiny_tokenizer()), model_fingerprint(folder)


def make_bank(case, path, config: WriteConfig, texts=TEXTS, cold: bool = False) -> Bank:
    _, encoder, fingerprint = case
    bank = Bank.create(path, bank_spec(config, fingerprint, codec="fp32"))
    documents = [Document(text, name=f"text{i}") for i, text in enumerate(texts)]
    Writer(bank, encoder, encoder.tokenizer, config).write(documents, cold=cold)
    return bank


def greedy(model, prompt: list[int], count: int = 12) -> list[int]:
    return model.generate(torch.tensor([prompt]), max_new_tokens=count, do_sample=False)[0, len(prompt) :].tolist()


def test_b1_an_empty_plan_is_the_base_model(case, tmp_path):
    model, encoder, _ = case
    prompt = encoder.tokenizer.encode("Who sits in the pine?")
    stock = model(torch.tensor([prompt])).logits
    with make_bank(case, tmp_path / "bank", WriteConfig()) as bank:
        assert segments_of(model, bank, ()) == []
        with read_plans(model, bank, [()]):
            assert torch.equal(model(torch.tensor([prompt])).logits, stock)


def test_a_plan_reads_the_sink_everywhere_and_references_in_their_layers(case, tmp_path):
    model, encoder, _ = case
    prompt = encoder.tokenizer.encode("Who sits in the pine?")
    with make_bank(case, tmp_path / "bank", WriteConfig(layers=(1, 2), reference_tokens=64)) as bank:
        refs = [entry.ref for entry in bank.list()][:2]
        segments = segments_of(model, bank, [Attachment(refs[0], 3, 9), Attachment(refs[1])])
        assert [s.layers for s in segments] == [(0, 1, 2, 3), (1, 2), (1, 2)]
        assert [(s.first, s.end) for s in segments] == [(0, FOREVER), (3, 9), (0, FOREVER)]
        sink = bank.sink()
        length = len(encoder.tokenizer.encode("Reference:"))
        assert segments[0].block.positions[0, 0].tolist() == list(range(-64 - length, -64))
        assert torch.equal(segments[1].block.positions, bank.load(refs[0]).positions - 64)
        by_hand = [
            MemorySegment(place_sink(sink, model_ropes(model, range(4)), 64), (0, 1, 2, 3)),
            MemorySegment(place(bank.load(refs[0]), model_ropes(model, (1, 2)), "memory3", 64), (1, 2), 3, 9),
            MemorySegment(place(bank.load(refs[1]), model_ropes(model, (1, 2)), "memory3", 64), (1, 2)),
        ]
        with read_memory(model, [by_hand]):
            wanted = greedy(model, prompt)
        with read_plans(model, bank, [[Attachment(refs[0], 3, 9), Attachment(refs[1])]]):
            assert greedy(model, prompt) == wanted
        assert greedy(model, prompt) != wanted, "memory changes nothing"


def test_b5_a_prefix_out_of_the_bank_is_the_text_before_the_prompt(case, tmp_path):
    model, encoder, _ = case
    prompt = encoder.tokenizer.encode(" Who sits in the pine?")
    with make_bank(case, tmp_path / "bank", WriteConfig(kind="prefix"), TEXTS[:1]) as bank:
        text = encoder.tokenizer.encode(TEXTS[0])
        assert bank.load("text0@1").tokens == len(text)
        with read_plans(model, bank, [[Attachment("text0@1")]]):
            answer = greedy(model, prompt)
    assert answer == greedy(model, text + prompt) != greedy(model, prompt)


def test_b9_a_warm_and_a_cold_bank_answer_bit_for_bit_alike(case, tmp_path):
    model, encoder, _ = case
    prompt = encoder.tokenizer.encode("Who sits in the old pine at noon?")
    logits = []
    for cold in (False, True):
        with make_bank(case, tmp_path / f"cold-{cold}", WriteConfig(), cold=cold) as bank:
            fill = Writer(bank, encoder, encoder.tokenizer).fill if cold else None
            plan = Retriever(bank, decode=encoder.tokenizer.decode, top_k=3, fill=fill).plan(prompt)
            assert len(plan) == 3
            with read_plans(model, bank, [plan]):
                logits.append(model(torch.tensor([prompt])).logits)
    assert torch.equal(*logits)


def test_b11_references_are_exchanged_while_answering(case, tmp_path):
    """The tokens are those of a run that has the whole plan from the start: nothing earlier is touched by a refresh."""
    model, encoder, _ = case
    tokenizer = encoder.tokenizer
    prompt = tokenizer.encode("Tell me of ravens, bells and rivers.")
    with make_bank(case, tmp_path / "bank", WriteConfig()) as bank:
        retriever = Retriever(bank, decode=tokenizer.decode, top_k=2, every=8)
        answer, plan = generate_with_retrieval(model, bank, retriever, prompt, 20)
        length = len(prompt)
        starts = sorted({a.first for a in plan})
        last = (length - 1) // 8 * 8
        assert starts == [*range(0, last + 1, 8), length + 8, length + 16]
        assert {a.end for a in plan if a.first == last} == {length + 8}
        assert len({tuple(a.ref for a in plan if a.first == s) for s in starts}) > 2, "the same references everywhere"
        with read_plans(model, bank, [plan]):
            assert greedy(model, prompt, 20) == answer
        with read_plans(model, bank, [[a for a in plan if a.first <= last]]):
            other = greedy(model, prompt, 20)
        assert other[:9] == answer[:9] and other != answer


def test_what_the_bank_stores_is_what_the_encoder_gave(case, tmp_path):
    _, encoder, _ = case
    with make_bank(case, tmp_path / "bank", WriteConfig(kind="prefix"), TEXTS[:1]) as bank:
        whole = dense(encoder.encode([encoder.tokenizer.encode(TEXTS[0])])[0])
        assert torch.equal(bank.load("text0@1").keys, whole.keys)
        assert torch.equal(bank.load("text0@1").values, whole.values)


def test_the_recall_model_answers_from_a_bank_what_it_was_never_told(tmp_path):
    model, tokenizer, config = recall_encoder().model, recall_encoder().tokenizer, WriteConfig(kind="prefix")

    def render(*messages: tuple[str, str], ask: bool = False) -> str:
        chat = [{"role": role, "content": content} for role, content in messages]
        return tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=ask)

    with Bank.create(tmp_path / "bank", bank_spec(config, model_fingerprint(RECALL), codec="fp32")) as bank:
        told = [data.facts(seed=i, n=2) for i in range(8)]
        texts = [render(("user", data.fact_message(f)), ("assistant", data.REPLY)) for f in told]
        documents = [Document(text, name=f"told{i}") for i, text in enumerate(texts)]
        refs = Writer(bank, recall_encoder(), tokenizer, config).write(documents).added
        answers = {True: 0, False: 0}
        for ref, known in zip(refs, told, strict=True):
            question = tokenizer.encode(render(("user", data.question(known[1])), ask=True))
            for plan in ((Attachment(ref),), ()):
                with read_plans(model, bank, [plan]):
                    answer = tokenizer.decode(greedy(model, question, 8), skip_special_tokens=True)
                answers[bool(plan)] += data.is_correct(answer, known[1])
    assert answers[True] >= 7 and answers[False] <= 1, answers
