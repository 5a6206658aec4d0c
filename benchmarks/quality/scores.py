"""How right an answer is: exact match and F1 as for SQuAD (arXiv 1606.05250, section 6.1), and whether it says it."""

from __future__ import annotations

import random
import re
import statistics
import string
from collections import Counter
from collections.abc import Sequence

ARTICLES = re.compile(r"\b(a|an|the|le|la|les|el|los|las)\b")
PUNCTUATION = str.maketrans(dict.fromkeys(string.punctuation + "¿¡«»", " "))


def plain(text: str) -> str:
    """Lower case, without punctuation, articles and blanks that are not needed."""
    return " ".join(ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split())


def exact(answer: str, right: Sequence[str]) -> bool:
    """Whether the answer is one of the right ones, and nothing else."""
    return plain(answer) in map(plain, right)


def says(answer: str, right: Sequence[str]) -> bool:
    """Whether a right answer stands in the answer."""
    return any(f" {plain(one)} " in f" {plain(answer)} " for one in right)


def f1(answer: str, right: Sequence[str]) -> float:
    """The best F1 of the answer's words against those of a right one."""
    return max(_f1(plain(answer).split(), plain(one).split()) for one in right)


def _f1(said: list[str], wanted: list[str]) -> float:
    common = sum((Counter(said) & Counter(wanted)).values())
    return 2 * common / (len(said) + len(wanted)) if common else 0.0


def interval(values: Sequence[float], rounds: int = 2000) -> tuple[float, float]:
    """The 95 % bootstrap interval of a mean; the same values give the same one."""
    rng = random.Random(0)
    means = sorted(statistics.fmean(rng.choices(values, k=len(values))) for _ in range(rounds))
    return means[int(0.025 * rounds)], means[int(0.975 * rounds)]
