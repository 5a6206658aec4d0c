"""Finds pairs that say the same twice: equal ones, and near ones by MinHash (``datasketch``).

Two questions that differ in a name or a number are two questions, however alike they are; two answers to one question
are both kept, because documents may contradict each other.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from mem_triton.systems.memo.protocol.unknown import normalised
from mem_triton.systems.memo.reflections.ledger import Pair

PERMUTATIONS, SHINGLE, MARGIN = 128, 3, 0.2
"""MARGIN: how much less alike pairs may be that the index proposes; it guesses, and the similarity is computed then."""
_NAMES = re.compile(r"\b[^\W\d_a-z]\w*|\d+")


def duplicates(pairs: Iterable[Pair], near: float) -> dict[tuple[int, int], str]:
    """Pairs to leave out -> why; of equal and near ones the first is kept. near: least Jaccard similarity."""
    from datasketch import MinHash, MinHashLSH

    index = MinHashLSH(threshold=max(near - MARGIN, 0.1), num_perm=PERMUTATIONS)
    found: dict[tuple[int, int], str] = {}
    exact: set[tuple[str, str]] = set()
    kept: dict[tuple[int, int], tuple[set[bytes], object]] = {}
    for pair in pairs:
        question, answer = normalised(pair.question), normalised(pair.answer)
        if (question, answer) in exact:
            found[pair.key] = "equal to another pair"
            continue
        exact.add((question, answer))
        shingles = {question[i : i + SHINGLE].encode() for i in range(max(1, len(question) - SHINGLE + 1))}
        digest = MinHash(num_perm=PERMUTATIONS, seed=1)
        digest.update_batch(list(shingles))
        mark = (answer, pair.held_out, tuple(sorted(_names(pair.question))))
        alike = [
            key for key in index.query(digest) if kept[key][1] == mark and _jaccard(kept[key][0], shingles) >= near
        ]
        if alike:
            found[pair.key] = f"nearly equal to pair {min(alike)[0]}.{min(alike)[1]}"
            continue
        kept[pair.key] = (shingles, mark)
        index.insert(pair.key, digest)
    return found


def _jaccard(a: set[bytes], b: set[bytes]) -> float:
    return len(a & b) / len(a | b)


def _names(text: str) -> list[str]:
    """Words with a capital letter that do not begin the question, and numbers."""
    return [found.group() for found in _NAMES.finditer(text) if found.start() > 0]
