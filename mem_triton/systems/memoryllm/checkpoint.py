"""Checkpoints of the authors' code (github.com/wangyu-ustc/MemoryLLM): their configuration, and their tensors by name.

Beside a Llama's tensors there are ``memory`` [L, N, d], ``bos_embedding`` [L, 1, d], ``new_memory_positional_emb``
[1, 1, d] and ``initialized``. Adapters of peft lie in the linears: ``default`` writes, and ``decoder_adapter``, if
there is one, reads.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mem_triton.store.files import SINGLE, indexed_files, read_object
from mem_triton.systems.memoryllm.records import PoolError
from mem_triton.systems.memoryllm.shape import PoolShape

MEMORY = ("memory", "bos_embedding", "new_memory_positional_emb", "initialized")
OWN_KEYS = (
    "num_blocks",
    "num_tokens",
    "num_memory_tokens",
    "add_bos_embedding",
    "add_decoder_lora",
    "drop_memory_per_layer",
    "lora_config",
    "auto_map",
)
"""Keys of the configuration that no Llama has."""
PEFT = "base_model.model."
JOINED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Linears that engines join. SGLang serves no LoRA adapter that has one of them without the others."""
AGAIN = "fetch the checkpoint again"


Factors = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class LinearAdapters:
    """A linear's adapters as (down, up), fp32, the scale in ``up``. write: None if the one that reads writes, too."""

    read: Factors
    write: Factors | None

    @property
    def beside_merged(self) -> Factors | None:
        """What writing adds to a weight that the reading adapter is merged into; None for nothing."""
        if self.write is None:
            return None
        (down, up), (read_down, read_up) = self.write, self.read
        return torch.cat([down, read_down]), torch.cat([up, -read_up], 1)


