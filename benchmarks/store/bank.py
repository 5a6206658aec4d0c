"""Times a bank with many entries on disk: adding, opening, paging, searching, and what it takes of memory.

    python -m benchmarks.store.bank [--entries 1000000] [--batch 10000] [--minutes 15] [--folder DIR] [--json FILE]

All but a few entries are cold (text and vector, no keys and values): the catalogue and the index are what grows.
Texts are invented words with the frequencies of natural ones (Zipf), half of them of one of 2000 topics; a query is
half of an entry's words in another order. Reading is timed in a process of its own, as a server has it. Search is
checked against the exact answer before its time is believed. When the minutes are over the bank is as large as it is.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from benchmarks.common import record
from mem_triton.store.bank import Bank, BankSpec, NewEntry
from mem_triton.store.bank.fingerprint import Fingerprint
from mem_triton.store.block import MemoryBlock

WORDS, TOPICS, LENGTH = 60_000, 2000, 24
SYLLABLES = [a + b for a in "bdfgklmnprstvz" for b in ("a", "e", "i", "o", "u", "an", "er", "is")]
QUERIES, CHECKED, TOP_K, FILLED = 1000, 100, 5, 256
RECALL = 0.95


class Texts:
    """Entry i's text, the same for the same i."""

    def __init__(self) -> None:
        g = random.Random(0)
        words = set()
        while len(words) < WORDS:
            words.add("".join(g.choices(SYLLABLES, k=g.choice((1, 2, 2, 3, 3, 4)))))
        self.words = np.array(sorted(words, key=lambda w: (len(w), w)))  # frequent words are short, as in languages
        self.zipf = np.cumsum(1 / np.arange(1, WORDS + 1))
        self.topics = np.random.default_rng(0).integers(100, WORDS, (TOPICS, 200))

    def of(self, i: int) -> list[str]:
        """Words of entry i."""
        g = np.random.default_rng(i)
        draws, half = g.random(LENGTH), LENGTH // 2
        topical = self.topics[g.integers(TOPICS)][np.searchsorted(self.zipf[:200], draws[:half] * self.zipf[199])]
        general = np.searchsorted(self.zipf, draws[half:] * self.zipf[-1])
        return self.words[g.permutation(np.concatenate([topical, general]))].tolist()

    def query(self, i: int) -> str:
        """Half of entry i's words, shuffled."""
        words = self.of(i)
        random.Random(i).shuffle(words)
        return " ".join(words[: LENGTH // 2])


def spec() -> BankSpec:
    """Any model's: nothing of it matters here."""
    model = Fingerprint(
        architecture="none",
        num_layers=36,
        hidden_size=2560,
        query_heads=32,
        kv_heads=8,
        head_dim=128,
        rope={},
        dtype="bfloat16",
        weights="",
    )
    return BankSpec(kind="memory3", fingerprint=model, layers=tuple(range(18)), kv_heads=8, head_dim=128, keep_tokens=8)


def reference(seed: int) -> MemoryBlock:
    """A reference of Qwen3-4B as Memory³ would store it: 8 tokens a head in 18 layers, 590 KB in bf16."""
    g = torch.Generator().manual_seed(seed)
    keys = torch.randn(18, 8, 8, 128, generator=g).bfloat16()
    return MemoryBlock(keys, keys.flip(0), torch.arange(3, 11, dtype=torch.int32).expand(18, 8, 8))


def milliseconds(values: list[float]) -> dict[str, float]:
    """Median and tail of seconds."""
    p50, p99 = np.percentile(values, [50, 99])
    return {"p50_ms": round(p50 * 1e3, 3), "p99_ms": round(p99 * 1e3, 3), "max_ms": round(max(values) * 1e3, 3)}


def timed(function: Callable, *arguments: list) -> tuple[list, list[float]]:
    """Results and seconds of one call for each of the arguments."""
    results, seconds = [], []
    for argument in zip(*arguments, strict=True):
        start = time.perf_counter()
        results.append(function(*argument))
        seconds.append(time.perf_counter() - start)
    return results, seconds


def resident() -> dict[str, int]:
    """MiB of this process: all, and without the pages of mapped files, which the kernel may drop."""
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(fields[key].split()[0]) >> 10 for name, key in (("all", "VmRSS"), ("own", "RssAnon"))}


def write(path: Path, entries: int, batch: int, minutes: float) -> dict:
    """Add the entries."""
    texts, start, embedding = Texts(), time.perf_counter(), 0.0
    with Bank.create(path, spec()) as bank:
        embed = bank.embedder.embed

        def timed_embed(some: list[str]) -> np.ndarray:
            nonlocal embedding
            begun = time.perf_counter()
            vectors = embed(some)
            embedding += time.perf_counter() - begun
            return vectors

        bank.embedder.embed = timed_embed
        making, written = 0.0, 0
        for first in range(0, entries, batch):
            if time.perf_counter() - start > minutes * 60:
                break
            begun = time.perf_counter()
            new = [
                NewEntry(f"e{i:07d}", " ".join(texts.of(i)), source=f"s{i % 100}", metadata={"page": i % 10})
                for i in range(first, min(first + batch, entries))
            ]
            making += time.perf_counter() - begun
            bank.add(new)
            written += len(new)
            if first // batch % 10 == 0:
                print(f"{written} entries, {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
        seconds = time.perf_counter() - start - making
        _, each = timed(
            lambda i: bank.add([NewEntry(f"one{i}", " ".join(texts.of(-1 - i & 0xFFFFFF)))]), list(range(50))
        )
        start = time.perf_counter()
        bank.fill_all({f"e{i:07d}@1": reference(i) for i in range(min(FILLED, written))})
        filling = time.perf_counter() - start
        stats = bank.stats()
    return {
        "entries": written,
        "entries_per_second": round(written / seconds),
        "seconds": round(seconds, 1),
        "seconds_embedding": round(embedding, 1),
        "seconds_index": round(bank.vectors.seconds, 1),
        "single_adds": milliseconds(each),
        "filled": {"entries": stats["entries"] - stats["cold"], "seconds": round(filling, 2)},
        "writer_peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10,
        "stats": stats,
    }


def read(path: Path, entries: int) -> dict:
    """What a server does with the bank."""
    texts = Texts()
    before = resident()
    start = time.perf_counter()
    bank = Bank.open(path)
    opening = time.perf_counter() - start
    start = time.perf_counter()
    bank.search("warm up", TOP_K)
    first_search = time.perf_counter() - start
    g = random.Random(1)
    wanted = [g.randrange(entries) for _ in range(QUERIES)]
    queries = [texts.query(i) for i in wanted]
    found, seconds = timed(lambda query: bank.search(query, TOP_K), queries)
    after = resident()
    bank_alone = milliseconds(seconds)

    every = list(bank.catalogue.vectors("", behind=0))  # the exact answer, for some of the queries
    recalls = []
    for query, hits in list(zip(queries, found, strict=True))[:CHECKED]:
        vector = bank.embedder.embed([query])[0]
        scores = np.concatenate([vectors @ vector for _, vectors in every])
        exact = np.sort(scores)[-TOP_K]
        recalls.append(sum(hit.score >= exact - 1e-3 for hit in hits) / TOP_K)
    recall = float(np.mean(recalls))
    if recall < RECALL:
        raise SystemExit(f"recall@{TOP_K} is {recall:.3f}, below {RECALL}: its times mean nothing")

    starts = [f"e{g.randrange(entries):07d}" for _ in range(200)]
    _, pages = timed(lambda after: bank.list(after=after, limit=100), starts)
    _, resolves = timed(bank.resolve, starts)
    _, with_source = timed(lambda query: bank.search(query, TOP_K, source="s7"), queries[:100])
    filled = [f"e{g.randrange(min(FILLED, entries)):07d}@1" for _ in range(200)] if bank.stats()["shards"] else []
    _, loads = timed(bank.load, filled)
    _, halves = timed(lambda ref: bank.load(ref, heads=slice(0, 4)), filled)
    return {
        "load_block": milliseconds(loads or [0.0]),
        "load_half_of_its_heads": milliseconds(halves or [0.0]),
        "open_ms": round(opening * 1e3, 2),
        "first_search_ms": round(first_search * 1e3, 2),
        "search": {**bank_alone, "queries": QUERIES, "top_k": TOP_K, f"recall_at_{TOP_K}": round(recall, 4)},
        "source_entry_among_hits": round(
            sum(f"e{i:07d}@1" in {h.ref for h in hits} for i, hits in zip(wanted, found, strict=True)) / QUERIES, 4
        ),
        "search_within_a_source_of_1_percent": milliseconds(with_source),
        "page_of_100": milliseconds(pages),
        "resolve": milliseconds(resolves),
        "resident_mib": {"before_open": before, "after_searches": after},
    }


def main() -> None:
    """Write, read in another process, print and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entries", type=int, default=1_000_000)
    parser.add_argument("--batch", type=int, default=10_000)
    parser.add_argument("--minutes", type=float, default=1e9, help="stop adding after so many")
    parser.add_argument("--folder", type=Path, help="where the bank is made (default: a temporary folder)")
    parser.add_argument("--json", type=Path, help="write there, not to benchmarks/results/bank-<cpu|gpu>-<date>.json")
    parser.add_argument("--read", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.read:
        print(json.dumps(read(options.read, options.entries)))
        return
    head = record.about("a bank of many entries on disk: adding, reading, searching", "python -m benchmarks.store.bank")
    head["machine"]["threads"] = torch.get_num_threads()
    head["versions"]["sqlite"] = sqlite3.sqlite_version
    folder = Path(tempfile.mkdtemp(prefix="bank-", dir=options.folder)).resolve()
    try:
        written = write(folder / "bank", options.entries, options.batch, options.minutes)
        command = [sys.executable, "-m", "benchmarks.store.bank", "--read", str(folder / "bank")]
        command += ["--entries", str(written["entries"])]
        answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=record.ROOT)
        report = head | {"entries": written["entries"], "write": written, "read": json.loads(answer.stdout)}
    finally:
        shutil.rmtree(folder)
    path = record.write(report, options.json) if options.json else record.save(report, "bank")
    print(json.dumps(report, indent=1))
    print(f"kept in {path}", file=sys.stderr)


if __name__ == "__main__":
    main()
