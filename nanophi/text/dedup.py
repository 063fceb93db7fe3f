"""Duplicates: texts that repeat an earlier one, to the letter or nearly.

    python -m nanophi.text.dedup --input clean/ --out unique.jsonl.gz --clusters clusters.jsonl

The steps, with the functions of this file and texts 0 and 2 of a small example:

    letters          春天来了，小草… -> 春天来了小草…                  letters and digits of a text
    shingles         春天来了小草… -> {春天来了小, 天来了小草, …}      its set of 5-grams, hashed
    signatures       19 hashes, 20 hashes -> 128 numbers each      MinHash
    band_keys        128 numbers -> 16 hashes                      bands of 8 numbers
    candidate_pairs  texts 0 and 2 share the hash of a band        (0, 2) is a candidate
    jaccard          19 of 20 5-grams are in both                  the true similarity is 0.95
    join_similar     0.95 >= 0.8                                   2 joins the cluster of 0

The first text of each cluster stays, the others are dropped.

    >>> texts = ["春天来了，小草从土里探出头来，孩子们在公园里放风筝。", "怎样泡茶？",
    ...          "春天来了，小草从土里探出头来，孩子们在公园里放风筝了！", "怎样泡茶"]
    >>> find_clusters(texts)
    [[0, 2], [1, 3]]

Shingles have 5 characters, because 狗咬了人 and 人咬了狗 share every single character. The
signature is a one-permutation MinHash (Li et al. 2012), densified after Shrivastava 2017. Texts
whose bands collide are candidates (locality-sensitive hashing), so that few pairs need to be
compared; the candidates' true similarity decides.

The texts are read twice and do not stay in memory. A million documents take some 180 MB, however
long they are: 16 bands of 8 bytes and a digest of 16 bytes each, and one band being sorted. The
5-grams of candidates come on top, each until its last pair has been compared.
"""

import hashlib
import unicodedata
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from itertools import pairwise

import numpy as np

from nanophi.claims import claim
from nanophi.cli import Progress, UserError, flag, run_command
from nanophi.files import together
from nanophi.parallel import batches, ordered
from nanophi.text.corpus import Reading, Skipped, write_rows
from nanophi.text.filters import code_points
from nanophi.text.outputs import rows_output
from nanophi.text.schemas import text_of, with_texts

SHINGLE = 5  # characters
BINS = 128  # numbers in a signature
EMPTY = np.uint32(0xFFFFFFFF)  # a bin into which no shingle fell
LINE = 20  # letters; shorter lines (headings, speakers) are repeated for good reasons
SIGNS = "-*/%&#@^_|{}<>"  # Unicode calls them punctuation, but in code they are not
# In a run of texts that share a band, each is compared with this many after it at most: all pairs
# of a run of n texts would be n^2 / 2.
RUN = 100
BATCH = 250_000  # characters that a process gets at once


# ---- 1. letters: what of a text counts


@cache
def _alphabet() -> tuple[np.ndarray, np.ndarray]:
    """For each code point below U+34000: its lower case, (0x34000,) uint32; and whether it counts,
    (0x34000,) bool.

    Letters and digits count, and so do the signs of arithmetic, code and emoji, because 2+2 is not
    2*2. Punctuation and white space do not.
    """
    chars = [chr(code) for code in range(0x34000)]
    lower = [char.lower() if len(char.lower()) == 1 else char for char in chars]
    counts = [unicodedata.category(char)[0] in "LNS" or char in SIGNS for char in chars]
    return np.array([ord(char) for char in lower], dtype=np.uint32), np.array(counts)


