"""A tiny model with banks on disk, and what transformers answers with the same memory."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from mem_triton.ops.reposition import rope_from_config
from mem_triton.store.bank import Bank, BankSpec, NewEntry
from mem_triton.store.bank.fingerprint import model_fingerprint
from mem_triton.store.block import MemoryBlock
from mem_triton.store.pool.pages import PageLayout
from mem_triton.store.pool.placement import place
from mem_triton.store.pool.plan import Attachment
from mem_triton.systems.explicit.retrieval import Retriever
from mem_triton.write import WriteConfig
from mem_triton.write.sparsify import dense, sparsify
from mem_triton_transformers.encode import TransformersEncoder
from mem_triton_transformers.explicit import MemorySegment, generate_with_retrieval, read_memory, read_plans
from tests.support.models import save_tiny_model, tiny_model, tiny_tokenizer

TEXTS = {"alpha": 40, "beta": 23, "gamma": 16, "delta": 101}
SECRET = "acme-plan"
REFERENCES = 24
SINK = 3


def tokens_of(seed: int, count: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, 500, (count,), generator=generator).tolist()


def reference(number: int) -> list[int]:
    """The tokens of entry ``ref-<number>``."""
    return tokens_of(200 + number, 32 - number % 5)


@dataclass
class MemoryBench:
    """prefixes: a bank of whole texts. references: a bank of sparse references, with a constant prefix."""

    model: Path
    oracle: torch.nn.Module
    prefixes: Path
    references: Path
    texts: dict[str, list[int]] = field(default_factory=dict)

    def section(self, bank: Path | None = None, **options) -> dict:
        """The configuration's memory section."""
        return {"memory": {"bank": str(bank or self.prefixes), "pool_gib": 0.002, **options}}

    def after(self, prompt: list[int], *ids: str, count: int = 12, write: bool = True) -> list[int]:
        """Greedy continuation of ``prompt`` with entries of the prefix bank attached. One entry is read as what it is:
        text before the prompt. That needs no code of ours."""
        if len(ids) == 1 and ids[0] in self.texts:
            return self.generate(self.texts[ids[0]] + prompt, count)
        with Bank.open(self.prefixes) as bank, read_plans(self.oracle, bank, [[Attachment(f"{i}@1") for i in ids]]):
            return self.generate(prompt, count)

    def through_pages(self, prompt: list[int], id: str, dtype: torch.dtype, count: int = 12) -> list[int]:
        """Greedy continuation with an entry of the prefix bank as pages of another precision hold it."""
        with Bank.open(self.prefixes) as bank:
            block, of = bank.load(f"{id}@1"), bank.spec
        ropes = [rope_from_config(self.oracle.config.to_dict(), layer) for layer in of.layers]
        placed = place(block, ropes, of.kind, of.reference_tokens)
        layout = PageLayout(len(of.layers), of.kv_heads, of.head_dim, 16, dtype)
        held = MemoryBlock(*layout.unpack(layout.pack(placed), placed.tokens), placed.positions)
        with read_memory(self.oracle, [[MemorySegment(held, of.layers)]]):
            return self.generate(prompt, count)

    def with_plan(self, prompt: list[int], plan: list[Attachment], count: int = 12) -> list[int]:
        """Greedy continuation with a plan of the reference bank, by the transformers oracle."""
        with Bank.open(self.references) as bank, read_plans(self.oracle, bank, [plan]):
            return self.generate(prompt, count)

    def retrieving(self, prompt: list[int], count: int, top_k: int, every: int) -> tuple[list[int], list[Attachment]]:
        """Greedy tokens and the whole plan of a request that retrieves, refreshed as it answers."""
        with Bank.open(self.references) as bank:
            retriever = Retriever(bank, decode=tiny_tokenizer().decode, top_k=top_k, every=every)
            return generate_with_retrieval(self.oracle, bank, retriever, prompt, count)

    def generate(self, ids: list[int], count: int = 12) -> list[int]:
        out = self.oracle.generate(torch.tensor([ids]), max_new_tokens=count, do_sample=False)
        return out[0, len(ids) :].tolist()


def spec(model: Path, encoder: TransformersEncoder, config: WriteConfig) -> BankSpec:
    c = encoder.config
    return BankSpec(
        kind=config.kind,
        fingerprint=model_fingerprint(model),
        layers=config.layer_indices(c.num_hidden_layers),
        kv_heads=c.num_key_value_heads,
        head_dim=c.head_dim,
        reference_tokens=config.reference_tokens,
        keep_tokens=config.keep_tokens if config.kind == "memory3" else None,
        codec="fp32",
        dtype="float32",
        prefix_text=config.prefix_text if config.kind == "memory3" else None,
    )


def make_memory_bench(folder: Path, family: str = "qwen3", **size) -> MemoryBench:
    model = tiny_model(family, **size)
    path = save_tiny_model(folder / "model", family, **size)
    bench = MemoryBench(path, model, folder / "prefixes", folder / "references")
    encoder, decode = TransformersEncoder(model), tiny_tokenizer().decode
    bench.texts = {name: tokens_of(100 + i, n) for i, (name, n) in enumerate(TEXTS.items())}
    with Bank.create(bench.prefixes, spec(path, encoder, WriteConfig(kind="prefix"))) as bank:
        encoded = encoder.encode(list(bench.texts.values()))
        bank.add(
            [
                NewEntry(name, decode(bench.texts[name]), dense(text))
                for name, text in zip(bench.texts, encoded, strict=True)
            ]
        )
        bank.add([NewEntry(SECRET, "secret", dense(encoded[0]), tenant="acme"), NewEntry("cold", "no block yet")])
    config = WriteConfig(layers=(0,), keep_tokens=8, reference_tokens=32)
    with Bank.create(bench.references, spec(path, encoder, config)) as bank:
        prefix = tokens_of(7, SINK)
        bank.set_sink(dense(encoder.encode([prefix])[0]))
        layers, scale = bank.spec.layers, bank.spec.head_dim**-0.5
        texts = [reference(i) for i in range(REFERENCES)]
        for i, (ids, text) in enumerate(
            zip(texts, encoder.encode(texts, layers=layers, prefix_ids=prefix), strict=True)
        ):
            bank.add([NewEntry(f"ref-{i}", decode(ids), sparsify(text, 8, scale=scale))])
    return bench


@pytest.fixture(scope="session")
def memory_bench(tmp_path_factory: pytest.TempPathFactory) -> MemoryBench:
    return make_memory_bench(tmp_path_factory.mktemp("memory"))
