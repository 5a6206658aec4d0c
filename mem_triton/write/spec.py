"""A bank's specification out of the choices of the write path, and back."""

from __future__ import annotations

from mem_triton.store.bank import BankError, BankSpec
from mem_triton.store.bank.fingerprint import Fingerprint
from mem_triton.write.config import WriteConfig


def bank_spec(
    config: WriteConfig, fingerprint: Fingerprint, *, codec: str = "bf16", embedder: str = "lexical"
) -> BankSpec:
    """Make the specification of a bank that ``config`` writes with the model of ``fingerprint``."""
    references, sparse = config.kind != "prefix", config.kind == "memory3"
    return BankSpec(
        kind=config.kind,
        fingerprint=fingerprint,
        layers=config.layer_indices(fingerprint.num_layers),
        kv_heads=fingerprint.kv_heads,
        head_dim=fingerprint.head_dim,
        reference_tokens=config.reference_tokens,
        keep_tokens=config.keep_tokens if sparse else None,
        codec=codec,
        dtype=fingerprint.dtype,
        embedder=embedder,
        prefix_text=config.prefix_text if references else None,
        overlap_tokens=config.overlap_tokens,
        temperature=config.temperature,
    )


def config_of(spec: BankSpec) -> WriteConfig:
    """Return the choices that a bank's specification records; the others are the defaults."""
    return WriteConfig(
        kind=spec.kind,
        layers=spec.layers,
        keep_tokens=spec.keep_tokens,
        reference_tokens=spec.reference_tokens,
        prefix_text=spec.prefix_text,
        overlap_tokens=spec.overlap_tokens,
        temperature=spec.temperature,
    )


def check_same(config: WriteConfig, spec: BankSpec) -> None:
    """Raises BankError naming the choice in which ``config`` differs from a bank."""
    wanted = bank_spec(config, spec.fingerprint)
    of_references = ("keep_tokens", "reference_tokens", "prefix_text", "overlap_tokens")
    names = ("kind", "layers", "temperature", *(of_references if spec.kind != "prefix" else ()))
    for name in names:
        has, asked = getattr(spec, name), getattr(wanted, name)
        if has != asked:
            raise BankError(f"{name}: the bank has {has!r}, asked for {asked!r}; leave it out, or write another bank")
