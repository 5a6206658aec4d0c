"""MemoryLLM's pools on a model of transformers: texts are written into a pool, and each row of a batch reads its own.

A pool lies before the text as keys and values that its rows give in each layer, once a version; the text's positions
begin at 0. Writing runs the model's own decoder layers (``mem_triton.systems.memoryllm.write``).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from mem_triton.compat import require
from mem_triton.config import ConfigError, parse_config
from mem_triton.store.bank.fingerprint import Fingerprint, model_fingerprint
from mem_triton.store.block import MemoryBlock
from mem_triton.store.pool.placement import place
from mem_triton.systems.memoryllm.convert import load_weights
from mem_triton.systems.memoryllm.long_term import LongTerm
from mem_triton.systems.memoryllm.pools import Pools
from mem_triton.systems.memoryllm.read_adapter import READ, factors_of
from mem_triton.systems.memoryllm.records import PoolError
from mem_triton.systems.memoryllm.retriever import RowRetriever
from mem_triton.systems.memoryllm.section import MemoryLLMSection
from mem_triton.systems.memoryllm.write import WriteWeights, write_pass
from mem_triton_transformers.encode import attention_layers
from mem_triton_transformers.explicit import READING, MemorySegment, model_ropes, read_memory
from mem_triton_transformers.long_term import choosing, project, stock_frequencies, use_frequencies

POOLS = "_mem_triton_pools"
"""Where a model keeps its pools."""


@dataclass
class ModelPools:
    """What one model keeps of a store. placed: keys and values by reference, and the long-term memory behind them, the
    last ones that were read. retriever: of M+.
    """

    path: Path
    reader: Pools
    weights: WriteWeights
    factors: Mapping[str, tuple[Tensor, Tensor]]
    section: MemoryLLMSection
    placed: OrderedDict[str, tuple[MemoryBlock, LongTerm | None]] = field(default_factory=OrderedDict)
    writer: Pools | None = None
    retriever: RowRetriever | None = None


def attach_pools(model: PreTrainedModel, section: Mapping[str, Any]) -> PreTrainedModel:
    """Give ``model`` the pools of a store that ``mem-triton convert memoryllm`` or ``mplus`` has made; returns it.

    section: as ``config`` has it, ``{"pools": "DST/memory", "default": "main", "chunk": 512, "versions": 3}``; ``gib``
    and ``layers_per_step`` mean nothing here. Raises ConfigError for a key or a model that does not fit, ValueError if
    the model has pools already.
    """
    require("transformers")
    chosen: MemoryLLMSection = parse_config({"memoryllm": {} if section is None else section}).memoryllm
    if getattr(model, POOLS, None) is not None:
        raise ValueError("this model has pools already: call remove_mem_triton(model) first")
    try:
        reader = Pools.open(chosen.pools)
        extra = load_weights(reader.path)
    except PoolError as error:
        raise ConfigError(f"mem_triton.memoryllm.pools: {error}") from None
    if reader.about.get(READ) is not None:
        raise ConfigError(
            f"mem_triton.memoryllm.pools: {reader.path} was converted with --unmerged, for engines, which serve the "
            "adapter that reads as LoRA; convert the checkpoint without"
        )
    _check_model(model, reader)
    bos = extra.get("bos_embedding") if reader.shape.bos else None
    kept = ModelPools(
        reader.path,
        reader,
        WriteWeights(None if bos is None else bos.to(model.device), extra["new_memory_positional_emb"].flatten()),
        {n: tuple(x.to(model.device, model.dtype) for x in pair) for n, pair in factors_of(extra, "write").items()},
        chosen,
    )
    if reader.shape.long_term is not None:
        try:
            act = model.config.hidden_act
            kept.retriever = RowRetriever(extra, reader.shape.layers, act, model.device, model.dtype)
        except PoolError as error:
            raise ConfigError(f"mem_triton.memoryllm.pools: {reader.path}: {error}") from None
        use_frequencies(model)
    setattr(model, POOLS, kept)
    return model


def detach_pools(model: PreTrainedModel) -> bool:
    """Take pools off a model; False if it has none."""
    kept: ModelPools | None = getattr(model, POOLS, None)
    if kept is None:
        return False
    if kept.writer is not None:
        kept.writer.close()
    stock_frequencies(model)
    delattr(model, POOLS)
    return True


@torch.inference_mode()
def inject(
    model: PreTrainedModel, ids: Sequence[int] | Tensor, pool: str | None = None, seed: int | None = None
) -> str:
    """Write a text into a pool (MemoryLLM, arXiv 2402.04624, section 3.1.2); the new version's reference, "main@2".

    ids: the text's tokens, without BOS. pool: its name; None for the configured default. seed: draws what is dropped as
    the authors' code does after ``torch.manual_seed(seed)``; None: the pool's own generator. Long texts go in chunks,
    and the new version has all of them or, after an exception, none. Raises PoolError, and ValueError for the text.
    """
    kept, decoder = _pools_of(model), model.get_decoder()
    tokens = [int(token) for token in (ids.flatten().tolist() if isinstance(ids, Tensor) else ids)]
    _check_text(model, tokens)
    if any(READING in attention.__dict__ for attention in attention_layers(decoder)):
        raise ValueError("this model reads memory now: leave read_pool or read_memory before you write")
    if kept.writer is None:
        kept.writer = Pools.open(kept.path, writable=True, wait=10.0, max_pools=kept.section.max_pools)
    shape = kept.reader.shape
    layers = [partial(_run_layer, decoder, layer) for layer in decoder.layers]
    with (
        kept.writer.writing(pool or kept.section.default or "", seed) as writing,
        _writing_adapter(model, kept.factors),
    ):
        for start in range(0, len(tokens), kept.section.chunk):
            part = torch.tensor(tokens[start : start + kept.section.chunk], device=model.device)
            hidden = decoder.get_input_embeddings()(part)
            new = write_pass(hidden, layers, kept.weights, writing.tail, shape.tokens, shape.embedding_first)
            writing.apply(new, len(part), _keys(decoder, kept.retriever, new))
        return writing.commit()


@contextmanager
def read_pool(model: PreTrainedModel, pools: Sequence[str | None]) -> Iterator[list[str | None]]:
    """Within this context row b of a batch reads ``pools[b]``, "name" or "name@version"; None or "" reads none.

    Yields the versions that are read, which stay the same however the pools are written meanwhile. Raises PoolError for
    what is not there. Example::

        with read_pool(model, ["main", None]) as versions:      # ["main@2", None]
            model.generate(**two_rows)
    """
    kept = _pools_of(model)
    versions = ["{}@{}".format(*kept.reader.resolve(name)) if name else None for name in pools]
    everywhere = tuple(range(kept.reader.shape.layers))
    found = [None if version is None else _placed(model, version) for version in versions]
    rows = [[] if each is None else [MemorySegment(each[0], everywhere)] for each in found]
    with ExitStack() as stack:
        reading = stack.enter_context(read_memory(model, rows))
        if kept.retriever is not None:
            long = [None if each is None else each[1] for each in found]
            stack.enter_context(choosing(model, kept.reader.shape, kept.retriever, long, reading))
        yield versions


def _keys(decoder: nn.Module, retriever: RowRetriever | None, new: Tensor) -> Tensor | None:
    """The retriever's keys [L, n, K] of new rows [L, n, d]; None for MemoryLLM."""
    if retriever is None:
        return None
    layers = zip(decoder.layers, new, strict=True)
    return torch.stack([retriever.keys(i, layer.input_layernorm(rows)) for i, (layer, rows) in enumerate(layers)])


