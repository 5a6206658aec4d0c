"""Trains a codec on the very blocks that a bank is going to store."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterable
from pathlib import Path

from mem_triton.ops.block_codec import ProductCodec
from mem_triton.store.bank import Bank
from mem_triton.store.bank.fingerprint import Fingerprint
from mem_triton.store.bank.spec import EXACT_CODECS
from mem_triton.write.chunking import Document
from mem_triton.write.config import WriteConfig
from mem_triton.write.encoder import Encoder, Tokenizer
from mem_triton.write.report import WriteReport
from mem_triton.write.spec import bank_spec
from mem_triton.write.writer import Writer

VECTORS = 1 << 18
"""Keys, and as many values, to learn from: enough for codes of 12 bits; more takes minutes more."""


class _EnoughVectors(Exception):
    """So many blocks will do."""


def train_product_codec(
    config: WriteConfig,
    fingerprint: Fingerprint,
    encoder: Encoder,
    tokenizer: Tokenizer,
    documents: Iterable[Document],
    *,
    vectors: int = VECTORS,
    batch_size: int = 1,
) -> bytes:
    """Train a product quantiser on the first of ``documents`` (Memory³, arXiv 2407.01178, section 3).

    Returns its state, for ``Bank.create``. Writes the documents into a bank that is thrown away, until there are
    ``vectors`` keys. Raises CodecError if all documents together are too few.
    """
    spec = bank_spec(config, fingerprint, codec=EXACT_CODECS.get(fingerprint.dtype, "fp32"))
    heads = len(spec.layers) * spec.kv_heads

    counted = [0, 0]  # entries, and their tokens

    def stop(report: WriteReport) -> None:
        counted[1] += sum(bank.resolve(ref).tokens for ref in report.added[counted[0] :])
        counted[0] = len(report.added)
        if counted[1] * heads >= vectors:
            raise _EnoughVectors

    with tempfile.TemporaryDirectory() as folder, Bank.create(Path(folder) / "samples", spec) as bank:
        writer = Writer(bank, encoder, tokenizer, config, batch_size=batch_size)
        with contextlib.suppress(_EnoughVectors):
            writer.write(documents, progress=stop)
        refs = [entry.ref for entry in bank.list(limit=1 << 30)]
        codec = ProductCodec()
        codec.train(bank.load(ref) for ref in refs)
        return codec.state()
