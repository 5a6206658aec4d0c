"""Checkpoints of M+ (arXiv 2502.00592), as the authors' code saves them: what they have beside MemoryLLM's.

Of each layer there are ``ltm.0`` [n, d], ``ltm_keys.0`` [n, K], ``ltm_ages.0`` and ``ltm_recall_frequencies.0`` [n],
and the retriever's projections lie in its attention. Rows that were dropped and have not joined the long-term ones yet,
and the ages of the pool's rows, are not in a checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from mem_triton.ops.reposition import UnsupportedRopeError, rope_from_config
from mem_triton.systems.memoryllm.checkpoint import Checkpoint
from mem_triton.systems.memoryllm.long_term import LongTerm, LongTermRows
from mem_triton.systems.memoryllm.records import PoolError
from mem_triton.systems.memoryllm.retriever import ACTIVATIONS, RowRetriever, matrix_name
from mem_triton.systems.memoryllm.shape import LongTermShape, PoolShape

LISTS = ("ltm", "ltm_keys", "ltm_recall_frequencies", "ltm_ages")
KINDS = ("query", "key", "encoder_query")
"""The retriever's projections; the last one, for writing, is run by nobody, and kept for the way back."""
MPLUS_KEYS = (
    "num_ltm_blocks",
    "update_ltm_mode",
    "initial_rf_when_moving_stm_to_ltm",
    "decay_frequency",
    "update_ltm_frequency",
    "ltm_initial_size",
    "selector_hidden_dim",
    "num_selector_layers",
    "add_selector",
    "selector_layers",
    "add_encoder_retriever",
    "detach_hidden_state",
)
"""Keys of the configuration that MemoryLLM has not."""
AT_ONCE = 4096
"""Rows of which keys are computed together."""


class MPlusCheckpoint(Checkpoint):
    """As ``Checkpoint``. Raises PoolError naming the file, the key or the tensor that is missing or does not fit."""

    def retriever(self) -> dict[str, Tensor]:
        """The retriever's matrices, fp32, by their names beside a store's pools."""
        return {
            matrix_name(layer, kind, index): self.tensor(name).float()
            for layer in range(self.shape.layers)
            for kind in self._kinds()
            for index, name in enumerate(self._projection(layer, kind))
        }

    def long_term(self, memory: Tensor) -> LongTerm:
        """The long-term memory behind a pool [L, N, d], whose rows have age 0. Raises PoolError for NaN."""
        shape, dtype = self.shape, self.shape.torch_dtype
        retriever = RowRetriever(self.retriever(), shape.layers, self.config["hidden_act"], "cpu", torch.float32)
        merged, keys = [], []
        for layer in range(shape.layers):
            rows, own, often, ages = (self.tensor(f"{part}.{layer}") for part in LISTS)
            for name, x in zip(LISTS, (rows, own, often, ages), strict=True):
                if not bool(x.isfinite().all()):
                    raise PoolError(f"{self.folder}: {name}.{layer} holds NaN or infinity; take another checkpoint")
            stamps, often = ages.float().to(torch.int64), often.float().double()
            merged.append((LongTermRows((rows.to(dtype),), own.to(dtype), stamps, often),))
            weight = self.tensor(f"model.layers.{layer}.input_layernorm.weight").float()
            eps = float(self.config["rms_norm_eps"])
            parts = memory[layer].float().split(AT_ONCE)
            normed = (F.rms_norm(part, weight.shape, weight, eps) for part in parts)
            keys.append(torch.cat([retriever.keys(layer, part) for part in normed]).to(dtype))
        ages = torch.zeros(shape.layers, shape.rows, dtype=torch.int64)
        return LongTerm(0, ages, torch.stack(keys), tuple(merged), tuple(() for _ in merged))

    def frequencies(self) -> list[float]:
        """Those of RoPE that the authors run it with, rounded to bfloat16. Raises PoolError for unknown RoPE."""
        try:
            exact = rope_from_config({"model_type": "llama", **self.config}, 0).inv_freq
        except UnsupportedRopeError as error:
            raise PoolError(f"{self.folder}/config.json: {error}") from None
        return torch.tensor(exact, dtype=torch.float32).bfloat16().double().tolist()

    def _is_memory(self, name: str) -> bool:
        head, _, rest = name.partition(".")
        own = (head in LISTS and rest.isdigit()) or any(f".self_attn.{kind}_proj." in name for kind in KINDS)
        return own or super()._is_memory(name)

    def _shape(self, dtype: str) -> PoolShape:
        config, where = self.config, f"{self.folder}/config.json"
        if not config.get("num_ltm_blocks"):
            raise PoolError(f"{where}: num_ltm_blocks is missing: this is no M+; use `mem-triton convert memoryllm`")
        tokens, blocks, long = (self._need(key) for key in ("num_tokens", "num_blocks", "num_ltm_blocks"))
        if long >= blocks:
            raise PoolError(f"{where}: num_ltm_blocks is {long}, of num_blocks {blocks}, which leaves no pool")
        if config.get("update_ltm_mode") != "immediate":
            raise PoolError(
                f"{where}: update_ltm_mode is {config.get('update_ltm_mode')!r}; the authors' code runs with "
                '"immediate" alone'
            )
        if config.get("hidden_act") not in ACTIVATIONS:
            raise PoolError(f"{where}: hidden_act is {config.get('hidden_act')!r}, expected {', '.join(ACTIVATIONS)}")
        if config.get("num_selector_layers") not in (1, 2):
            raise PoolError(f"{where}: num_selector_layers is {config.get('num_selector_layers')!r}, expected 1 or 2")
        first, decay = (self._number(key) for key in ("initial_rf_when_moving_stm_to_ltm", "decay_frequency"))
        merge, keys = self._need("update_ltm_frequency") * tokens, self._need("selector_hidden_dim")
        self._need("ltm_initial_size")
        return PoolShape(
            layers=self._need("num_hidden_layers"),
            rows=tokens * (blocks - long),
            hidden=self._need("hidden_size"),
            tokens=tokens,
            dtype=dtype,
            per_layer=True,
            bos=bool(config.get("add_bos_embedding")),
            long_term=LongTermShape(long * tokens, merge, first, decay, keys),
        )

    def _number(self, key: str) -> float:
        value = self.config.get(key)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < float("inf"):
            raise PoolError(f"{self.folder}/config.json: {key} is {value!r}, expected a number above 0; fetch it again")
        return float(value)

    def _wanted(self) -> dict[str, tuple[int, ...]]:
        shape, count = self.shape, self._need("ltm_initial_size")
        width, wanted = shape.long_term.keys, super()._wanted()
        for layer in range(shape.layers):
            for part, tail in zip(LISTS, ((shape.hidden,), (width,), (), ()), strict=True):
                wanted[f"{part}.{layer}"] = (count, *tail)
            for kind in self._kinds():
                names = self._projection(layer, kind)
                sizes = [shape.hidden, *([2 * width] if len(names) > 1 else []), width]
                wanted |= {name: (sizes[i + 1], sizes[i]) for i, name in enumerate(names)}
        return wanted

    def _kinds(self) -> tuple[str, ...]:
        return KINDS if self.config.get("add_encoder_retriever") else KINDS[:2]

    def _projection(self, layer: int, kind: str) -> list[str]:
        """The names of a projection's matrices."""
        stem = f"model.layers.{layer}.self_attn.{kind}_proj"
        return (
            [f"{stem}.0.weight", f"{stem}.2.weight"] if self.config["num_selector_layers"] == 2 else [f"{stem}.weight"]
        )


