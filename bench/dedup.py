"""Near-duplicates beside datasketch: time, memory, recall of planted duplicates, and growth.

    pip install datasketch xxhash
    python bench/dedup.py --input DIR --documents 20000 --growth 10000 30000 60000

Both sides get the same documents in memory and the same job, from text to candidate pairs: 5-grams of what nanophi
counts as letters, 128 numbers, 16 bands of 8. datasketch has its bulk update and xxhash. Planted: copies of documents
with characters replaced, dropped and moved. Each run is a process of its own on one core; memory is beyond the texts.
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
from dataclasses import dataclass
from pathlib import Path

from nanophi.cli import flag, run_command
from nanophi.parallel import batches
from nanophi.text.corpus import read_texts
from nanophi.text.dedup import candidate_pairs, find_clusters, jaccard, letters, shingle_set, sketch

BANDS, ROWS, THRESHOLD = 16, 8, 0.8
NO_LETTERS: dict[
    int, None
] = {}  # what str.translate drops for datasketch; filled before the clock starts


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


def nanophi(texts: list[str]) -> set[tuple[int, int]]:
    import numpy as np

    keys = np.concatenate([sketch(some, BANDS, ROWS)[1] for some in batches(texts, 250_000)])
    return set(map(tuple, candidate_pairs(keys).tolist()))


def datasketch(texts: list[str]) -> set[tuple[int, int]]:
    import xxhash
    from datasketch import MinHash, MinHashLSH

    lsh, pairs = MinHashLSH(num_perm=128, params=(BANDS, ROWS)), set()
    empty = MinHash(num_perm=128, hashfunc=xxhash.xxh32_intdigest)
    for index, text in enumerate(texts):
        kept = text.lower().translate(NO_LETTERS)
        found = empty.copy()
        found.update_batch(
            [gram.encode() for gram in {kept[i : i + 5] for i in range(max(len(kept) - 4, 1))}]
        )
        pairs.update((earlier, index) for earlier in lsh.query(found))
        lsh.insert(index, found)
    return pairs


def clusters(texts: list[str]) -> set[tuple[int, int]]:
    return {(group[0], other) for group in find_clusters(texts, THRESHOLD) for other in group[1:]}


SIDES = {f.__name__: f for f in (nanophi, datasketch, clusters)}


def memory_gb(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024 / 1e9


def work(name: str, path: str) -> None:
    """One side's run, in a process of its own; the pairs go to path.out."""
    texts = pickle.loads(Path(path).read_bytes())
    find_clusters(["tables of letters, ready before the clock starts"])
    NO_LETTERS.update(
        {ord(char): None for char in set("".join(texts)) if not len(letters([char])[0])}
    )
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text(
        "5"
    )  # what loading took is given back, and its peak forgotten
    before = memory_gb("VmRSS")
    started = time.perf_counter()
    pairs = SIDES[name](texts)
    print(
        json.dumps(
            {"seconds": time.perf_counter() - started, "gb": max(memory_gb("VmHWM") - before, 0)}
        )
    )
    Path(f"{path}.out").write_bytes(pickle.dumps(pairs))


def timed(name: str, texts: list[str], folder: str) -> tuple[dict, set[tuple[int, int]]]:
    path = Path(folder) / "texts"
    path.write_bytes(pickle.dumps(texts))
    core = max(os.sched_getaffinity(0))
    done = subprocess.run(
        [sys.executable, __file__, "--work", name, str(path)], check=True, capture_output=True, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"}, preexec_fn=lambda: os.sched_setaffinity(0, [core]),
    )  # fmt: skip
    return json.loads(done.stdout), pickle.loads(Path(f"{path}.out").read_bytes())


def changed(text: str, rng: random.Random) -> str:
    """A copy with up to 4 % of the characters replaced or dropped, now and then a part of it moved to the end."""
    rate = rng.uniform(0, 0.04)
    chars = [
        c if rng.random() > rate else rng.choice(["", text[rng.randrange(len(text))]]) for c in text
    ]
    if rng.random() < 0.2:
        at = rng.randrange(len(chars))
        chars = chars[at:] + chars[:at]
    return "".join(chars)


def main(cfg: Config) -> None:
    rng = random.Random(cfg.seed)
    everything = list(read_texts(cfg.input))
    rng.shuffle(everything)
    texts = everything[: cfg.documents]
    originals = rng.sample(range(len(texts)), cfg.planted)
    texts = texts + [changed(texts[i], rng) for i in originals]
    sets = {i: shingle_set(texts[i]) for i in [*originals, *range(cfg.documents, len(texts))]}
    true = {
        (i, cfg.documents + k): jaccard(sets[i], sets[cfg.documents + k])
        for k, i in enumerate(originals)
    }
    print(
        f"\n{len(texts):,} documents, {sum(map(len, texts)):,} characters, one core, medians of {cfg.repeats}\n"
    )
    print(
        "| side | seconds | MB more | candidates | recall at 0.80 | at 0.85 | of true pairs of the other |"
    )
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        runs = [
            {name: timed(name, texts, folder) for name in ("nanophi", "datasketch")}
            for _ in range(cfg.repeats)
        ]
        found = {name: runs[0][name][1] for name in runs[0]}
        for name, other in (("nanophi", "datasketch"), ("datasketch", "nanophi")):
            seconds = statistics.median(one[name][0]["seconds"] for one in runs)
            gb = max(one[name][0]["gb"] for one in runs)
            recalls = []
            for limit in (THRESHOLD, THRESHOLD + 0.05):
                similar = [pair for pair, value in true.items() if value >= limit]
                recalls.append(f"{sum(pair in found[name] for pair in similar) / len(similar):.4f}")
            real = [pair for pair in found[other] if similarity(texts, sets, pair) >= THRESHOLD]
            share = sum(pair in found[name] for pair in real) / len(real)
            cells = [
                f"{seconds:.1f}",
                f"{1000 * gb:.0f}",
                f"{len(found[name]):,}",
                *recalls,
                f"{share:.4f}",
            ]
            print(f"| {name} | {' | '.join(cells)} |", flush=True)
        print(
            "\n| documents | characters | seconds, text to clusters | MB more | dropped | by way of others |"
        )
        print("|---|---|---|---|---|---|")
        for size in cfg.growth:
            some = everything[: size or len(everything)]
            measured, pairs = timed("clusters", some, folder)
            sets = {}
            low = sum(similarity(some, sets, pair) < THRESHOLD for pair in pairs)
            print(
                f"| {len(some):,} | {sum(map(len, some)):,} | {measured['seconds']:.1f} | {1000 * measured['gb']:.0f} "
                f"| {len(pairs):,} | {low:,} |",
                flush=True,
            )


def similarity(texts: list[str], sets: dict, pair: tuple[int, int]) -> float:
    for i in pair:
        if i not in sets:
            sets[i] = shingle_set(texts[i])
    return jaccard(sets[pair[0]], sets[pair[1]])


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        work(sys.argv[2], sys.argv[3])
    else:
        run_command(Config, main)
