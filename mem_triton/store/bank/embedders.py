"""Embedders: texts to unit vectors, for retrieval from a bank. The default needs no model and no network.

Example::

    embedder = embedder_from("lexical")
    embedder.embed(["The locker of Mara Stone is falcon."]).shape         # (1, 512)
"""

from __future__ import annotations

import math
import os
import re
import unicodedata
import zlib
from collections import Counter
from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any, Protocol

import numpy as np

from mem_triton.schema import nearest_name_hint
from mem_triton.store.errors import EmbedderError

LEXICAL_DIM = 512
WORD = re.compile(r"\w+")
GRAMS = (3, 4)
"""Lengths of character n-grams: forms of a word share most of them."""
CHUNK = 1024
"""Texts embedded at a time."""
FEATURES = 2
"""Version of the lexical embedder's features; a bank says which its vectors have (``Bank.create``, ``reindex``).

1: words between blanks of the text as it is written. 2: NFKC, marks belong to their words, n-grams of characters in
scripts without blanks.
"""
_CJK = (
    "\u1100-\u11ff\u3005-\u3007\u3041-\u3096\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff\u3105-\u312f\u3131-\u318e"
    "\u31a0-\u31bf\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\ua960-\ua97f\uac00-\ud7ff\uf900-\ufaff\U00020000-\U000323af"
)
"""Hangul, Kana, Bopomofo and Han: few blanks, or particles at every word; counted as characters and pairs."""
_UNSPACED = "\u0e01-\u0e3a\u0e40-\u0e4e\u0e81-\u0ecd\u1000-\u103f\u1780-\u17d3"
"""Thai, Lao, Burmese and Khmer: no blanks, several letters a syllable; counted as pairs and triples."""


@cache
def _tokens() -> re.Pattern[str]:
    marks = "".join(chr(c) for c in range(0x300, 0x10000) if unicodedata.category(chr(c)) in ("Mn", "Mc"))
    word = rf"(?:(?![{_CJK}{_UNSPACED}])[\w{marks}])+"
    return re.compile(rf"(?P<cjk>[{_CJK}]+)|(?P<unspaced>[{_UNSPACED}]+)|{word}")


def tokens_of(text: str) -> list[str]:
    """What the lexical embedder counts: words, without case and in Unicode's NFKC; n-grams where words have no ends."""
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    tokens: list[str] = []
    for match in _tokens().finditer(folded):
        run = match.group()
        sizes = {"cjk": (1, 2), "unspaced": (2, 3)}.get(match.lastgroup or "")
        grams = [run[i : i + n] for n in sizes or () for i in range(len(run) - n + 1)]
        tokens += grams or [run]
    return tokens


class Embedder(Protocol):
    """name: what ``embedder_from`` made it of; dim: length of a vector."""

    name: str
    dim: int

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """float32 [len(texts), dim], each row of length 1. Raises EmbedderError."""
        ...


def embedder_from(spec: str, features: int = FEATURES) -> Embedder:
    """An embedder by its name. features: version of the lexical one's, for banks that were written with an older one.

    "lexical" or "lexical:<dim>": hashed words and character n-grams, offline, the same in every process.
    "sentence-transformers:<model or folder>": any such model, on the CPU.
    "openai:<base url>#<model>": an endpoint that speaks OpenAI's embeddings API; OPENAI_API_KEY is its key.
    Raises EmbedderError naming what is wrong and what to do.
    """
    kind, _, rest = spec.partition(":")
    if kind == "lexical":
        if rest and not (rest.isascii() and rest.isdigit() and len(rest) < 9 and 16 <= int(rest) <= 65536):
            raise EmbedderError(f'embedder "{spec}": the length {rest!r} must be a number from 16 to 65536')
        if features not in range(1, FEATURES + 1):
            raise EmbedderError(f'embedder "{spec}": its features are of version {features}; upgrade mem_triton')
        return LexicalEmbedder(int(rest or LEXICAL_DIM), features)
    if kind == "sentence-transformers":
        if not rest:
            raise EmbedderError(f'embedder "{spec}": name the model, as in "sentence-transformers:all-MiniLM-L6-v2"')
        return SentenceTransformersEmbedder(rest)
    if kind == "openai":
        url, _, model = rest.rpartition("#")
        if not re.match(r"https?://", url) or not model:
            raise EmbedderError(
                f'embedder "{spec}": write "openai:<base url>#<model>", the URL with http:// or https://'
            )
        return OpenAIEmbedder(url, model)
    hint = nearest_name_hint(kind, ("lexical", "sentence-transformers", "openai"))
    raise EmbedderError(f'embedder "{spec}" is unknown.{hint}')


def features_of(spec: str, stored: int | None) -> int:
    """Version of the features of a bank's vectors. stored: what its catalogue says; older ones say nothing."""
    return (stored or 1) if spec.partition(":")[0] == "lexical" else FEATURES