def _pools_of(model: PreTrainedModel) -> ModelPools:
    kept = getattr(model, POOLS, None)
    if kept is None:
        raise ValueError('this model has no pools: call apply_mem_triton(model, {"memoryllm": {...}}) first')
    return kept


def _check_model(model: PreTrainedModel, pools: Pools) -> None:
    made = Fingerprint(**pools.about["model"])
    config, shape = model.config, pools.shape
    here = {
        "num_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "query_heads": config.num_attention_heads,
        "kv_heads": config.num_key_value_heads,
    }
    differences = [
        f"{name}: the pools have {getattr(made, name)}, the model {value}"
        for name, value in here.items()
        if getattr(made, name) != value
    ]
    folder = Path(str(model.name_or_path))
    if not differences and (folder / "config.json").exists():
        differences = made.differences(model_fingerprint(folder))
    if differences or shape.layers != made.num_layers:
        raise ConfigError(f"mem_triton.memoryllm.pools: made for another model ({'; '.join(differences)})")


def _check_text(model: PreTrainedModel, tokens: list[int]) -> None:
    bos, vocabulary = model.config.bos_token_id, model.config.vocab_size
    if not tokens:
        raise ValueError("ids: a text has at least one token")
    if bos is not None and tokens[0] == bos:
        raise ValueError(
            f"ids: the text begins with BOS ({bos}), and the pool has a learned one; leave it out, as the converter's "
            "tokenizer does"
        )
    if wrong := [token for token in tokens if not 0 <= token < vocabulary]:
        raise ValueError(f"ids: {wrong[0]} is no token of the model's {vocabulary}")