def tensors_back(long: LongTerm, extra: Mapping[str, Tensor], config: dict, dtype: torch.dtype) -> dict[str, Tensor]:
    """What a checkpoint of M+ has beside MemoryLLM's, of a pool's long-term memory; sets ``ltm_initial_size``.

    Rows that were dropped since the last merge become long-term ones, as a checkpoint has no place for them.
    Raises PoolError if layers have different numbers of rows, which the authors' code does not load.
    """
    found: dict[str, Tensor] = {}
    sizes = {sum(long.count(layer)) for layer in range(len(long.merged))}
    if len(sizes) > 1:
        raise PoolError(
            f"layers have from {min(sizes)} to {max(sizes)} long-term rows, and the authors' code loads layers of one "
            "number; choose another version of the pool"
        )
    for layer in range(len(long.merged)):
        parts = [replace(part, stamps=part.stamps + long.clock) for part in long.rows(layer)]
        found |= {
            f"ltm.{layer}": torch.cat([part.content[0] for part in parts]).to(dtype),
            f"ltm_keys.{layer}": torch.cat([part.keys for part in parts]).to(dtype),
            f"ltm_recall_frequencies.{layer}": torch.cat([part.frequencies for part in parts]).float(),
            f"ltm_ages.{layer}": torch.cat([part.stamps for part in parts]).float(),
        }
        for kind in KINDS:
            names = [matrix_name(layer, kind, index) for index in range(2)]
            both = names[1] in extra
            for name, suffix in zip(names, ("0.weight" if both else "weight", "2.weight"), strict=True):
                if name in extra:
                    found[f"model.layers.{layer}.self_attn.{kind}_proj.{suffix}"] = extra[name].to(dtype)
    config["ltm_initial_size"] = sizes.pop()
    return found
