"""Questions about references, and banks of those references, written and read as the product does it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from benchmarks.recall import data
from benchmarks.recall.chat import ask, asking, in_context
from benchmarks.recall.explicit_data import LENGTHS, library, telling_texts
from mem_triton.ops.block_codec import get_codec
from mem_triton.store.bank import Bank
from mem_triton.store.bank.fingerprint import model_fingerprint
from mem_triton.store.pool.plan import Attachment
from mem_triton.write import Document, WriteConfig, Writer, bank_spec, dense, prefix_ids
from mem_triton_transformers import TransformersEncoder, read_memory, segments_of

KINDS = {
    "sparse": WriteConfig(),
    "dense": WriteConfig(keep_tokens=None),
    "prefix": WriteConfig(kind="prefix"),
}
"""Memory³ with its defaults (8 of 128 tokens per KV head, first half of the layers), the same with all tokens, and
the whole KV of all layers."""
MOST = 5
BATCH = 32


@dataclass(frozen=True)
class Question:
    """fact: what is asked for, in words that ``seed`` chooses. texts: references by name; the first tells the fact, the
    others do not."""

    fact: data.Fact
    seed: float
    texts: dict[str, str]

    @property
    def asked(self) -> tuple[str, str]:
        """Prompt and right answer."""
        return asking(self.fact, self.seed)


def questions(
    seed: int, count: int, facts: tuple[int, int] = (1, 4), shared: float = 1 / 3, references: int = MOST + 1
) -> list[Question]:
    """``count`` questions about held-out names, each with references of its own, among them MOST that are wrong."""
    rng, made = random.Random(f"explicit {seed} {facts} {shared}"), []
    for i in range(count):
        told, texts = library(rng, references, facts, shared=shared)
        named = {f"{seed}.{i}.{r}": text for r, text in enumerate(texts)}
        made.append(Question(rng.choice(told[0]), rng.random(), named))
    return made


def one_library(seed: int, count: int, references: int) -> tuple[list[Question], dict[str, str]]:
    """``count`` questions about one library of so many references, for retrieval; ``texts`` has the right one alone."""
    rng = random.Random(f"library {seed}")
    told, texts = library(rng, references, (1, 4))
    named = {f"{seed}.{r}": text for r, text in enumerate(texts)}
    made = []
    for _ in range(count):
        r = rng.randrange(references)
        made.append(Question(rng.choice(told[r]), rng.random(), {f"{seed}.{r}": texts[r]}))
    return made, named


@dataclass
class Shelf:
    """A bank and the references of its texts by name."""

    bank: Bank
    refs: dict[str, str]


PQ = {"pq": None, "pq, 11 bytes": "Residual2x10,PQ8x8", "pq, 19 bytes": "Residual2x10,PQ16x8"}
"""Product quantisers by their column: faiss's description, None for the paper's class, of 6 bytes a vector here."""


class Librarian:
    """Writes banks with one model. vectors: how many the codec "pq" is trained on, keys and values each."""

    def __init__(
        self, folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, vectors: int = 20_000
    ) -> None:
        self.encoder, self.tokenizer = TransformersEncoder(model, tokenizer), tokenizer
        self.fingerprint = model_fingerprint(folder)
        self.vectors = vectors
        self.trained: dict[tuple[tuple[int, ...], str], bytes] = {}

    def write(self, path: Path, kind: str, codec: str, texts: dict[str, str]) -> Shelf:
        """A bank of the texts. A codec of ``PQ`` is trained on texts about other people."""
        config = KINDS[kind]
        spec = bank_spec(config, self.fingerprint, codec="pq" if codec in PQ else codec)
        bank = Bank.create(path, spec, self._state(kind, codec))
        documents = (Document(text, name=name) for name, text in texts.items())
        added = Writer(bank, self.encoder, self.tokenizer, config, batch_size=BATCH).write(documents).added
        refs = {ref.partition("@")[0].partition(":")[0]: ref for ref in added}
        if refs.keys() != texts.keys():
            raise ValueError(f"{len(texts)} texts gave {len(added)} entries: a text was cut or is there twice")
        return Shelf(bank, refs)

    def _state(self, kind: str, codec: str) -> bytes | None:
        """The trained state of a codec of ``PQ``, one for all banks of the same layers; None for the other codecs."""
        if codec not in PQ:
            return None
        config, rng, texts = KINDS[kind], random.Random(0), []
        layers = config.layer_indices(self.fingerprint.num_layers)
        if (layers, codec) not in self.trained:
            while len(texts) * LENGTHS[0] * len(layers) * self.fingerprint.kv_heads < self.vectors:
                texts += library(rng, 20, (1, 4), data.TRAINED)[1]
            encoded = self.encoder.encode(
                self.tokenizer(texts)["input_ids"],
                layers=layers,
                prefix_ids=prefix_ids(self.tokenizer, config.prefix_text),
                batch_size=BATCH,
            )
            product = get_codec("pq")
            product.train([dense(text) for text in encoded], PQ[codec])
            self.trained[layers, codec] = product.state()
        return self.trained[layers, codec]


@torch.inference_mode()
def right_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    asked: Sequence[tuple[str, str]],
    read: Sequence[Sequence[str]] | None = None,
    bank: Bank | None = None,
) -> list[bool]:
    """Whether greedy decoding gives exactly each right answer. read: the entries that each request attends to."""
    right: list[bool] = []
    for start in range(0, len(asked), BATCH):
        part = asked[start : start + BATCH]
        if read is None or bank is None:
            logits, answers = ask(model, tokenizer, list(part))
        else:
            plans = [[Attachment(ref) for ref in refs] for refs in read[start : start + BATCH]]
            with read_memory(model, [segments_of(model, bank, plan) for plan in plans]):
                logits, answers = ask(model, tokenizer, list(part))
        right += (logits.argmax(-1) == answers).all(1).tolist()
    return right


def chosen_names(question: Question, where: str, count: int) -> list[str]:
    """Names of the references that a request reads: with the right one among them, or only wrong ones."""
    names = list(question.texts)
    if where == "wrong":
        return names[1 : 1 + count]
    rng = random.Random(names[0])
    return rng.sample(names[:count], count)  # the right one at any place


def with_text(question: Question, count: int) -> tuple[str, str]:
    """The question behind its references as text: what RAG would ask."""
    return in_context(
        telling_texts([question.texts[name] for name in chosen_names(question, "right", count)]), question.asked
    )
