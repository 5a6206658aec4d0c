"""Vectors made anew: for banks whose vectors an older version of the lexical embedder has made."""

from __future__ import annotations

from mem_triton.store.bank.catalogue import pack
from mem_triton.store.bank.embedders import FEATURES, embedder_from, features_of
from mem_triton.store.bank.opened import OpenedBank
from mem_triton.store.bank.writing import writer

PART = 1024
"""Entries embedded at a time."""


def outdated(bank: OpenedBank) -> str | None:
    """What to say of a bank whose vectors have older features than new banks get; None if they are today's."""
    features = features_of(bank.spec.embedder, bank.catalogue.meta("features"))
    if features >= FEATURES:
        return None
    return (
        f"{bank.path} has vectors of the lexical embedder's version {features}, and is searched as before; version "
        f"{FEATURES} finds more in Chinese, Japanese, Korean and decomposed text: mem-triton bank reindex {bank.path}"
    )


@writer
def reindex(bank: OpenedBank) -> int:
    """Embed every entry again, in one transaction, and build the graphs anew; how many entries.

    Readers that are open go on with the new vectors at their next search.
    """
    embedder = embedder_from(bank.spec.embedder)
    with bank.catalogue.write() as db:
        last, count = 0, 0
        while rows := db.execute(
            "SELECT seq, text FROM entries WHERE seq > ? ORDER BY seq LIMIT ?", (last, PART)
        ).fetchall():
            vectors = pack(embedder.embed([text for _, text in rows]))
            db.executemany(
                "INSERT OR REPLACE INTO vectors VALUES (?, ?)",
                [(seq, vector) for (seq, _), vector in zip(rows, vectors, strict=True)],
            )
            last, count = rows[-1][0], count + len(rows)
        db.execute("INSERT OR REPLACE INTO meta VALUES ('features', ?)", (FEATURES,))
        db.execute("INSERT OR REPLACE INTO meta VALUES ('dim', ?)", (embedder.dim,))
        db.execute("DELETE FROM index_files")
    for (tenant,) in bank.catalogue.read("SELECT DISTINCT tenant FROM ids"):
        bank.vectors.rebuild(tenant)
    return count
