"""Duplicates: which texts say again what an earlier one said, to the letter or nearly.

    python -m nanophi.text.dedup --input clean/ --out unique.jsonl.gz --clusters clusters.jsonl

A text's set of character 5-grams (its letters and digits; 5, as 狗咬了人 and 人咬了狗 share every single character)
-> signature of 128 numbers (one-permutation MinHash: Li et al. 2012, densified after Shrivastava 2017) -> bands whose
hashes collide are candidates (locality-sensitive hashing) -> the candidates' true Jaccard similarity is computed ->
similar ones are joined to clusters -> the first text of each stays.

The texts are read twice and never held: a million documents take some 180 MB (16 bands of 8 bytes and a digest of 16
each, and one band being sorted), however long they are, plus the 5-grams of candidates until their last pair is seen.
"""

import hashlib
import unicodedata
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from itertools import pairwise

import numpy as np

from nanophi.cli import Progress, UserError, flag, run_command
from nanophi.parallel import batches, ordered
from nanophi.text.corpus import Reading, Skipped, writable, write_rows
from nanophi.text.schemas import text_of, with_texts

SHINGLE = 5  # characters
BINS = 128  # numbers in a signature
EMPTY = np.uint32(0xFFFFFFFF)
LINE = 20  # letters; shorter lines (headings, speakers) are repeated for good reasons
SIGNS = "-*/%&#@^_|{}<>"  # what Unicode calls punctuation and code does not
RUN = 100  # in a run of colliding texts each is compared with so many after it: a run of n would give n^2 / 2 pairs


@cache
def _alphabet() -> tuple[np.ndarray, np.ndarray]:
    """For each code point: its lower case, and whether it counts: letters, digits and the signs of arithmetic, code and
    emoji, for 2+2 is not 2*2; punctuation and white space do not."""
    chars = list(map(chr, range(0x34000)))
    lower = [ord(c.lower()) if len(c.lower()) == 1 else ord(c) for c in chars]
    return np.array(lower, dtype=np.uint32), np.array(
        [unicodedata.category(c)[0] in "LNS" or c in SIGNS for c in chars]
    )


