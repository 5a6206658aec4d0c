"""Explicit memory and the recall model: aims on small samples through banks on disk, and what must stay wrong."""

from __future__ import annotations

import random

import pytest
import torch

from benchmarks.common.statistics import wilson
from benchmarks.recall import data, train_memory
from benchmarks.recall.chat import asking
from benchmarks.recall.explicit import MODEL, Evaluation, summary
from benchmarks.recall.explicit_data import LENGTHS, library, sentence_tokens
from benchmarks.recall.explicit_world import KINDS, chosen_names, questions, right_answers
from benchmarks.recall.train_memory import answers, written

QUESTIONS, SEED = 64, 7


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory):
    torch.set_num_threads(1)
    return Evaluation(MODEL, tmp_path_factory.mktemp("banks"), QUESTIONS, [SEED])


@pytest.fixture(scope="module")
def recall(evaluation) -> dict[str, float]:
    evaluation.by_references(counts=(1, 5))
    evaluation.by_codec(codecs=("bf16", "fp8", "int8"))
    return {name: sum(right) / len(right) for name, right in evaluation.cells.items()}


def test_references_fit_and_tell_their_facts_once():
    rng = random.Random(1)
    for _ in range(200):
        told, texts = library(rng, 3, (1, 4), shared=2 / 3)
        facts = [(fact.name, fact.attribute) for own in told for fact in own]
        assert len(set(facts)) == len(facts)
        for own, text in zip(told, texts, strict=True):
            assert all(sum(s in text for s in _told(fact)) == 1 for fact in own)
            assert sum(sentence_tokens(s) for s in text.split(". ")) <= LENGTHS[1]


def _told(fact: data.Fact) -> set[str]:
    return {form.format(**vars(fact)).removeprefix("Note that ") for form in data.FACT_FORMS}


def test_references_are_at_most_128_tokens(evaluation):
    texts = [text for question in questions(SEED, 64, (1, 8)) for text in question.texts.values()]
    counts = [len(ids) for ids in evaluation.tokenizer(texts)["input_ids"]]
    assert max(counts) <= 128 and sum(counts) / len(counts) > 85


@pytest.mark.parametrize("kind", ["sparse", "dense", "prefix"])
def test_training_reads_what_the_product_reads(evaluation, kind):
    """The training forward has gradients and no bank; its logits must be those of bank, placement and one softmax."""
    group = questions(3, 6)
    shelf = evaluation.shelf(group, kind, "fp32")
    names = [chosen_names(question, "right", 3) for question in group]
    texts = [question.texts[n] for question, own in zip(group, names, strict=True) for n in own]
    rows = torch.arange(len(texts)).view(len(group), 3)
    pairs = [question.asked for question in group]
    with torch.no_grad():
        memory = written(evaluation.model, evaluation.tokenizer, kind, texts, rows)
        logits, expected = answers(evaluation.model, evaluation.tokenizer, pairs, memory)
    ours = (logits.argmax(-1) == expected).all(1).tolist()
    read = [[shelf.refs[n] for n in own] for own in names]
    product = product_logits(evaluation, pairs, read, shelf.bank)
    shelf.bank.close()
    torch.testing.assert_close(logits, product, atol=1e-3, rtol=1e-3)
    assert ours == (product.argmax(-1) == expected).all(1).tolist()


def product_logits(evaluation, pairs, read, bank):
    from benchmarks.recall.chat import ask
    from mem_triton.store.pool.plan import Attachment
    from mem_triton_transformers import read_memory, segments_of

    rows = [segments_of(evaluation.model, bank, [Attachment(ref) for ref in refs]) for refs in read]
    with torch.inference_mode(), read_memory(evaluation.model, rows):
        return ask(evaluation.model, evaluation.tokenizer, pairs)[0]


def test_the_banks_are_memory3s_defaults():
    assert KINDS["sparse"].keep_tokens == 8 and KINDS["sparse"].layer_indices(4) == train_memory.LAYERS
    assert KINDS["sparse"].prefix_text == "<s>" + train_memory.PREFIX


@pytest.mark.parametrize(("kind", "aim"), [("sparse", 0.95), ("dense", 0.99), ("prefix", 0.99)])
@pytest.mark.parametrize("references", [1, 5])
def test_recall_from_explicit_memory_alone(evaluation, recall, kind, aim, references):
    """The aim lies within the interval of 64 questions: at most two wrong answers dense, and six sparse."""
    right = evaluation.cells[f"{kind} / {references}"]
    assert wilson(sum(right), len(right))[1] >= aim


@pytest.mark.parametrize("kind", ["sparse", "dense"])
@pytest.mark.parametrize("codec", ["int8", "fp8"])
def test_codecs_cost_at_most_one_answer(evaluation, recall, kind, codec):
    """ "pq" takes minutes to train and costs about 5 points here (README, limits): not asserted."""
    row = f"{kind}, 3 references"
    assert recall[f"{row} / {codec}"] >= recall[f"{row} / bf16"] - 1.01 / QUESTIONS
    assert summary(evaluation.cells)[f"{row} / {codec}"]["lost"] <= 4


@pytest.mark.parametrize("kind", ["sparse", "dense", "prefix"])
def test_nothing_is_known_from_wrong_references(recall, kind):
    assert recall[f"{kind}, wrong references only / 5"] <= 0.05
    assert recall[f"{kind}, wrong references only / 1"] <= 0.05


def test_nothing_is_known_without_memory(recall):
    assert recall["no memory / 0"] <= 0.05


def test_facts_in_the_prompt_are_still_read(evaluation):
    """What the model could do before it was trained with memory."""
    from benchmarks.recall.evaluate import right_answers as in_chat

    for n, least in ((1, 0.97), (8, 0.97), (16, 0.95)):
        right = in_chat(evaluation.model, evaluation.tokenizer, "in context", n, QUESTIONS, SEED)
        assert right / QUESTIONS >= least


def test_an_answer_counts_only_with_the_right_value(evaluation):
    fact = data.Fact("Mara Stone", "locker", "falcon")
    prompt, _ = asking(fact, 1)
    wrong = right_answers(evaluation.model, evaluation.tokenizer, [(prompt, "It is raven.<|im_end|>")] * 2)
    assert wrong == [False, False]
