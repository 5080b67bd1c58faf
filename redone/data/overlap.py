"""Texts that are the same, nearly the same, or contain one another: decontamination and near-duplicates."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

# A word, or one character of a script that is written without blanks.
_TOKEN = re.compile(
    r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af]"
    r"|[^\W_\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+"
)
BOILERPLATE_SHARE = 0.05  # an n-gram in more evaluation items than this is their template, not their content
BOILERPLATE_ITEMS = 20
MIN_TOKENS = 4  # a shorter evaluation item is found as a whole message only
HASHES, BANDS = 64, 16  # of the near-duplicate search: candidates from about 0.5 Jaccard on
SHINGLE = 3


def tokens(text: str) -> tuple[str, ...]:
    """Words in lower case, full-width forms folded, no punctuation; Chinese and Japanese by character."""
    return tuple(_TOKEN.findall(unicodedata.normalize("NFKC", text).casefold()))


@dataclass(frozen=True, slots=True, kw_only=True)
class Overlap:
    """A training text that holds (a part of) an evaluation item."""

    item: int  # index of the evaluation text
    share: float  # of its n-grams


class Decontaminator:
    """Looks for evaluation texts inside training texts."""

    def __init__(self, texts: Sequence[str], ngram: int, share: float) -> None:
        """`share`: of an item's n-grams that make an overlap; an item shorter than `ngram` words counts when
        it stands in the text whole."""
        self.share = share
        self._whole: dict[tuple[str, ...], int] = {}
        self._grams: dict[int, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
        self._sizes: list[int] = []  # n-grams of item i that count
        found = [tokens(t) for t in texts]
        per_item = []
        for i, words in enumerate(found):
            if words:
                self._whole.setdefault(words, i)
            size = min(ngram, len(words))
            per_item.append((size, set(_grams(words, size)) if len(words) >= MIN_TOKENS else set()))
        counts = Counter(gram for _, grams in per_item for gram in grams)
        limit = max(BOILERPLATE_ITEMS, BOILERPLATE_SHARE * len(texts))
        for i, (size, grams) in enumerate(per_item):
            kept = {g for g in grams if counts[g] <= limit}
            self._sizes.append(len(kept))
            for gram in kept:
                self._grams[size][gram].append(i)

    def find(self, text: str) -> Overlap | None:
        """The evaluation item that overlaps most, or None."""
        words = tokens(text)
        if words in self._whole:
            return Overlap(item=self._whole[words], share=1.0)
        hits: Counter[int] = Counter()
        for size, index in self._grams.items():
            for gram in set(_grams(words, size)):
                hits.update(index.get(gram, ()))
        best = max(hits, key=lambda i: (hits[i] / self._sizes[i], -i), default=None)
        if best is None or hits[best] / self._sizes[best] < self.share:
            return None
        return Overlap(item=best, share=hits[best] / self._sizes[best])


def _grams(words: Sequence[str], size: int) -> Iterable[int]:
    for i in range(len(words) - size + 1):
        yield _hash("\x1f".join(words[i : i + size]))


class NearDuplicates:
    """Tells whether a text is nearly one that was added before (MinHash with banding, then exact Jaccard)."""

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        rng = np.random.default_rng(0x5EED)
        self._a = rng.integers(1, 2**61 - 1, HASHES, dtype=np.uint64) | np.uint64(1)
        self._b = rng.integers(0, 2**61 - 1, HASHES, dtype=np.uint64)
        self._bands: dict[tuple[int, bytes], list[int]] = defaultdict(list)
        self._shingles: list[frozenset[int]] = []

    def add(self, text: str) -> bool:
        """False, and nothing is added, when a text at least `threshold` similar is there already."""
        words = tokens(text)
        shingles = frozenset(_grams(words, min(SHINGLE, len(words)))) if words else frozenset({0})
        values = np.fromiter(shingles, np.uint64, len(shingles))
        with np.errstate(over="ignore"):  # arithmetic modulo 2^64 is meant
            signature = (values[:, None] * self._a + self._b).min(axis=0)
        rows = HASHES // BANDS
        keys = [(b, signature[b * rows : (b + 1) * rows].tobytes()) for b in range(BANDS)]
        for other in {i for key in keys for i in self._bands.get(key, ())}:
            kept = self._shingles[other]
            if len(kept & shingles) >= self.threshold * len(kept | shingles):
                return False
        for key in keys:
            self._bands[key].append(len(self._shingles))
        self._shingles.append(shingles)
        return True


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
