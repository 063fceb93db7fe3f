"""Near-duplicates beside datasketch: time, memory, recall of planted duplicates, and growth.

    pip install datasketch xxhash
    python bench/dedup.py --input DIR --documents 20000 --growth 10000 30000 60000

Both sides get the same documents in memory and do the same job, from text to candidate pairs:
5-grams of what nanophi counts as letters, 128 numbers, 16 bands of 8. datasketch uses its bulk
update and xxhash. The planted duplicates are copies of documents with characters replaced, dropped
and moved. Each run is a process of its own on one core; memory is what it takes beyond the texts.

Read in this order: the sides, `work` (one run), the two tables.
"""

import ctypes
import json
import os
import pickle
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from machine import memory_gb, run_pinned
from table import print_head, print_row

from nanophi.cli import flag, run_command
from nanophi.parallel import batches
from nanophi.text.corpus import read_texts
from nanophi.text.dedup import candidate_pairs, find_clusters, jaccard, letters, shingle_set, sketch

BANDS = 16
ROWS = 8  # of a band
THRESHOLD = 0.8  # from this similarity on, two documents are near-duplicates

# What str.translate drops for datasketch. It is filled before the clock starts.
NO_LETTERS: dict[int, None] = {}

Pairs = set[tuple[int, int]]  # places of two documents, the smaller one first


# ---- the sides


def nanophi(texts: list[str]) -> Pairs:
    """Our candidate pairs."""
    import numpy as np

    keys = [sketch(batch, BANDS, ROWS)[1] for batch in batches(texts, 250_000)]
    return set(map(tuple, candidate_pairs(np.concatenate(keys)).tolist()))


def datasketch(texts: list[str]) -> Pairs:
    """datasketch's candidate pairs."""
    import xxhash
    from datasketch import MinHash, MinHashLSH

    lsh = MinHashLSH(num_perm=BANDS * ROWS, params=(BANDS, ROWS))
    pairs = set()
    empty = MinHash(num_perm=BANDS * ROWS, hashfunc=xxhash.xxh32_intdigest)
    for index, text in enumerate(texts):
        kept = text.lower().translate(NO_LETTERS)
        five_grams = {kept[i : i + 5] for i in range(max(len(kept) - 4, 1))}
        signature = empty.copy()
        signature.update_batch([gram.encode() for gram in five_grams])
        pairs.update((earlier, index) for earlier in lsh.query(signature))
        lsh.insert(index, signature)
    return pairs


def clusters(texts: list[str]) -> Pairs:
    """Ours from text to clusters: the first document of each cluster with every other one."""
    return {(group[0], other) for group in find_clusters(texts, THRESHOLD) for other in group[1:]}


SIDES = {f.__name__: f for f in (nanophi, datasketch, clusters)}


@dataclass(kw_only=True)
class Config:
    input: list[str] = flag(help="documents: files, directories or globs")
    documents: int = flag(20_000, help="documents of the comparison")
    planted: int = flag(1_000, help="more of them, each a changed copy of one")
    growth: list[int] = flag(
        help="numbers of documents for ours alone, text to clusters; 0 for all"
    )
    repeats: int = flag(3, help="runs of each side")
    seed: int = flag(0, help="which documents, and what is changed in the copies")


def main(cfg: Config) -> None:
    rng = random.Random(cfg.seed)
    everything = list(read_texts(cfg.input))
    rng.shuffle(everything)
    texts, planted = with_changed_copies(everything[: cfg.documents], cfg.planted, rng)
    with tempfile.TemporaryDirectory() as folder:
        print_comparison(texts, planted, cfg.repeats, folder)
        print_growth(everything, cfg.growth, folder)


def with_changed_copies(
    texts: list[str], count: int, rng: random.Random
) -> tuple[list[str], list[tuple[int, int]]]:
    """(the texts with changed copies of some of them behind, each original with its copy)."""
    originals = rng.sample(range(len(texts)), count)
    copies = [changed(texts[i], rng) for i in originals]
    planted = [(original, len(texts) + k) for k, original in enumerate(originals)]
    return texts + copies, planted


def changed(text: str, rng: random.Random) -> str:
    """A copy with up to 4 % of the characters replaced or dropped. In one of five copies a part is
    moved to the end.
    """
    rate = rng.uniform(0, 0.04)
    chars = []
    for char in text:
        if rng.random() > rate:
            chars.append(char)
        else:
            chars.append(rng.choice(["", text[rng.randrange(len(text))]]))
    if rng.random() < 0.2:
        middle = rng.randrange(len(chars))
        chars = chars[middle:] + chars[:middle]
    return "".join(chars)


# ---- one run, in a process of its own