def _run_layer(decoder: nn.Module, layer: nn.Module, given: Tensor) -> Tensor:
    """One decoder layer, causal at positions 0...T-1. given: [T, d]."""
    hidden, count = given[None], len(given)
    positions = torch.arange(count, device=given.device)[None]
    mask = torch.full((count, count), torch.finfo(given.dtype).min, dtype=given.dtype, device=given.device).triu(1)
    output = layer(
        hidden,
        attention_mask=mask[None, None],
        position_ids=positions,
        use_cache=False,
        position_embeddings=decoder.rotary_emb(hidden, positions),
    )
    return (output[0] if isinstance(output, tuple) else output)[0]


@contextmanager
def _writing_adapter(model: PreTrainedModel, factors: Mapping[str, tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Within this context linears compute with the weights that write."""
    handles = []

    def add(parts: tuple[Tensor, Tensor], module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        down, up = parts
        return output + F.linear(F.linear(args[0], down), up)

    try:
        for name, parts in factors.items():
            handles.append(model.get_submodule(name).register_forward_hook(partial(add, parts)))
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.inference_mode()
def _placed(model: PreTrainedModel, version: str) -> tuple[MemoryBlock, LongTerm | None]:
    """A version's keys and values where they are read, by norm and projection with the weights that read."""
    kept = _pools_of(model)
    key = f"{kept.reader.info(version.partition('@')[0]).identity}@{version}"  # a pool may be made again
    if key in kept.placed:
        kept.placed.move_to_end(key)
        return kept.placed[key]
    state, keys, values = kept.reader.state(version), [], []
    for index, layer in enumerate(model.get_decoder().layers):
        rows = state.rows[index]
        parts = [rows] if kept.weights.bos is None else [kept.weights.bos[index].to(rows.device), rows]
        for found, part in zip(
            (keys, values),
            project(layer, torch.cat([part.to(model.device, model.dtype) for part in parts])),
            strict=True,
        ):
            found.append(part)
    where = torch.arange(keys[0].shape[1], dtype=torch.int32)
    if state.long_term is not None and kept.weights.bos is not None:
        where[0] -= kept.reader.shape.long_term.read  # the long-term rows stand between the first row and the pool
    block = MemoryBlock(torch.stack(keys), torch.stack(values), where.expand(len(keys), len(keys[0]), -1))
    block = place(block, model_ropes(model, range(len(keys))), "prefix", 0)
    kept.placed[key] = block, state.long_term
    while len(kept.placed) > kept.section.versions:
        kept.placed.popitem(last=False)
    return kept.placed[key]
