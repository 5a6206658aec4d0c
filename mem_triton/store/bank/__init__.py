"""The memory bank: entries on disk, with their texts, vectors, keys and values."""

from mem_triton.store.bank.bank import Bank
from mem_triton.store.bank.spec import BankSpec, EntryInfo, Hit, NewEntry, content_hash
from mem_triton.store.errors import (
    BankError,
    BankLockedError,
    BankModelError,
    EmbedderError,
    ForeignTenantError,
    UnknownEntryError,
)

__all__ = [
    "Bank",
    "BankError",
    "BankLockedError",
    "BankModelError",
    "BankSpec",
    "EmbedderError",
    "EntryInfo",
    "ForeignTenantError",
    "Hit",
    "NewEntry",
    "UnknownEntryError",
    "content_hash",
]