def letters(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """(codes, starts): letters and digits of all texts, lower case, uint32; text i is codes[starts[i]:starts[i+1]]."""
    lower, keep = _alphabet()
    codes = np.frombuffer("".join(texts).encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    codes = np.minimum(codes, len(keep) - 1)
    kept = keep[codes]
    count = np.concatenate([[0], np.cumsum(kept)])
    starts = count[np.cumsum([0, *map(len, texts)])]
    return lower[codes[kept]], starts


def shingles(codes: np.ndarray, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(hashes, starts): 64-bit hashes of the 5-grams of each text of `letters`; a shorter text is one shingle."""
    lengths = np.diff(starts)
    padding = np.maximum(SHINGLE - lengths, 0)
    if padding.any():
        codes = np.insert(codes, np.repeat(starts[1:], padding), 0)
        lengths = lengths + padding
    mixed = np.zeros(len(codes), dtype=np.uint64)
    for offset in range(
        SHINGLE
    ):  # a polynomial in an odd 64-bit base; overflow wraps, as a hash wants it
        mixed[: len(codes) - offset] *= np.uint64(0x9E3779B97F4A7C15)
        mixed[: len(codes) - offset] += codes[offset:]
    mixed ^= mixed >> np.uint64(32)
    mixed *= np.uint64(0xD6E8FEB86659FD93)
    ends = np.cumsum(lengths)
    whole = np.ones(len(codes), dtype=bool)
    for offset in range(1, SHINGLE):  # those that would reach into the next text
        whole[ends - offset] = False
    return mixed[whole], np.concatenate([[0], np.cumsum(lengths - SHINGLE + 1)])


def signatures(hashes: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """(texts, BINS) uint32. A shingle's hash names a bin by its highest bits; the smallest of the rest stays in each.
    Two texts agree in a bin with the probability of their Jaccard similarity. An empty bin borrows from others, tried
    in an order that is the same for every text, so that this holds there too."""
    texts = len(starts) - 1
    found = np.full(texts * BINS, EMPTY, dtype=np.uint32)
    bins = (hashes >> np.uint64(57)).astype(np.int64) + np.repeat(
        np.arange(texts) * BINS, np.diff(starts)
    )
    np.minimum.at(found, bins, (hashes >> np.uint64(26)).astype(np.uint32) >> np.uint32(1))
    own = found.reshape(texts, BINS)
    dense = own.copy()
    single = (own != EMPTY).sum(axis=1) == 1
    dense[single] = own[single].min(axis=1, keepdims=True)
    row, column = np.nonzero(dense == EMPTY)
    probe = np.random.default_rng(0)
    while len(row):
        borrowed = own[row, probe.integers(0, BINS, BINS)[column]]
        dense[row, column] = borrowed
        still = borrowed == EMPTY
        row, column = row[still], column[still]
    return dense


def bands_and_rows(threshold: float) -> tuple[int, int]:
    """(b, r): b bands of r numbers. A pair of similarity s collides in some band with probability 1 - (1 - s^r)^b; r is
    the largest (the fewest candidates below the threshold) that finds pairs a little above the threshold with 99 %."""
    above = min(threshold + 0.05, (1 + threshold) / 2)
    rows = max(r for r in range(1, BINS + 1) if r == 1 or 1 - (1 - above**r) ** (BINS // r) >= 0.99)
    return BINS // rows, rows


def band_keys(signature: np.ndarray, bands: int, rows: int) -> np.ndarray:
    """(texts, bands) uint64: a hash of each band."""
    values = signature[:, : bands * rows].reshape(len(signature), bands, rows)
    keys = np.full(values.shape[:2], len(signature[0]), dtype=np.uint64)
    for row in range(rows):
        keys = (keys ^ values[:, :, row]) * np.uint64(0x9FB21C651E98DF25)
        keys ^= keys >> np.uint64(29)
    return keys


def candidate_pairs(keys: np.ndarray) -> np.ndarray:
    """(pairs, 2): which texts i < j share a band, sorted, each once."""
    texts = len(keys)
    found = [np.zeros(0, dtype=np.int64)]  # i * texts + j
    for column in range(keys.shape[1]):
        band = keys[:, column]
        order = np.argsort(band, kind="stable")
        band = band[order]
        for distance in range(1, RUN + 1):
            same = np.flatnonzero(band[:-distance] == band[distance:])
            if not len(same):
                break
            found.append(order[same] * texts + order[same + distance])
        pairs = np.sort(np.concatenate(found))
        found = [
            pairs[np.concatenate([[True], pairs[1:] != pairs[:-1]])[: len(pairs)]]
        ]  # many share several bands
    return np.stack(np.divmod(found[0], max(texts, 1)), axis=1)


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """|a and b| / |a or b| of two sorted unique arrays."""
    common = len(np.intersect1d(a, b, assume_unique=True))
    return common / (len(a) + len(b) - common)


def shingle_set(text: str) -> np.ndarray:
    """A text's shingles, sorted, each once."""
    return np.unique(shingles(*letters([text]))[0])


def sketch(texts: list[str], bands: int, rows: int) -> tuple[list[bytes], np.ndarray]:
    """(digests of the letters, band keys) of some texts."""
    codes, starts = letters(texts)
    digests = [
        hashlib.blake2b(codes[a:b].tobytes(), digest_size=16).digest() for a, b in pairwise(starts)
    ]
    return digests, band_keys(signatures(*shingles(codes, starts)), bands, rows)


def find_clusters(
    texts: Iterable[str], threshold: float = 0.8, workers: int = 1
) -> list[list[int]]:
    """Clusters of texts, as sorted indices: those with the same letters, and those linked by a similarity of at least
    `threshold`. `texts` is iterated over twice, so a list or something that starts anew each time."""
    assert iter(texts) is not texts, "texts are read twice: give a list, not an iterator"
    bands, rows = bands_and_rows(threshold)
    work = partial(sketch, bands=bands, rows=rows)
    sketched = list(ordered(work, batches(texts, 250_000), workers))
    if not sketched:
        return []
    digests = np.frombuffer(
        b"".join(digest for some, _ in sketched for digest in some), dtype="V16"
    )
    keys = np.concatenate([some for _, some in sketched])
    del sketched
    _, first, inverse = np.unique(digests, return_index=True, return_inverse=True)
    parent = first[inverse.ravel()]  # the first text with the same letters
    firsts = np.flatnonzero(parent == np.arange(len(parent)))
    join_similar(texts, firsts[candidate_pairs(keys[firsts])], threshold, parent)
    clusters: dict[int, list[int]] = {}
    for index in np.flatnonzero(parent != np.arange(len(parent))):
        clusters.setdefault(_root(parent, index), []).append(int(index))
    return [[first, *rest] for first, rest in sorted(clusters.items())]


def _root(parent: np.ndarray, index: int) -> int:
    """The first text of the cluster (union-find; each step halves the way)."""
    while parent[index] != index:
        parent[index] = index = parent[parent[index]]
    return int(index)


def join_similar(
    texts: Iterable[str], pairs: np.ndarray, threshold: float, parent: np.ndarray
) -> None:
    """Join, in `parent`, the clusters of pairs whose Jaccard similarity reaches the threshold. A text's shingles are
    held only until its last pair; pairs that are in one cluster already need no look."""
    last = dict(pairs.tolist())  # pairs are sorted, so the last partner of each first text
    pairs = pairs[np.argsort(pairs[:, 1], kind="stable")]
    wanted, held, at = set(pairs.ravel().tolist()), {}, 0
    for index, text in enumerate(texts):
        if index not in wanted:
            continue
        held[index] = shingle_set(text)
        while at < len(pairs) and pairs[at, 1] == index:
            earlier = int(pairs[at, 0])
            a, b = _root(parent, earlier), _root(parent, index)
            if a != b and jaccard(held[earlier], held[index]) >= threshold:
                parent[max(a, b)] = min(a, b)
            if last[earlier] == index:
                del held[earlier]
            at += 1
        if index not in last:
            del held[index]


def near_duplicates(texts: Iterable[str], threshold: float = 0.8, workers: int = 1) -> list[int]:
    """Indices of the texts to drop: all but the first of each cluster."""
    return sorted(
        index for cluster in find_clusters(texts, threshold, workers) for index in cluster[1:]
    )


# ---- rows: what the commands do with the above


class Again:
    """An iterable that starts anew each time, unlike an iterator: Again(function that gives an iterator)."""

    def __init__(self, make: Callable[[], Iterator]):
        self.make = make

    def __iter__(self) -> Iterator:
        return self.make()


def repeated_lines(texts: Iterable[str]) -> np.ndarray:
    """For each line of each text, in order: whether the same letters stood in a line before. Lines of fewer than
    LINE letters are no repetition of anything. 8 bytes a line are held; 64 bits meet by chance once in 10^19 pairs."""
    digests = array("Q")
    for some in batches(texts, 250_000):
        codes, starts = letters([line for text in some for line in text.split("\n")])
        for a, b in pairwise(starts):
            digest = hashlib.blake2b(codes[a:b].tobytes(), digest_size=8).digest()
            digests.append(int.from_bytes(digest) if b - a >= LINE else 0)
    found = np.array(digests, dtype=np.uint64)
    again = found != 0
    again[np.unique(found, return_index=True)[1]] = False
    return again


def drop_lines(rows: Iterable[dict], again: np.ndarray) -> Iterator[dict]:
    """Documents without the lines that `repeated_lines` found in their texts; other rows as they are."""
    at = 0
    for row in rows:
        lines = row.get("text", "").split("\n")
        kept = [
            line
            for line, repeated in zip(lines, again[at : at + len(lines)], strict=True)
            if not repeated
        ]
        at += len(lines)
        yield row | {"text": "\n".join(kept)} if len(kept) < len(lines) else row


@dataclass(kw_only=True)
class Duplicates:
    """Flags of what counts as a duplicate, and the work on rows."""

    threshold: float = flag(
        0.8,
        above=0.3,
        at_most=1,
        help="Jaccard similarity of 5-grams from which texts are the same",
    )
    paragraphs: bool = flag(
        False,
        help="first drop lines of 20 letters or more that stood in an earlier document or line",
    )
    clusters: str | None = flag(
        None, help="write which texts were found to be the same into this .jsonl"
    )
    workers: int = flag(1, at_least=1, help="processes")

    def drop(self, rows: Iterable[dict], counts: dict[str, int]) -> Iterator[dict]:
        """The rows that stay; `rows` is iterated over two or three times. Adds to counts: lines, repeated."""
        source = rows
        if self.paragraphs:
            again = repeated_lines(Again(lambda: (row.get("text", "") for row in source)))
            counts["lines"] = int(again.sum())
            rows = Again(lambda: (r for r in drop_lines(source, again) if text_of(r).strip()))
        clusters = find_clusters(Again(lambda: map(text_of, rows)), self.threshold, self.workers)
        place = {
            index: (number, index == cluster[0])
            for number, cluster in enumerate(clusters)
            for index in cluster
        }
        counts["repeated"] = sum(not first for _, first in place.values())
        shown: list[list[dict]] = [[] for _ in clusters]
        for index, row in enumerate(rows):
            number, first = place.get(index, (None, True))
            if number is not None and self.clusters:
                shown[number].append({"row": index, "text": text_of(row)[:100]})
            if first:
                yield row
        if self.clusters:
            write_rows(self.clusters, ({"cluster": cluster} for cluster in shown))


@dataclass(kw_only=True)
class Config(Reading, Duplicates):
    out: str = flag(help="file to write: .jsonl, .jsonl.gz, .parquet, ...")


def main(cfg: Config) -> dict[str, int]:
    """Write the rows that say something new; returns the counts it prints."""
    writable(cfg.out)
    inputs = cfg.files(cfg.out, cfg.clusters)
    counts, skipped = {"read": 0, "lines": 0, "repeated": 0}, Skipped()

    def rows() -> Iterator[dict]:
        nonlocal skipped
        skipped, counts["read"] = Skipped(), 0
        with Progress("rows", None) as bar:
            for row in cfg.rows(skipped, with_texts, inputs):
                counts["read"] += 1
                yield row
                bar.update()
        if not counts["read"]:  # raised here, nothing is written
            raise UserError(f"nothing to read in {', '.join(cfg.input)}; {skipped}")

    counts["written"] = write_rows(cfg.out, cfg.drop(Again(rows), counts))
    counts["skipped"] = skipped.count
    bands, per_band = bands_and_rows(cfg.threshold)
    print(
        "{0}dedup: read {read:,} rows, skipped {skipped:,} bad ones, dropped {repeated:,} repeated and {lines:,} lines "
        "within others, wrote {written:,} to {1} ({2} bands of {3})".format(
            skipped, cfg.out, bands, per_band, **counts
        )
    )
    return counts


if __name__ == "__main__":
    run_command(Config, main)