def letters(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """(codes, starts): the letters and digits of all texts in lower case, (letters,) uint32.

    Those of text i are codes[starts[i] : starts[i + 1]]; starts has one number more than texts.

    >>> codes, starts = letters(["Hi，你好！", "2+2=4"])
    >>> "".join(map(chr, codes)), starts.tolist()
    ('hi你好2+2=4', [0, 4, 9])
    """
    lower, counts = _alphabet()
    codes = code_points("".join(texts))
    # No text uses what lies after the table. It becomes the table's last code point, which is
    # unassigned and does not count.
    codes = np.minimum(codes, len(counts) - 1)
    kept = counts[codes]
    kept_before = np.concatenate([[0], np.cumsum(kept)])  # each character
    starts = kept_before[np.cumsum([0, *map(len, texts)])]
    return lower[codes[kept]], starts


# ---- 2. shingles: a text as a set


def shingles(codes: np.ndarray, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(hashes, starts): 64-bit hashes of the 5-grams of each text, (shingles,) uint64.

    codes, starts: as `letters` gives them. A text of fewer than 5 letters is one shingle.

    >>> hashes, starts = shingles(*letters(["春天来了小草", "你好", "春天来了小"]))
    >>> starts.tolist()  # the first text has two shingles, the others have one
    [0, 2, 3, 4]
    >>> bool(hashes[0] == hashes[3])
    True
    """
    lengths = np.diff(starts)
    padding = np.maximum(SHINGLE - lengths, 0)
    if padding.any():
        codes = np.insert(codes, np.repeat(starts[1:], padding), 0)
        lengths = lengths + padding
    ends = np.cumsum(lengths)
    inside = np.ones(len(codes), dtype=bool)
    for offset in range(1, SHINGLE):
        inside[ends - offset] = False  # a shingle from here would reach into the next text
    return _hashes(codes)[inside], np.concatenate([[0], np.cumsum(lengths - SHINGLE + 1)])


def _hashes(codes: np.ndarray) -> np.ndarray:
    """A hash of the SHINGLE codes from each place on, (codes,) uint64."""
    # A polynomial in an odd 64-bit base; that overflow wraps around is right for a hash.
    mixed = np.zeros(len(codes), dtype=np.uint64)
    for offset in range(SHINGLE):
        mixed[: len(codes) - offset] *= np.uint64(0x9E3779B97F4A7C15)
        mixed[: len(codes) - offset] += codes[offset:]
    mixed ^= mixed >> np.uint64(32)
    mixed *= np.uint64(0xD6E8FEB86659FD93)
    return mixed


def shingle_set(text: str) -> np.ndarray:
    """A text's shingles, sorted, each once: (shingles,) uint64."""
    return np.unique(shingles(*letters([text]))[0])


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """|a and b| / |a or b| of two sets, as sorted arrays in which each element stands once.

    >>> jaccard(np.array([1, 2, 3]), np.array([2, 3, 4]))
    0.5
    """
    common = len(np.intersect1d(a, b, assume_unique=True))
    return common / (len(a) + len(b) - common)


# ---- 3. signatures: 128 numbers for a set of any size


def signatures(hashes: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """(texts, BINS) uint32: two texts have the same number in a bin with the probability of their
    Jaccard similarity.

    hashes, starts: as `shingles` gives them

    The bits of a shingle's hash say where it goes; the smallest number stays in each bin:

        bits 63 to 57    the bin, 0 to 127
        bits 57 to 27    the number, of 31 bits, so it is never EMPTY

    (Bit 57 is in both. It is the same for all numbers of a bin, so it changes no comparison.) Of
    all shingles that two texts have in a bin, each is equally likely to be the smallest; the
    smallest is in both texts with the probability of their similarity.

    >>> a, b = "今天天气很好，我们去公园。", "今天天气很好，我们去公园了。"
    >>> jaccard(shingle_set(a), shingle_set(b))
    0.875
    >>> first, second = signatures(*shingles(*letters([a, b])))
    >>> float((first == second).mean())  # an estimate from 128 bins
    0.921875
    """
    texts = len(starts) - 1
    smallest = np.full(texts * BINS, EMPTY, dtype=np.uint32)
    bin_in_text = (hashes >> np.uint64(57)).astype(np.int64)
    first_bin = np.repeat(np.arange(texts) * BINS, np.diff(starts))
    numbers = (hashes >> np.uint64(26)).astype(np.uint32) >> np.uint32(1)
    np.minimum.at(smallest, first_bin + bin_in_text, numbers)
    return _densified(smallest.reshape(texts, BINS))


def _densified(own: np.ndarray) -> np.ndarray:
    """(texts, BINS): each empty bin borrows the number of another bin of its text.

    An empty bin tries others in an order that is random but the same for every text, so that what
    `signatures` says of two texts holds for these bins too.

        own      7  -  3  -        - is empty
        dense    7  3  3  7        bin 1 tried bin 2, bin 3 tried bin 1 (empty) and then bin 0
    """
    dense = own.copy()
    # A text with one full bin could only borrow from that one: this is faster.
    single = (own != EMPTY).sum(axis=1) == 1
    dense[single] = own[single].min(axis=1, keepdims=True)
    row, column = np.nonzero(dense == EMPTY)
    probe = np.random.default_rng(0)
    while len(row):
        borrowed = own[row, probe.integers(0, BINS, BINS)[column]]
        dense[row, column] = borrowed
        still_empty = borrowed == EMPTY
        row = row[still_empty]
        column = column[still_empty]
    return dense


# ---- 4. bands: which texts are worth comparing


def collision_probability(similarity: float, bands: int, rows: int) -> float:
    """How probably two texts have the same numbers in all rows of some band: 1 - (1 - s^r)^b.

    >>> [round(collision_probability(s, 16, 8), 3) for s in (0.5, 0.7, 0.8, 0.85)]
    [0.061, 0.613, 0.947, 0.994]
    """
    return 1 - (1 - similarity**rows) ** bands


def bands_and_rows(threshold: float) -> tuple[int, int]:
    """(bands, rows): how a signature is cut into bands, each of so many rows (numbers).

    The more rows a band has, the fewer candidates lie below the threshold. So rows is the largest
    number with which pairs a little above the threshold are found with 99 %.

    >>> bands_and_rows(0.8)
    (16, 8)
    """
    above = min(threshold + 0.05, (1 + threshold) / 2)
    good = [r for r in range(1, BINS + 1) if collision_probability(above, BINS // r, r) >= 0.99]
    rows = max(good, default=1)
    return BINS // rows, rows


def band_keys(signature: np.ndarray, bands: int, rows: int) -> np.ndarray:
    """(texts, bands) uint64: a hash of the numbers in each band.

    signature: (texts, BINS), of `signatures`
    """
    values = signature[:, : bands * rows].reshape(len(signature), bands, rows)
    keys = np.full(values.shape[:2], BINS, dtype=np.uint64)
    for row in range(rows):
        keys = (keys ^ values[:, :, row]) * np.uint64(0x9FB21C651E98DF25)
        keys ^= keys >> np.uint64(29)
    return keys


def candidate_pairs(keys: np.ndarray) -> np.ndarray:
    """(pairs, 2) int64: the texts i < j that share the key of a band, sorted, each pair once.

    keys: (texts, bands), of `band_keys`

    >>> candidate_pairs(np.array([[5, 1], [6, 2], [5, 2]], dtype=np.uint64)).tolist()
    [[0, 2], [1, 2]]
    """
    texts = len(keys)
    pairs = np.zeros(0, dtype=np.int64)  # the pair (i, j) as the number i * texts + j
    for column in range(keys.shape[1]):
        # Many pairs share several bands, so repetitions go after each band.
        pairs = np.sort(np.concatenate([pairs, *_pairs_of_band(keys[:, column])]))
        is_new = np.ones(len(pairs), dtype=bool)
        is_new[1:] = pairs[1:] != pairs[:-1]
        pairs = pairs[is_new]
    return np.stack(np.divmod(pairs, max(texts, 1)), axis=1)


def _pairs_of_band(keys: np.ndarray) -> Iterator[np.ndarray]:
    """Numbers i * texts + j of the pairs with the same key, first those that are neighbours among
    the sorted keys, then those with one text between them, and so on.

    keys: (texts,), of one band
    """
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    for distance in range(1, RUN + 1):
        same = np.flatnonzero(keys[:-distance] == keys[distance:])
        if not len(same):
            return
        yield order[same] * len(keys) + order[same + distance]


# ---- 5. clusters: texts linked by similarity


def sketch(texts: list[str], bands: int, rows: int) -> tuple[list[bytes], np.ndarray]:
    """(digest of the letters of each text, band keys (texts, bands)): all that is kept of texts."""
    codes, starts = letters(texts)
    digests = [
        hashlib.blake2b(codes[start:end].tobytes(), digest_size=16).digest()
        for start, end in pairwise(starts)
    ]
    return digests, band_keys(signatures(*shingles(codes, starts)), bands, rows)


def find_clusters(
    texts: Iterable[str], threshold: float = 0.8, workers: int = 1
) -> list[list[int]]:
    """Clusters of texts, as sorted indices: texts with the same letters, and texts linked by a
    similarity of at least `threshold`.

    texts: iterated over twice, so it must be a list or something else that starts anew each time

    A cluster is a tree in the array `parent`: parent[i] is an earlier text of the same cluster, and
    the first text of a cluster is its own parent.

        parent    0 1 0 1 2       clusters [0, 2, 4] and [1, 3]
        index     0 1 2 3 4
    """
    assert iter(texts) is not texts, "texts are read twice: give a list, not an iterator"
    bands, rows = bands_and_rows(threshold)
    work = partial(sketch, bands=bands, rows=rows)
    sketches = list(ordered(work, batches(texts, BATCH), workers))
    if not sketches:
        return []
    digests = b"".join(digest for of_batch, _ in sketches for digest in of_batch)
    keys = np.concatenate([of_batch for _, of_batch in sketches])
    del sketches  # they hold the keys a second time
    parent = _first_of_equal(np.frombuffer(digests, dtype="V16"))
    firsts = np.flatnonzero(parent == np.arange(len(parent)))
    pairs = firsts[candidate_pairs(keys[firsts])]
    join_similar(texts, pairs, threshold, parent)
    return _clusters(parent)


def _first_of_equal(digests: np.ndarray) -> np.ndarray:
    """(texts,): for each text the index of the first one with the same digest."""
    _, first, inverse = np.unique(digests, return_index=True, return_inverse=True)
    return first[inverse.ravel()]


def join_similar(
    texts: Iterable[str], pairs: np.ndarray, threshold: float, parent: np.ndarray
) -> None:
    """Join, in `parent`, the clusters of pairs whose Jaccard similarity reaches the threshold.

    pairs: (pairs, 2), of `candidate_pairs`. A text's shingles stay in memory only until its last
    pair has been compared. Pairs that are in one cluster already need no comparison.
    """
    last_partner = dict(pairs.tolist())  # pairs are sorted: the last one of a text remains
    needed = set(pairs.ravel().tolist())
    pairs = pairs[np.argsort(pairs[:, 1], kind="stable")]  # by the text that comes later
    sets: dict[int, np.ndarray] = {}  # text -> shingles, while pairs of it are to come
    number = 0  # of the next pair to compare
    for index, text in enumerate(texts):
        if index not in needed:
            continue
        sets[index] = shingle_set(text)
        while number < len(pairs) and pairs[number, 1] == index:
            earlier = int(pairs[number, 0])
            a = _root(parent, earlier)
            b = _root(parent, index)
            if a != b and jaccard(sets[earlier], sets[index]) >= threshold:
                parent[max(a, b)] = min(a, b)
            if last_partner[earlier] == index:
                del sets[earlier]
            number += 1
        if index not in last_partner:
            del sets[index]


def _root(parent: np.ndarray, index: int) -> int:
    """The first text of the cluster (union-find). Each step makes the way shorter for later calls:
    a text's parent becomes its grandparent.

    >>> parent = np.array([0, 0, 1, 2])
    >>> _root(parent, 3), parent.tolist()
    (0, [0, 0, 1, 1])
    """
    while parent[index] != index:
        parent[index] = parent[parent[index]]
        index = parent[index]
    return int(index)


def _clusters(parent: np.ndarray) -> list[list[int]]:
    """The clusters of more than one text, by their first text."""
    clusters: dict[int, list[int]] = {}  # first text -> the others
    for index in np.flatnonzero(parent != np.arange(len(parent))):
        clusters.setdefault(_root(parent, int(index)), []).append(int(index))
    return [[first, *rest] for first, rest in sorted(clusters.items())]


def near_duplicates(texts: Iterable[str], threshold: float = 0.8, workers: int = 1) -> list[int]:
    """Indices of the texts to drop: all but the first of each cluster."""
    clusters = find_clusters(texts, threshold, workers)
    return sorted(index for cluster in clusters for index in cluster[1:])


# ---- 6. repeated lines within texts


def repeated_lines(texts: Iterable[str]) -> np.ndarray:
    """(lines of all texts,) bool: whether the same letters stood in an earlier line.

    Lines of fewer than LINE letters are no repetition of anything. Each line takes 8 bytes of
    memory. Two different lines have the same 64-bit digest by chance once in 10^19 pairs.
    """
    digests = array("Q")  # of each line; 0 for a short one
    for batch in batches(texts, BATCH):
        codes, starts = letters([line for text in batch for line in text.split("\n")])
        for start, end in pairwise(starts):
            if end - start < LINE:
                digests.append(0)
            else:
                digest = hashlib.blake2b(codes[start:end].tobytes(), digest_size=8).digest()
                digests.append(int.from_bytes(digest))
    values = np.array(digests, dtype=np.uint64)
    repeated = values != 0
    _, first_places = np.unique(values, return_index=True)
    repeated[first_places] = False
    return repeated


def drop_lines(rows: Iterable[dict], repeated: np.ndarray) -> Iterator[dict]:
    """Documents without the lines that `repeated_lines` marks in their texts; other rows as they
    are.

    >>> list(drop_lines([{"text": "甲\\n乙"}, {"text": "丙"}], np.array([False, True, False])))
    [{'text': '甲'}, {'text': '丙'}]
    """
    start = 0  # of this row's lines in `repeated`
    for row in rows:
        lines = row.get("text", "").split("\n")
        marks = repeated[start : start + len(lines)]
        kept = [line for line, is_repeated in zip(lines, marks, strict=True) if not is_repeated]
        start += len(lines)
        if len(kept) < len(lines):
            yield row | {"text": "\n".join(kept)}
        else:
            yield row


# ---- 7. rows: what the commands do with the above


class Restartable:
    """An iterable that starts anew each time, unlike an iterator.

    >>> numbers = Restartable(lambda: iter([1, 2]))
    >>> list(numbers), list(numbers)
    ([1, 2], [1, 2])
    """

    def __init__(self, make: Callable[[], Iterator]):
        self.make = make

    def __iter__(self) -> Iterator:
        return self.make()


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
        """The rows that stay. Adds to counts: lines, repeated.

        rows: iterated over two or three times, so see `Restartable`
        """
        if self.paragraphs:
            rows = _without_repeated_lines(rows, counts)
        texts = Restartable(lambda: map(text_of, rows))
        clusters = find_clusters(texts, self.threshold, self.workers)
        cluster_of = {index: cluster for cluster in clusters for index in cluster}
        counts["repeated"] = len(cluster_of) - len(clusters)
        members: dict[int, list[dict]] = {}  # first text of a cluster -> its texts, to be shown
        for index, row in enumerate(rows):
            first = cluster_of[index][0] if index in cluster_of else index
            if self.clusters and index in cluster_of:
                shown = {"row": index, "text": text_of(row)[:100]}
                members.setdefault(first, []).append(shown)
            if first == index:
                yield row
        if self.clusters:
            write_rows(self.clusters, ({"cluster": cluster} for cluster in members.values()))


def _without_repeated_lines(rows: Iterable[dict], counts: dict[str, int]) -> Restartable:
    """The rows without repeated lines, and without rows that hold nothing else."""
    repeated = repeated_lines(Restartable(lambda: (row.get("text", "") for row in rows)))
    counts["lines"] = int(repeated.sum())
    return Restartable(lambda: (row for row in drop_lines(rows, repeated) if text_of(row).strip()))


@dataclass(kw_only=True)
class Config(Reading, Duplicates):
    out: str = flag(help="file to write: .jsonl, .jsonl.gz, .parquet, ...")


def main(cfg: Config) -> dict[str, int]:
    """Write the rows that say something new; returns the counts it prints."""
    outputs = [rows_output("--out", cfg.out), rows_output("--clusters", cfg.clusters)]
    inputs = cfg.files(cfg.out, cfg.clusters)
    counts = {"read": 0, "lines": 0, "repeated": 0}
    skipped = Skipped()

    def rows() -> Iterator[dict]:
        """The rows of the inputs. They are read several times, and each time is counted anew."""
        nonlocal skipped
        skipped = Skipped()
        counts["read"] = 0
        with Progress("rows", None) as bar:
            for row in cfg.rows(skipped, with_texts, inputs):
                counts["read"] += 1
                yield row
                bar.update()
        if not counts["read"]:  # raised while writing, so no file appears
            raise UserError(f"nothing to read in {', '.join(cfg.input)}; {skipped}")

    with claim(inputs, *outputs), together():
        counts["written"] = write_rows(cfg.out, cfg.drop(Restartable(rows), counts))
    counts["skipped"] = skipped.count
    bands, rows_per_band = bands_and_rows(cfg.threshold)
    print(
        f"{skipped}dedup: read {counts['read']:,} rows, skipped {counts['skipped']:,} bad ones, "
        f"dropped {counts['repeated']:,} repeated and {counts['lines']:,} lines within others, "
        f"wrote {counts['written']:,} to {cfg.out} ({bands} bands of {rows_per_band})"
    )
    return counts


if __name__ == "__main__":
    run_command(Config, main)
