"""The configuration of a δ-mem adapter: ``delta_mem_config.json`` as the official code writes it.

Source: delta-Mem ``HFDeltaMemConfig`` (arXiv 2605.12357). Live keys are fields of ``DeltaMemConfig``. The official
file also holds archived keys, left over from experiments; the official code only runs at one value of each, so here
they are accepted at that value, written back, and refused otherwise.

Example::

    config = DeltaMemConfig.from_dict(json.loads(Path("delta_mem_config.json").read_text()))
    config.spec.state_size                                    # floats of one layer's state
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from torch import Tensor

from mem_triton.ops.delta_rule.reference import DeltaRuleSpec, UpdateMode
from mem_triton.schema import ConfigError, nearest_name_hint

HeadName = Literal["q", "k", "v", "o"]
HEAD_NAMES: tuple[HeadName, ...] = ("q", "k", "v", "o")  # also the order of delta_scale_raw with granularity "head"

# Key -> the only value at which the official code runs.
ARCHIVED_KEYS: dict[str, Any] = {
    "num_memory_partitions": 1,
    "num_global_memory_partitions": 0,
    "memory_partition_routing": "soft",
    "memory_partition_basis": "shared",
    "tie_memory_partition_read_write": False,
    "memory_partition_read_mode": "softmax",
    "memory_partition_sigmoid_gate_bias_init": -2.0,
    "slot_read_top_k": 0,
    "global_memory_mode": "shared_rw",
    "global_memory_read_top_k": 0,
    "global_memory_merge_mode": "gated_residual",
    "global_memory_gate_bias_init": -2.0,
    "global_memory_read_logit_bias": 0.0,
    "memory_reader_layers": [],
    "memory_reader_hidden_size": 1024,
    "memory_reader_residual_scale": 0.1,
    "memory_reader_read_only": True,
    "memory_readout_mode": "delta",
    "memory_write_source": "learned_hidden",
    "memory_write_proposals_per_message": 2,
    "synthetic_memory_slots": 1,
    "latent_memory_layers": [],
    "latent_memory_hidden_size": 1024,
    "latent_memory_residual_scale": 0.1,
    "latent_memory_slots": 4,
    "latent_memory_init_std": 0.002,
    "latent_gate_init": 0.01,
}


class DeltaMemConfig(BaseModel):
    """What an adapter computes; immutable. Defaults are the official ones.

    rank: r. alpha: corrections are scaled by s = alpha / rank times the trained scale, if any. num_state_heads: H
    independent r x r states per layer (MSW if > 1). delta_heads: which of q, k, v, o are corrected.
    memory_write_granularity: "token" (TSW, MSW), "message_mean" (SSW) or "sentence_mean". target_modules: last part
    of the wrapped modules' names. target_layers: layer indices, empty = all. beta_bias_init, output_init,
    base_slice_ref_width, online_gain and delta_scale_init matter only to a fresh adapter.
    Raises pydantic.ValidationError (a ValueError); ``from_dict`` raises ConfigError.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    rank: int = Field(8, ge=1, le=4096)
    alpha: float = Field(16.0, ge=-1e6, le=1e6)
    beta_bias_init: float = -1.5
    normalize_qk: bool = True
    couple_lambda: bool = True
    state_update_mode: UpdateMode = "standard"
    rankwise_gates: bool = True
    output_init: Literal["zero", "random", "base_slice", "base_slice_fixed"] = "zero"
    base_slice_ref_width: int = Field(8, ge=1)
    online_gain: float = 0.05
    num_state_heads: int = Field(1, ge=1, le=4096)
    memory_write_granularity: Literal["token", "message_mean", "sentence_mean"] = "token"
    target_modules: tuple[str, ...] = ("self_attn",)
    target_layers: tuple[int, ...] = ()
    delta_heads: tuple[HeadName, ...] = HEAD_NAMES
    delta_o_rmsnorm: bool = False
    delta_o_rmsnorm_eps: float = Field(1e-6, gt=0)
    trainable_delta_scale: bool = False
    delta_scale_init: float = Field(1.0, gt=0)
    delta_scale_max: float = Field(2.0, gt=0)
    delta_scale_granularity: Literal["layer", "head"] = "layer"
    delta_scale_parameterization: Literal["alpha_over_rank"] = "alpha_over_rank"

    @model_validator(mode="before")
    @classmethod
    def _check_keys(cls, data: Any) -> Any:
        """Drop archived keys that hold their accepted value; refuse other values and unknown keys."""
        if not isinstance(data, Mapping):
            return data
        known = {*cls.model_fields, *ARCHIVED_KEYS}
        live = {}
        for key, value in data.items():
            if key in cls.model_fields:
                live[key] = value
            elif key not in known:
                raise ValueError(f"unknown key {key!r:.80}.{nearest_name_hint(str(key), known)}")
            elif not _same(value, ARCHIVED_KEYS[key]):
                only = ARCHIVED_KEYS[key]
                raise ValueError(f"{key}={value!r:.80} is an archived setting: the only accepted value is {only!r}")
        return live

    @field_validator("delta_heads", mode="before")
    @classmethod
    def _split_heads(cls, value: Any) -> Any:
        """The official config also takes "q,o" and "none", any case, with repeats."""
        if isinstance(value, str):
            value = value.split(",")
        if not isinstance(value, (list, tuple)):
            return value
        heads = [str(head).strip().lower() for head in value if str(head).strip()]
        return () if heads == ["none"] else tuple(dict.fromkeys(heads))

    @field_validator("state_update_mode", "memory_write_granularity", "delta_scale_granularity", mode="before")
    @classmethod
    def _lower(cls, value: Any) -> Any:
        return value.strip().lower() if isinstance(value, str) else value

    @model_validator(mode="after")
    def _check_scale(self) -> DeltaMemConfig:
        if self.delta_scale_init >= self.delta_scale_max:
            raise ValueError(
                f"delta_scale_init={self.delta_scale_init} must be smaller than delta_scale_max={self.delta_scale_max}"
            )
        return self

    @property
    def spec(self) -> DeltaRuleSpec:
        """Shape and gate semantics of the recurrence."""
        return DeltaRuleSpec(
            rank=self.rank,
            heads=self.num_state_heads,
            rankwise_gates=self.rankwise_gates,
            couple_lambda=self.couple_lambda,
            update_mode=self.state_update_mode,
            normalize_qk=self.normalize_qk,
        )

    @property
    def scale_width(self) -> int:
        """Length of ``delta_scale_raw``: 0 if not trained, 1 per layer, 4 per head."""
        if not self.trainable_delta_scale:
            return 0
        return len(HEAD_NAMES) if self.delta_scale_granularity == "head" else 1

    def scale_factors(self, delta_scale_raw: Tensor | None) -> dict[HeadName, float | Tensor]:
        """Compute s per head, differentiable: alpha / rank, times sigmoid(raw) * delta_scale_max if it is trained."""
        base = self.alpha / self.rank
        if not self.trainable_delta_scale:
            return dict.fromkeys(HEAD_NAMES, base)
        if delta_scale_raw is None or delta_scale_raw.numel() != self.scale_width:
            got = None if delta_scale_raw is None else tuple(delta_scale_raw.shape)
            raise ValueError(f"delta_scale_raw must have {self.scale_width} element(s), got {got}")
        trained = base * self.delta_scale_max * torch.sigmoid(delta_scale_raw)
        return {head: trained[i if self.scale_width > 1 else 0] for i, head in enumerate(HEAD_NAMES)}

    def scales(self, delta_scale_raw: Tensor | None = None) -> dict[HeadName, float]:
        """Return s per head as plain floats, for inference."""
        raw = None if delta_scale_raw is None else delta_scale_raw.detach().double().cpu()
        return {head: float(s) for head, s in self.scale_factors(raw).items()}

    @property
    def initial_scale_raw(self) -> float:
        """Fresh value of ``delta_scale_raw``: the inverse of sigmoid(raw) * delta_scale_max at delta_scale_init."""
        share = min(max(self.delta_scale_init / self.delta_scale_max, 1e-4), 1 - 1e-4)
        return math.log(share / (1 - share))

    def targets(self, module_name: str) -> bool:
        """Return whether the adapter corrects the module, e.g. ``model.layers.3.self_attn``."""
        *parents, last = module_name.split(".")
        if last not in self.target_modules:
            return False
        if not self.target_layers:
            return True
        indices = [int(part) for part in parents if re.fullmatch(r"\d+", part)]
        return bool(indices) and indices[-1] in self.target_layers

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> DeltaMemConfig:
        """Read the dictionary of a ``delta_mem_config.json``.

        Raises ConfigError naming every bad key, its value and what is accepted.
        """
        if not isinstance(data, Mapping):
            raise ConfigError(f"bad δ-mem config: it is a {type(data).__name__}, expected an object")
        try:
            return cls.model_validate(dict(data))
        except ValidationError as error:
            lines = []
            for item in error.errors():
                where = ".".join(map(str, item["loc"]))
                lines.append(f"{where}={item['input']!r:.80}: {item['msg']}" if where else item["msg"])
            text = "; ".join(lines).replace("Value error, ", "")
            raise ConfigError(f"bad δ-mem config: {text}") from None

    def to_dict(self) -> dict[str, Any]:
        """Return every live and archived key, JSON-ready; the official ``HFDeltaMemConfig.from_dict`` accepts it."""
        archived = {key: list(value) if isinstance(value, list) else value for key, value in ARCHIVED_KEYS.items()}
        return self.model_dump(mode="json") | archived


def _same(value: Any, accepted: Any) -> bool:
    if isinstance(accepted, list):
        return isinstance(value, (list, tuple)) and list(value) == accepted
    if isinstance(accepted, str):
        return isinstance(value, str) and value.strip().lower() == accepted
    if isinstance(accepted, bool) or isinstance(value, bool):
        return value is accepted
    return value == accepted
