"""How alike two texts are, the same on every machine: words, shingles, Jaccard similarity, and MinHash signatures to find candidates.

A signature of h numbers agrees in each place with probability J, the Jaccard similarity of the two shingle sets (Broder 1997). Cut into b
bands of r places, two texts meet in some band with probability 1 - (1 - J^r)^b. Candidates are compared exactly, so what is called near
is near; what MinHash misses at the threshold is a matter of b and r: with 32 x 4, 1 pair in 20 million at J = 0.8, 1 in
6,500 at 0.7, 1 in 85 at 0.6.
"""

from __future__ import annotations

import re
import unicodedata
import zlib
from collections.abc import Sequence

import numpy as np

SHINGLE = 5  # words
BANDS, PLACES = 32, 4
_PRIME = (1 << 31) - 1  # products of two 31-bit numbers stay below 2^62
_WORD = re.compile(r"\w+|[+\-*/^=<>%]")  # signs too: 7 + 5 is another problem than 7 - 5


def words(text: str) -> list[str]:
    """Words and arithmetic signs, case and width folded; other punctuation and all spacing left out."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def shingles(tokens: Sequence[str], size: int = SHINGLE) -> frozenset[int]:
    """32-bit hashes of every run of `size` words; a shorter text is one shingle. Empty for no words."""
    if not tokens:
        return frozenset()
    runs = (tokens[i : i + size] for i in range(max(1, len(tokens) - size + 1)))
    return frozenset(zlib.crc32("\x1f".join(run).encode()) for run in runs)


def jaccard(one: frozenset[int], other: frozenset[int]) -> float:
    """|A & B| / |A | B|; 1 for two empty sets."""
    union = len(one | other)
    return len(one & other) / union if union else 1.0


def signature(hashes: frozenset[int]) -> np.ndarray:
    """MinHash: int64 [BANDS * PLACES], the least value of each permutation (a*x + b) mod p over the shingles."""
    a, b = _permutations()
    values = np.fromiter(sorted(hashes), np.int64, len(hashes)) % _PRIME
    if not len(values):
        return np.full(BANDS * PLACES, _PRIME, np.int64)
    return np.stack([(a_i * values + b_i) % _PRIME for a_i, b_i in zip(a, b, strict=True)]).min(axis=1)


def _permutations() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(20240613)  # fixed: the same texts are alike in every run
    return rng.integers(1, _PRIME, BANDS * PLACES), rng.integers(0, _PRIME, BANDS * PLACES)


class NearIndex:
    """Texts seen so far. `nearest` finds an earlier one at least `threshold` alike; `add` keeps a text for later ones."""

    def __init__(self, threshold: float) -> None:
        if not 0 < threshold <= 1:
            raise ValueError(f"a similarity threshold is {threshold}, but it must be in (0, 1]: 0.8 is usual")
        self.threshold = threshold
        self._sets: list[tuple[str, frozenset[int]]] = []
        self._bands: dict[tuple[int, bytes], list[int]] = {}

    def nearest(self, hashes: frozenset[int]) -> tuple[str, float] | None:
        """Name and similarity of the most similar earlier text at or above the threshold (of equals, the earliest)."""
        numbers = sorted({n for band in _bands(hashes) for n in self._bands.get(band, [])})
        found = [(jaccard(hashes, self._sets[n][1]), -n) for n in numbers]
        best = max(found, default=(0.0, 0))
        return (self._sets[-best[1]][0], best[0]) if found and best[0] >= self.threshold else None

    def add(self, name: str, hashes: frozenset[int]) -> None:
        self._sets.append((name, hashes))
        for band in _bands(hashes):
            self._bands.setdefault(band, []).append(len(self._sets) - 1)


def _bands(hashes: frozenset[int]) -> list[tuple[int, bytes]]:
    rows = signature(hashes).reshape(BANDS, PLACES)
    return [(number, row.tobytes()) for number, row in enumerate(rows)]
