"""Random models with the shapes of real ones, made on the spot, and what memory needs beside them.

No weights have to be downloaded: speed does not depend on their values. Their scale matters to the correctness gate:
every projection keeps the variance of what goes in, so that outputs vary from token to token and memory changes them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.common.random_adapter import random_adapter
from mem_triton.store.bank import Bank
from mem_triton.store.bank.fingerprint import model_fingerprint
from mem_triton.systems.delta_mem import save_adapter
from mem_triton.systems.memoryllm.pools import WEIGHTS, Pools
from mem_triton.systems.memoryllm.records import digest_of
from mem_triton.systems.memoryllm.shape import PoolShape
from mem_triton.write import Document, WriteConfig, Writer, bank_spec
from mem_triton_transformers import TransformersEncoder

SPECIAL = ("<|endoftext|>", "<|im_end|>", "<|pad|>", "<|unk|>")
REFERENCES, REFERENCE_TOKENS, KEEP = 5, 128, 8
"""What a request reads of explicit memory: Memory³'s defaults (arXiv 2407.01178)."""
NEW_ROWS = 256
"""Rows that a write into a pool makes (MemoryLLM, arXiv 2402.04624)."""


def _shape(
    kind: str,
    hidden: int,
    layers: int,
    heads: int,
    kv_heads: int,
    size: int,
    mlp: int,
    vocab: int,
    theta: float,
    tied: bool = False,
) -> dict[str, Any]:
    return {
        "model_type": kind,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": size,
        "intermediate_size": mlp,
        "vocab_size": vocab,
        "rope_theta": theta,
        "tie_word_embeddings": tied,
        "max_position_embeddings": 40960,
    }


SHAPES = {
    "qwen3-4b": _shape("qwen3", 2560, 36, 32, 8, 128, 9728, 151936, 1e6, tied=True),
    "qwen3-8b": _shape("qwen3", 4096, 36, 32, 8, 128, 12288, 151936, 1e6),
    "llama3-8b": _shape("llama", 4096, 32, 32, 8, 128, 14336, 128256, 5e5),
    "qwen3-100m": _shape("qwen3", 768, 12, 12, 4, 64, 2048, 32000, 1e6),
    "llama-100m": _shape("llama", 768, 12, 12, 4, 64, 2048, 32000, 5e5),
    "llama-pool": _shape("llama", 512, 4, 8, 2, 64, 1536, 12000, 5e5),  # most of its work is to read a pool
    "qwen3-tiny": _shape("qwen3", 128, 2, 4, 2, 64, 256, 12000, 1e6),  # for tests: vLLM's tools want 10,000 words
    "llama-tiny": _shape("llama", 128, 2, 4, 2, 64, 256, 12000, 5e5),
}
"""Names that ``--model`` knows besides folders and Hugging Face ids."""


@dataclass(frozen=True)
class MadeBank:
    """A bank on disk. refs: the entries that requests read. tokens: of the text that they stand for."""

    path: Path
    refs: tuple[str, ...]
    tokens: int


@dataclass(frozen=True)
class Made:
    """A model in a folder. dtype: in which it is served. model: the same in transformers, which encodes banks and then,
    in fp32, is the gate's oracle.
    """

    name: str
    folder: Path
    dtype: torch.dtype
    model: torch.nn.Module

    def make_oracle(self) -> None:
        """Nothing is encoded any more: off the GPU, which the engines need, and to fp32."""
        self.model.to("cpu").float()

    @property
    def facts(self) -> dict[str, Any]:
        """What a result file says of it."""
        c = self.model.config
        names = (
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "vocab_size",
        )
        parameters = sum(p.numel() for p in self.model.parameters())
        return {"name": self.name, "parameters": parameters, **{n: getattr(c, n, None) for n in names}}


def make_model(name: str, folder: Path, dtype: torch.dtype, seed: int = 0) -> Made:
    """The model that ``name`` means: one of SHAPES, made under ``folder``; a folder; or a Hugging Face id."""
    import transformers

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if name not in SHAPES:
        from mem_triton.cli.settings import folder_of

        path = folder_of(name)
        loaded = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(device).eval()
        return Made(name, path, dtype, loaded)
    shape = dict(SHAPES[name])
    config = transformers.AutoConfig.for_model(
        shape.pop("model_type"),
        **shape,
        initializer_range=shape["hidden_size"] ** -0.5,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        attention_bias=False,
    )
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())), torch.device(device):
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        for key, parameter in model.named_parameters():
            if "norm" in key:  # not all ones, so that a norm at the wrong place shows
                parameter.data.uniform_(0.7, 1.3)
    path = folder / name
    model.save_pretrained(path)
    tokenizer(shape["vocab_size"]).save_pretrained(path)
    return Made(name, path, dtype, model)