class LexicalEmbedder:
    """Hashed bag of words and character n-grams: dim signed sums, sublinear in a word's count, of unit length.

    A word weighs more the longer it is, which in most languages tells names and nouns from "of" and "the"; half of its
    weight lies on the word itself and half on its n-grams; see ``tokens_of``. Texts without a letter or digit hash as a
    whole. features: see FEATURES.
    """

    def __init__(self, dim: int = LEXICAL_DIM, features: int = FEATURES) -> None:
        self.dim, self.features = dim, features
        self.name = "lexical" if dim == LEXICAL_DIM else f"lexical:{dim}"
        self._word = lru_cache(1 << 16)(self._features)

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """See Embedder."""
        parts = [self._embed(texts[first : first + CHUNK]) for first in range(0, len(texts), CHUNK)]
        return np.concatenate(parts) if parts else np.zeros((0, self.dim), np.float32)

    def _embed(self, texts: Sequence[str]) -> np.ndarray:
        words: dict[str, int] = {}
        found = [  # (text, word, how often)
            (i, words.setdefault(word, len(words)), count)
            for i, text in enumerate(texts)
            for word, count in Counter(self._words(text) or [text]).items()
        ]
        rows, columns, counts = np.array(found).T
        features = [self._word(word) for word in words]
        lengths = np.array([len(places) for places, _ in features])
        places, weights = (np.concatenate(part) for part in zip(*features, strict=True))
        sizes = lengths[columns]
        first = np.cumsum(lengths)[columns] - sizes  # where each word's features start
        at = np.repeat(first - (np.cumsum(sizes) - sizes), sizes) + np.arange(sizes.sum())
        weights = weights[at] * np.repeat(1 + np.log(counts), sizes)
        sums = np.bincount(np.repeat(rows * self.dim, sizes) + places[at], weights, len(texts) * self.dim)
        sums = sums.reshape(-1, self.dim)
        norms = np.linalg.norm(sums, axis=1, keepdims=True)
        sums[norms[:, 0] == 0, 0] = 1  # every feature cancelled: still a unit vector
        return (sums / np.where(norms == 0, 1, norms)).astype(np.float32)

    def _words(self, text: str) -> list[str]:
        if self.features == 1:
            return WORD.findall(text.casefold())
        return tokens_of(text)

    def _features(self, word: str) -> tuple[np.ndarray, np.ndarray]:
        """(places in a vector, signed weights) of a word and its n-grams."""
        edged = f"<{word}>"
        grams = [edged[i : i + n] for n in GRAMS for i in range(len(edged) - n + 1)]
        hashes = np.array([zlib.crc32(f.encode(errors="surrogatepass")) for f in (word, *grams)], np.uint64)
        hashes = (hashes * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(20)  # crc32 alone is linear: mix its bits
        signs = np.where(hashes & np.uint64(1), 1.0, -1.0)
        each = np.array([1.0] + [1 / math.sqrt(max(len(grams), 1))] * len(grams))
        return (hashes >> np.uint64(1)).astype(np.int64) % self.dim, signs * each * min(len(word), 8) / 8


class SentenceTransformersEmbedder:
    """Any sentence-transformers model, on the CPU: the GPU belongs to the served model."""

    def __init__(self, model: str) -> None:
        self.name = f"sentence-transformers:{model}"
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            raise EmbedderError(f'{self.name}: {error}; pip install "mem-triton[embed]"') from None
        try:
            self._model = SentenceTransformer(model, device="cpu")
            self.dim = len(self.embed(["length of a vector"])[0])
        except Exception as error:  # the library raises whatever its parts raise
            raise EmbedderError(f"{self.name}: cannot load it: {type(error).__name__}: {error}") from None

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """See Embedder."""
        vectors = self._model.encode(list(texts), show_progress_bar=False, convert_to_numpy=True)
        return unit(vectors, len(texts), self.name)


class OpenAIEmbedder:
    """An endpoint with OpenAI's embeddings API, such as ``vllm serve <an embedding model>``."""

    BATCH = 256

    def __init__(self, url: str, model: str) -> None:
        self.name, self._url, self._name_of_model = f"openai:{url}#{model}", url, model
        try:
            from openai import OpenAI
        except ImportError as error:
            raise EmbedderError(f'{self.name}: {error}; pip install "mem-triton[embed]"') from None
        key = os.environ.get("OPENAI_API_KEY") or "none"  # servers of one's own want some key
        self._client: Any = OpenAI(base_url=url, api_key=key, timeout=60, max_retries=2)
        self.dim = self.embed(["length of a vector"]).shape[1]

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """See Embedder."""
        vectors: list[list[float]] = []
        for first in range(0, len(texts), self.BATCH):
            part = list(texts[first : first + self.BATCH])
            try:
                answer = self._client.embeddings.create(model=self._name_of_model, input=part, encoding_format="float")
                vectors += [item.embedding for item in sorted(answer.data, key=lambda item: item.index)]
            except Exception as error:  # whatever goes wrong at the other end
                raise EmbedderError(f"{self.name}: {type(error).__name__}: {error}; is {self._url} up?") from None
        return unit(vectors, len(texts), self.name)


def unit(vectors: Any, count: int, name: str) -> np.ndarray:
    """float32 [count, dim] with rows of length 1. Raises EmbedderError if an embedder gave something else."""
    try:
        array = np.asarray(vectors, np.float32)
    except (TypeError, ValueError):
        raise EmbedderError(f"{name}: gave vectors of different lengths") from None
    if array.ndim != 2 or len(array) != count or not array.shape[1]:
        raise EmbedderError(f"{name}: gave an array {array.shape} for {count} texts, expected one vector each")
    norms = np.linalg.norm(array, axis=1, keepdims=True)
    if not np.all(np.isfinite(norms) & (norms > 0)):
        raise EmbedderError(f"{name}: gave a vector that is zero or not finite")
    return array / norms