class Checkpoint:
    """A folder as the authors' code saves it, sharded or not. Tensors are read one by one.

    config: ``config.json``. shape: of its pool, for rows of ``dtype``. files: the file of each tensor.
    Raises PoolError naming the file, the key or the tensor that is missing or of another shape.
    """

    def __init__(self, folder: Path, dtype: str) -> None:
        self.folder = folder
        self.config = read_object(folder / "config.json", "give a folder as the authors' code saves it", PoolError)
        self.files = _files(folder)
        self.names = {name.replace(PEFT, "", 1): name for name in self.files}
        self.lora = self._lora()
        self.shape = self._shape(dtype)
        self._check()

    @property
    def initialized(self) -> bool:
        """Whether its pool has rows that were written."""
        return "initialized" not in self.names or bool(self.tensor("initialized"))

    def tensor(self, name: str) -> Tensor:
        """A tensor by its name without peft's prefix. Raises PoolError if it cannot be read."""
        try:
            with safe_open(self.folder / self.files[self.names[name]], framework="pt") as file:
                return file.get_tensor(self.names[name])
        except (OSError, SafetensorError, LookupError) as error:
            raise PoolError(f"{self.folder}: {name}: {error}; {AGAIN}") from None

    def dtype_of(self, name: str) -> torch.dtype:
        """Of a tensor as it is stored."""
        return self.tensor(name).dtype

    def model_tensors(self) -> Iterator[tuple[str, str]]:
        """(name in a Llama, name here) of each tensor of the model, adapters left out."""
        for name in self.names:
            if not self._is_memory(name) and ".lora_" not in name:
                yield name.replace(".base_layer", ""), name

    def adapter(self, name: str) -> LinearAdapters | None:
        """What adapters add to a linear's weight, by its name in a Llama; None if it has none."""
        stem = name.removesuffix(".weight")
        if f"{stem}.lora_A.default.weight" not in self.names:
            return None
        scale = float(self.lora["lora_alpha"]) / float(self.lora["r"])

        def factors(adapter: str) -> Factors:
            a, b = (self.tensor(f"{stem}.lora_{x}.{adapter}.weight").float() for x in "AB")
            return a, b * scale

        if not self.config.get("add_decoder_lora"):
            return LinearAdapters(factors("default"), None)
        return LinearAdapters(factors("decoder_adapter"), factors("default"))

    def adapter_beside(self, name: str) -> LinearAdapters | None:
        """Those of a linear that engines join with this one, which has none; None if no such linear has any."""
        stem, _, last = name.removesuffix(".weight").rpartition(".")
        others = next((group for group in JOINED if last in group), ())
        return next(filter(None, (self.adapter(f"{stem}.{other}.weight") for other in others)), None)

    def _is_memory(self, name: str) -> bool:
        """Whether a tensor is no part of the Llama."""
        return name in MEMORY

    def _need(self, key: str) -> int:
        """A size of the configuration. Raises PoolError."""
        value = self.config.get(key)
        if type(value) is not int or value < 1:
            raise PoolError(
                f"{self.folder}/config.json: {key} is {value!r}, expected a whole number above 0; fetch it again"
            )
        return value

    def _shape(self, dtype: str) -> PoolShape:
        tokens, blocks = self._need("num_tokens"), self._need("num_blocks")
        if self.config.get("num_ltm_blocks"):
            raise PoolError(
                f"{self.folder}/config.json: num_ltm_blocks: this is M+; use `mem-triton convert mplus`, not memoryllm"
            )
        return PoolShape(
            layers=self._need("num_hidden_layers"),
            rows=tokens * blocks,
            hidden=self._need("hidden_size"),
            tokens=tokens,
            dtype=dtype,
            per_layer=bool(self.config.get("drop_memory_per_layer")),
            bos=bool(self.config.get("add_bos_embedding")),
            embedding_first="num_memory_tokens" in self.config,
        )

    def _check(self) -> None:
        rope, said = self.config.get("rope_scaling"), self.config.get("num_memory_tokens")
        whole = self._need("num_blocks") * self._need("num_tokens")
        if said not in (None, whole):
            raise PoolError(
                f"{self.folder}/config.json: num_memory_tokens is {said}, num_blocks * num_tokens {whole}; "
                "repair the one that is wrong"
            )
        if rope is not None and not isinstance(rope, Mapping):
            raise PoolError(f"{self.folder}/config.json: rope_scaling is {rope!r}, expected an object")
        for name, expected in self._wanted().items():
            if name not in self.names:
                raise PoolError(f"{self.folder}: has no tensor {name}; {AGAIN}")
            if (found := self._shape_of(name)) != tuple(expected):
                raise PoolError(
                    f"{self.folder}: {name} is {list(found)}, config.json says {list(expected)}; fetch both again"
                )
        adapters = ("default", "decoder_adapter") if self.config.get("add_decoder_lora") else ("default",)
        for stem, name in {name.partition(".lora_A.")[0]: name for name in self.names if ".lora_A." in name}.items():
            wanted_names = [f"{stem}.lora_{x}.{adapter}.weight" for x in "AB" for adapter in adapters]
            for other in [*wanted_names, f"{stem}.base_layer.weight"]:
                if other not in self.names:
                    raise PoolError(f"{self.folder}: has no tensor {other}; {AGAIN}")
            if not self.lora:
                raise PoolError(f"{self.folder}/config.json: lora_config is missing, and {name} is there")
            linear = self._shape_of(f"{stem}.base_layer.weight")
            for adapter in adapters:
                down, up = (self._shape_of(f"{stem}.lora_{x}.{adapter}.weight") for x in "AB")
                if len(down) != 2 or len(up) != 2 or down[0] != up[1] or (up[0], down[1]) != linear:
                    raise PoolError(
                        f"{self.folder}: {stem}: lora_A.{adapter} is {list(down)}, lora_B.{adapter} {list(up)}, the "
                        f"linear {list(linear)}, which does not fit; {AGAIN}"
                    )

    def _shape_of(self, name: str) -> tuple[int, ...]:
        try:
            with safe_open(self.folder / self.files[self.names[name]], framework="pt") as file:
                return tuple(file.get_slice(self.names[name]).get_shape())
        except (OSError, SafetensorError) as error:
            raise PoolError(f"{self.folder}: {name}: {error}; {AGAIN}") from None

    def _lora(self) -> Mapping[str, Any]:
        """What the adapters were made with, empty for none. Raises PoolError."""
        said = self.config.get("lora_config") or {}
        numbers = [said.get(key) for key in ("r", "lora_alpha")] if isinstance(said, Mapping) else [None]
        if said and not all(type(n) in (int, float) and 0 < n < float("inf") for n in numbers):
            raise PoolError(
                f"{self.folder}/config.json: lora_config needs r and lora_alpha, numbers above 0, and is "
                f"{str(said)[:200]}; fetch it again"
            )
        return said

    def _wanted(self) -> dict[str, tuple[int, ...]]:
        """Shapes of tensors that the configuration says, by name."""
        shape = self.shape
        wanted: dict[str, tuple[int, ...]] = {
            "memory": (shape.layers, shape.rows, shape.hidden),
            "new_memory_positional_emb": (1, 1, shape.hidden),
            "model.embed_tokens.weight": (self.config.get("vocab_size"), shape.hidden),
            "model.norm.weight": (shape.hidden,),
        }
        return wanted | ({"bos_embedding": (shape.layers, 1, shape.hidden)} if shape.bos else {})


def _files(folder: Path) -> dict[str, str]:
    """File of each tensor, whether there is an index of them or one file."""
    if (found := indexed_files(folder, AGAIN, PoolError)) is not None:
        return found
    try:
        with safe_open(folder / SINGLE, framework="pt") as file:
            return dict.fromkeys(file.keys(), SINGLE)
    except (OSError, SafetensorError) as error:
        raise PoolError(f"{folder / SINGLE}: {error}; {AGAIN}") from None