def work(name: str, path: str) -> None:
    """Run a side once: print the measurements as JSON, and write the pairs to `path`.out."""
    texts = pickle.loads(Path(path).read_bytes())
    fill_tables(texts)
    forget_memory()
    before_gb = memory_gb("VmRSS")
    started = time.perf_counter()
    pairs = SIDES[name](texts)
    seconds = time.perf_counter() - started
    print(json.dumps({"seconds": seconds, "gb": max(memory_gb("VmHWM") - before_gb, 0)}))
    Path(f"{path}.out").write_bytes(pickle.dumps(pairs))


def fill_tables(texts: list[str]) -> None:
    """Build what both sides build once, before the clock starts."""
    find_clusters(["this fills the tables of letters"])
    for char in set("".join(texts)):
        codes, _ = letters([char])
        if not len(codes):
            NO_LETTERS[ord(char)] = None


def forget_memory() -> None:
    """Give the memory that loading took back to the system, and forget its peak."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def run_once(name: str, texts: list[str], folder: str) -> tuple[dict, Pairs]:
    """(what `work` measured, the pairs)."""
    path = Path(folder) / "texts"
    path.write_bytes(pickle.dumps(texts))
    core = max(os.sched_getaffinity(0))
    done = run_pinned(
        [sys.executable, __file__, "--work", name, str(path)],
        [core],
        threads=1,
        stderr=subprocess.PIPE,
        check=True,
    )
    return json.loads(done.stdout), pickle.loads(Path(f"{path}.out").read_bytes())


# ---- the first table: both sides


def print_comparison(
    texts: list[str], planted: list[tuple[int, int]], repeats: int, folder: str
) -> None:
    """A row for each side: time, memory, candidates, recall of planted and of true pairs."""
    similarity = similarity_of_pairs(texts)
    true = {pair: similarity(pair) for pair in planted}
    print(
        f"\n{len(texts):,} documents, {sum(map(len, texts)):,} characters, one core, "
        f"medians of {repeats}\n"
    )
    print_head(
        "side",
        "seconds",
        "MB more",
        "candidates",
        "recall at 0.80",
        "at 0.85",
        "of true pairs of the other",
    )
    runs = []
    for _ in range(repeats):
        runs.append({name: run_once(name, texts, folder) for name in ("nanophi", "datasketch")})
    candidates = {name: pairs for name, (_, pairs) in runs[0].items()}

    for name, other in (("nanophi", "datasketch"), ("datasketch", "nanophi")):
        measured = [run[name][0] for run in runs]
        seconds = statistics.median(one["seconds"] for one in measured)
        gb = max(one["gb"] for one in measured)
        recalls = []
        for limit in (THRESHOLD, THRESHOLD + 0.05):
            similar = [pair for pair, value in true.items() if value >= limit]
            recalls.append(f"{share_in(candidates[name], similar):.4f}")
        true_of_other = [pair for pair in candidates[other] if similarity(pair) >= THRESHOLD]
        print_row(
            name,
            f"{seconds:.1f}",
            f"{1000 * gb:.0f}",
            f"{len(candidates[name]):,}",
            *recalls,
            f"{share_in(candidates[name], true_of_other):.4f}",
        )


def share_in(candidates: Pairs, pairs: list[tuple[int, int]]) -> float:
    """The share of `pairs` that are among the candidates."""
    return sum(pair in candidates for pair in pairs) / len(pairs)


def similarity_of_pairs(texts: list[str]) -> Callable[[tuple[int, int]], float]:
    """A function: two places in `texts` -> the exact Jaccard similarity of these texts."""

    @cache  # Each text is cut into 5-grams once.
    def five_grams(place: int):
        return shingle_set(texts[place])

    def similarity(pair: tuple[int, int]) -> float:
        return jaccard(five_grams(pair[0]), five_grams(pair[1]))

    return similarity


# ---- the second table: how ours grows


def print_growth(everything: list[str], sizes: list[int], folder: str) -> None:
    """A row for each number of documents, from text to clusters."""
    print()
    print_head(
        "documents",
        "characters",
        "seconds, text to clusters",
        "MB more",
        "dropped",
        "by way of others",
    )
    for size in sizes:
        texts = everything[: size or len(everything)]
        measured, pairs = run_once("clusters", texts, folder)
        similarity = similarity_of_pairs(texts)
        # These do not resemble the first document of their cluster; documents between them do.
        by_way_of_others = sum(similarity(pair) < THRESHOLD for pair in pairs)
        print_row(
            f"{len(texts):,}",
            f"{sum(map(len, texts)):,}",
            f"{measured['seconds']:.1f}",
            f"{1000 * measured['gb']:.0f}",
            f"{len(pairs):,}",
            f"{by_way_of_others:,}",
        )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        work(sys.argv[2], sys.argv[3])
    else:
        run_command(Config, main)
