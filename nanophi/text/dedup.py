"""Near-duplicate removal: which texts say again what an earlier one said.

Character 5-grams of the letters and digits -> MinHash signature (Broder 1997) -> bands that collide are candidates ->
their true Jaccard similarity is computed -> the later of a similar pair goes. 5-grams, not single characters: 狗咬了人
and 人咬了狗 share every character.

In memory for each document that stays: its shingles, 8 bytes a character, and some 5 KB of bands.
"""

import re
from collections import defaultdict
from collections.abc import Iterable

import numpy as np

SHINGLE = 5  # characters
BANDS, ROWS = 16, 8  # 128 hashes; a pair of Jaccard 0.8 collides in some band with 95 %, one of 0.5 with 6 %
PRIME = (1 << 31) - 1


def shingles(text: str) -> np.ndarray:
    """Hashes of the text's character 5-grams, sorted and unique, uint64; punctuation and space do not count."""
    codes = np.frombuffer(re.sub(r"[\W_]+", "", text.lower()).encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    codes = np.pad(codes.astype(np.uint64), (0, max(0, SHINGLE - len(codes))))
    mixed = np.zeros(len(codes) - SHINGLE + 1, dtype=np.uint64)
    for offset in range(SHINGLE):  # a polynomial in an odd 64-bit base; overflow wraps, as a hash wants it
        mixed = mixed * np.uint64(0x9E3779B97F4A7C15) + codes[offset : offset + len(mixed)]
    return np.unique(mixed)


def signature(hashes: np.ndarray, multiply: np.ndarray, add: np.ndarray) -> np.ndarray:
    """The smallest value under each of the 128 hash functions h -> (a h + b) mod p: (128,) uint64."""
    folded = (hashes >> np.uint64(33)) % np.uint64(PRIME)  # high bits: the best mixed ones; below 2^31, so a h fits
    return np.array([((a * folded + b) % np.uint64(PRIME)).min() for a, b in zip(multiply, add, strict=True)])


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """|a and b| / |a or b| of two sorted unique arrays."""
    common = len(np.intersect1d(a, b, assume_unique=True))
    return common / (len(a) + len(b) - common)


def near_duplicates(texts: Iterable[str], threshold: float = 0.8) -> list[int]:
    """Indices of the texts to drop: each is at least `threshold` similar to an earlier text that stays."""
    random = np.random.default_rng(0)
    multiply, add = random.integers(1, PRIME, (2, BANDS * ROWS)).astype(np.uint64)
    sets: dict[int, np.ndarray] = {}  # shingles of the texts that stay
    buckets: dict[tuple, list[int]] = defaultdict(list)
    dropped = []
    for index, text in enumerate(texts):
        own = shingles(text)
        bands = signature(own, multiply, add).reshape(BANDS, ROWS)
        keys = [(band, values.tobytes()) for band, values in enumerate(bands)]
        candidates = {earlier for key in keys for earlier in buckets[key]}
        if any(jaccard(own, sets[earlier]) >= threshold for earlier in candidates):
            dropped.append(index)
            continue
        sets[index] = own
        for key in keys:
            buckets[key].append(index)
    return dropped