def tokenizer(vocab: int) -> Any:
    """One word a token, "w7" is token 7: any list of tokens survives decoding and encoding."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    ids = {word: i for i, word in enumerate(SPECIAL)} | {f"w{i}": i for i in range(len(SPECIAL), vocab)}
    words = Tokenizer(models.WordLevel(vocab=ids, unk_token=SPECIAL[3]))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        eos_token=SPECIAL[1],
        pad_token=SPECIAL[2],
        unk_token=SPECIAL[3],
        clean_up_tokenization_spaces=False,
    )


def random_ids(count: int, vocab: int, seed: int) -> list[int]:
    """Tokens that are no special ones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(len(SPECIAL), min(vocab, 10000), (count,), generator=generator).tolist()


def make_adapter(made: Made, folder: Path) -> Path:
    """A random δ-mem adapter of rank 8 that corrects q and o, as the published ones do."""
    return save_adapter(random_adapter(made.model, strength=0.05, delta_heads=("q", "o")), folder / "adapter")


def make_references(made: Made, folder: Path) -> MadeBank:
    """REFERENCES references: KEEP of REFERENCE_TOKENS tokens a KV head, in half of the layers."""
    texts = [random_ids(REFERENCE_TOKENS, made.model.config.vocab_size, 100 + i) for i in range(REFERENCES)]
    return _write(made, folder / "references", _memory3(range(len(SPECIAL), 8)), texts)


def make_pool(made: Made, folder: Path, tokens: int, shared: bool) -> MadeBank:
    """A pool of ``tokens``: as one segment that all requests share, or as a prefix that each reads for itself.

    As a shared segment it is the constant prefix of a bank with one small reference: an engine shows a constant prefix
    to the requests that read an entry, to all of them the same tensors.
    """
    ids, vocab = random_ids(tokens, made.model.config.vocab_size, 99), made.model.config.vocab_size
    if not shared:
        return _write(made, folder / "pool-per-request", WriteConfig(kind="prefix"), [ids])
    bank = _write(made, folder / "pool-shared", _memory3(ids), [random_ids(KEEP, vocab, 98)])
    return MadeBank(bank.path, bank.refs, tokens)


def make_store(made: Made, folder: Path, rows: int, new_rows: int = NEW_ROWS) -> Path:
    """A store of pools of MemoryLLM with one, "main@1", of ``rows`` random rows; a write makes ``new_rows``."""
    config, path = made.model.config, folder / "pools"
    layers, hidden = config.num_hidden_layers, config.hidden_size
    chance = torch.Generator().manual_seed(5)
    extra = {
        "bos_embedding": torch.randn(layers, 1, hidden, generator=chance),
        "new_memory_positional_emb": 0.3 * torch.randn(1, 1, hidden, generator=chance),
    }
    shape = PoolShape(layers, rows, hidden, new_rows, str(made.dtype).removeprefix("torch."))
    with Pools.create(path, shape, {"model": model_fingerprint(made.folder).model_dump()}) as pools:
        save_file(extra, path / WEIGHTS, {"digest": digest_of(extra, WEIGHTS)})
        pools.add("main", torch.randn(layers, rows, hidden, generator=chance).to(made.dtype))
    return path


def _memory3(prefix: Iterable[int]) -> WriteConfig:
    return WriteConfig(keep_tokens=KEEP, reference_tokens=REFERENCE_TOKENS, prefix_text=_words(prefix))


def _words(ids: Iterable[int]) -> str:
    return " ".join(f"w{i}" for i in ids)


def _write(made: Made, path: Path, config: WriteConfig, texts: list[list[int]]) -> MadeBank:
    """Through the write path that users have, at the model's own precision."""
    from transformers import AutoTokenizer

    words = AutoTokenizer.from_pretrained(made.folder)
    codec = {torch.float32: "fp32", torch.float16: "fp16"}.get(made.dtype, "bf16")
    with Bank.create(path, bank_spec(config, model_fingerprint(made.folder), codec=codec)) as bank:
        documents = [Document(words.decode(ids), name=f"text-{i}") for i, ids in enumerate(texts)]
        added = Writer(bank, TransformersEncoder(made.model), words, config).write(documents).added
    if len(added) != len(texts):
        raise RuntimeError(f"{path}: {len(added)} entries of {len(texts)} texts; does the tokenizer keep them apart?")
    return MadeBank(path, tuple(added), sum(map(len, texts)))
