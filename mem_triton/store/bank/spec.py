"""What a bank is made of: its specification, and its entries as they go in and come out."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from mem_triton import ids
from mem_triton.schema import nearest_name_hint
from mem_triton.store.bank.fingerprint import Fingerprint
from mem_triton.store.block import MemoryBlock
from mem_triton.store.errors import BankError, UnknownEntryError

SCHEMA_VERSION = 1
Dtype = Literal["float32", "bfloat16", "float16"]
Kind = Literal["prefix", "memory3", "parallel"]
Codec = Literal["fp32", "bf16", "fp16", "fp8", "int8", "pq"]
EXACT_CODECS: dict[str, Codec] = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
"""By dtype, the codec that keeps its numbers as they are."""


class BankSpec(BaseModel):
    """What all entries of a bank have in common; ``bank.json``.

    kind: "memory3" (sparse references of at most ``reference_tokens`` tokens, read in parallel positions), "parallel"
    (dense ones, in all layers, each as if it stood alone between the head of a chat and the question) or "prefix" (the
    dense KV of a text). fingerprint: of the model that encodes. layers: indices of the stored layers, ascending.
    keep_tokens: tokens that each KV head keeps of a reference, None for all. codec: precision on disk; dtype: what a
    loaded block has. embedder: see ``store.bank.embedders.embedder_from``. prefix_text: the constant prefix under which
    references are encoded (the bank's "sink"), None if there is none; of kind "parallel" it is the head of a chat, all
    before the user's words. overlap_tokens: of its document before it that a "parallel" reference repeats. temperature:
    of the attention to entries, 1.0 for the model's own (T of adaptive parallel encoding, arXiv 2502.05431, section 3).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False)

    schema_version: int = SCHEMA_VERSION
    kind: Kind
    fingerprint: Fingerprint
    layers: tuple[int, ...]
    kv_heads: int = Field(ge=1)
    head_dim: int = Field(ge=1)
    reference_tokens: int = Field(default=128, ge=1)
    keep_tokens: int | None = Field(default=None, ge=1)
    codec: Codec = "bf16"
    dtype: Dtype = "bfloat16"
    embedder: str = "lexical"
    prefix_text: str | None = None
    overlap_tokens: int = Field(default=0, ge=0)
    temperature: float = Field(default=1.0, ge=0.1, le=10)

    @model_validator(mode="after")
    def _check(self) -> BankSpec:
        if not self.layers or list(self.layers) != sorted(set(self.layers)) or self.layers[0] < 0:
            raise ValueError(f"layers: {list(self.layers)} must be layer indices, ascending, none twice")
        if self.layers[-1] >= self.fingerprint.num_layers:
            raise ValueError(
                f"layers: {self.layers[-1]} is not one of the model's {self.fingerprint.num_layers} layers"
            )
        for name in ("kv_heads", "head_dim"):
            own, model = getattr(self, name), getattr(self.fingerprint, name)
            if own != model:
                raise ValueError(f"{name}: the bank has {own}, its model {model}")
        return self

    @property
    def torch_dtype(self) -> torch.dtype:
        """``dtype`` as torch has it."""
        return getattr(torch, self.dtype)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str = "bank.json") -> BankSpec:
        """Parse JSON. Raises BankError naming the key, with the nearest known name for an unknown one."""
        version = data.get("schema_version")
        if not isinstance(version, int) or version < 1:
            raise BankError(f"{where}: schema_version is {version!r}; this is no bank of mem_triton")
        if version > SCHEMA_VERSION:
            raise BankError(
                f"{where}: schema_version {version} is newer than the {SCHEMA_VERSION} that this mem_triton reads; "
                "upgrade mem_triton"
            )
        try:
            return cls.model_validate(dict(data))
        except ValidationError as error:
            problem = error.errors(include_url=False)[0]
            place = ".".join(str(part) for part in problem["loc"])
            known = Fingerprint.model_fields if len(problem["loc"]) > 1 else cls.model_fields
            if problem["type"] == "extra_forbidden":
                hint = nearest_name_hint(str(problem["loc"][-1]), known)
                raise BankError(f"{where}: unknown key {place}; remove it or upgrade mem_triton.{hint}") from None
            message = problem["msg"].removeprefix("Value error, ")
            raise BankError(f"{where}: {place}: {message}" if place else f"{where}: {message}") from None


@dataclass(frozen=True)
class NewEntry:
    """An entry to be written. id: see ``mem_triton.ids``.

    block: in the bank's layers, heads and dtype; None for a cold entry, which has its text only until ``Bank.fill``.
    tenant: whose it is, "" for everybody's. token_ids: the text's, kept for later encoding. content_key: whatever else
    the block depends on (the encoder's settings), part of the content hash.
    """

    id: str
    text: str
    block: MemoryBlock | None = None
    source: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    tenant: str = ""
    token_ids: Sequence[int] | None = None
    content_key: str = ""

    @property
    def content_hash(self) -> str:
        """What ``Bank.find_hash`` finds it by."""
        return content_hash(self.text, self.token_ids, self.content_key)


@dataclass(frozen=True)
class EntryInfo:
    """An entry without its block. tokens: kept per head, 0 for a cold entry; created: seconds since 1970."""

    ref: str
    id: str
    version: int
    tokens: int
    has_block: bool
    text: str
    source: str
    metadata: dict[str, Any]
    tenant: str
    created: float
    content_hash: str


@dataclass(frozen=True)
class Hit:
    """What a search found. score: cosine similarity of query and entry."""

    ref: str
    score: float


def content_hash(text: str, token_ids: Sequence[int] | None = None, content_key: str = "") -> str:
    """SHA-256 over a text, its tokens and its encoder's settings: the same content is not written twice.

    Example::

        if (ref := bank.find_hash(content_hash(text, ids, "layers=0-17 keep=8"), tenant)) is None:
            ref = bank.add([NewEntry(id, text, encode(ids), token_ids=ids, content_key="layers=0-17 keep=8")])[0]
    """
    digest = hashlib.sha256()
    for part in (text.encode(), "" if token_ids is None else ",".join(map(str, token_ids)), content_key):
        data = part if isinstance(part, bytes) else part.encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


def check_id(id: str) -> str:
    """An entry's id. Raises BankError if it has another form."""
    if not ids.is_id(id):
        raise BankError(f"id {id!r}: must be {ids.ID_RULE}", str(id))
    return id


def split_ref(id_or_ref: str) -> tuple[str, int | None]:
    """("alice", 3) of "alice@3", ("alice", None) of "alice". Raises UnknownEntryError for what can name no entry.

    Ids of banks that are older than today's grammar of ids are found by it, too.
    """
    if (reference := ids.split_reference(id_or_ref)) is not None:
        return reference
    if isinstance(id_or_ref, str):
        id, at, version = id_or_ref.partition("@")
        if ids.OLD_ID.fullmatch(id) and (not at or ids.VERSION.fullmatch(version)):
            return id, int(version) if at else None
    raise UnknownEntryError(str(id_or_ref))
