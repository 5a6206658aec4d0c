"""Writes a build's pairs, and reads and writes the authors' cache of pairs (fact D8)."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mem_triton.store.files import write_durably
from mem_triton.systems.memo.reflections.ledger import BuildError, Pair

KINDS = {"surface": "surface", "cross": "crossdoc"}
"""What the authors call the kinds of entries, by our step."""


def cache_of(pairs: Iterable[Pair]) -> dict[str, Any]:
    """Pairs as the authors' pipeline hands them on: an entry for each document, or documents, and kind."""
    entries: dict[tuple[tuple[str, ...], str], list[dict[str, str]]] = {}
    for pair in pairs:
        said = {"question": pair.question, "answer": pair.answer}
        entries.setdefault((pair.docs, KINDS.get(pair.step, "")), []).append(said)
    cache = []
    for (docs, kind), found in entries.items():
        entry: dict[str, Any] = {"doc_id": docs[0], "qa_pairs": found}
        entry |= {"type": kind} if kind else {}
        entry |= {"source_doc_ids": list(docs)} if len(docs) > 1 else {}
        cache.append(entry)
    total = sum(len(entry["qa_pairs"]) for entry in cache)
    return {"total_entries": len(cache), "total_qa_pairs": total, "qa_pairs_cache": cache}


class Cache:
    """A file of the authors' pipeline: whole as it is, and its pairs. Steps 1a and 1b write the entries as a bare list,
    and pairs may lie one level deeper; both are read, and come back as they were, keys that we do not know too."""

    def __init__(self, document: Any) -> None:
        self.document = document

    @classmethod
    def read(cls, path: Path) -> Cache:
        """Raises BuildError naming the file and the entry."""
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise BuildError(f"{path}: {error.strerror or error}") from None
        except (ValueError, RecursionError) as error:
            raise BuildError(f"{path}: not JSON: {error}") from None
        cache = cls(document)
        try:
            cache.pairs()
        except (LookupError, TypeError, AttributeError) as error:
            raise BuildError(f"{path}: not a cache of pairs: {error}") from None
        return cache

    def pairs(self) -> list[Pair]:
        """The pairs of entries without an error, numbered by entry."""
        entries = self.document["qa_pairs_cache"] if isinstance(self.document, dict) else self.document
        steps = {kind: step for step, kind in KINDS.items()}
        found = []
        for unit, entry in enumerate(entries):
            if "error" in entry:
                continue
            raw = entry["qa_pairs"]
            raw = raw.get("qa_pairs", []) if isinstance(raw, dict) else raw
            docs = tuple(map(str, entry.get("source_doc_ids") or [entry.get("doc_id", "")]))
            for number, said in enumerate(raw):
                if isinstance(said, dict) and said.get("question") and said.get("answer"):
                    question, answer = str(said["question"]), str(said["answer"])
                    step = steps.get(entry.get("type", ""), "direct")
                    found.append(Pair(unit, number, step, docs, question, answer, question))
        return found

    def to_bytes(self) -> bytes:
        """The file as the authors' code writes it."""
        return json.dumps(self.document, indent=2).encode()


def training_row(pair: Pair) -> dict[str, Any]:
    """A row for trl: what the protocol's plain dialect asks, and the answer."""
    return {
        "prompt": [{"role": "user", "content": pair.question}],
        "completion": [{"role": "assistant", "content": pair.answer}],
    }


def told(pair: Pair, sources: dict[str, str]) -> dict[str, Any]:
    """A pair with where it comes from."""
    return {
        "question": pair.question,
        "answer": pair.answer,
        "step": pair.step,
        "documents": list(pair.docs),
        "sources": sorted({sources[doc] for doc in pair.docs if doc in sources}),
        "held_out": pair.held_out,
        "prompt_version": pair.prompt,
        "generator": pair.generator,
        **({"written": pair.written} if pair.written != pair.question else {}),
    }


def write_all(folder: Path, pairs: list[Pair], sources: dict[str, str]) -> dict[str, int]:
    """Write train.jsonl, eval.jsonl, pairs.jsonl and cache.json, each whole or not at all; returns rows by file."""
    train = [training_row(pair) for pair in pairs if not pair.held_out]
    held_out = [training_row(pair) for pair in pairs if pair.held_out]
    files = {
        "train.jsonl": _lines(train),
        "eval.jsonl": _lines(held_out),
        "pairs.jsonl": _lines(told(pair, sources) for pair in pairs),
        "cache.json": Cache(cache_of(pair for pair in pairs if not pair.held_out)).to_bytes(),
    }
    for name, data in files.items():
        write_durably(folder / name, lambda path, data=data: path.write_bytes(data) and None)
    return {"train.jsonl": len(train), "eval.jsonl": len(held_out), "pairs.jsonl": len(pairs)}


def _lines(rows: Iterable[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode("utf-8", "replace")
