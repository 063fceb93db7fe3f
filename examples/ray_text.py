"""Text at scale, on Ray Data: files become the shards that pretrain.py reads.

    pip install "ray[data]"
    python examples/ray_text.py --input raw/ --tokenizer out/tokenizer --out out/tokens --workers 8

The shards are, byte for byte and with any number of workers, those of these two commands:

    python -m nanophi.text.clean  --input raw/ --out clean.jsonl --dedup
    python -m nanophi.text.shards --input clean.jsonl --tokenizer out/tokenizer --out out/tokens

Each step is a function from a table to a table, and the workers apply it to many tables at once:

    read        files        documents, cleaned; with number, digest and band keys
    repeated    digests      drop: documents with the digest of an earlier one
    banded      documents    the keys of the others, a row for each band
    paired      keys         candidates: two documents with the same key
    grouped     documents    the candidates
    compared    candidates   drop: dedup.py reads the texts and decides
    encoded     documents    the ids of those that stay, in the order of the files

The driver alone links candidates to groups, because a chain of them may reach from end to end of
the input; it holds their numbers for that, and no text. And it alone writes the shards. A file is
the smallest piece of work: `python -m nanophi.text.corpus --rows-per-file` cuts a large one.

Ray's own work takes half a minute, whatever the input. On two cores the two commands were sooner
with 20 MB and with 100 MB. Ray's workers give way to all other programs (niceness 15): beside one
that keeps a core busy they get a thirtieth of it, and seem to hang. RAY_worker_niceness=0 in the
environment gives them an equal share.
"""

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # nanophi need not be installed

import numpy as np
import pyarrow as pa
import ray

from nanophi.claims import Output, claim
from nanophi.cli import UserError, flag, run_command
from nanophi.files import MODEL_NAMES
from nanophi.parallel import batches
from nanophi.text import clean, dedup, shards
from nanophi.text.corpus import Reading, Skipped
from nanophi.text.schemas import text_of, with_texts
from nanophi.text.share import in_share
from nanophi.tokenizer.tokenizer import Tokenizer

NUMBER = "number of the document"  # a key that no row of the input has
PARTS = 16  # what is compared is cut by a hash into parts, so that each fits into a worker
BLOCKS = {"batch_size": None, "batch_format": "pyarrow"}  # what was read of one file, as it is


@dataclass(kw_only=True)
class Config(Reading):
    tokenizer: str = flag(help="directory of train_tokenizer.py")
    out: str = flag(help="directory for the shards")
    val_fraction: float = flag(0.01, at_least=0, at_most=0.9, help="share kept for validation")
    threshold: float = flag(0.8, above=0.3, at_most=1, help="similarity of duplicates")
    workers: int | None = flag(None, at_least=1, help="processes (default: one for each core)")


def main(cfg: Config) -> None:
    inputs = [os.path.abspath(path) for path in cfg.files(cfg.out)]
    with claim(inputs, Output("--out", cfg.out, folder=True, foreign=tuple(MODEL_NAMES))):
        if not ray.is_initialized():
            start(cfg.workers)
        ray.data.DataContext.get_current().execution_options.preserve_order = True
        files = [pa.table({"file": [i], "path": [path]}) for i, path in enumerate(inputs)]
        documents = mapped(ray.data.from_arrow(files), read, cfg=cfg).materialize()
        if not documents.count():
            raise UserError(f"{', '.join(cfg.input)}: no document is left to train on")
        dropped = duplicates(documents, cfg.threshold)
        tokens = write(cfg, documents, dropped)
    read_and_dropped = f"{documents.count():,} documents, {len(dropped):,} duplicates dropped"
    print(f"ray_text: {read_and_dropped}, {tokens:,} tokens in {cfg.out}")


def start(workers: int | None) -> None:
    """A Ray of our own, or the one that RAY_ADDRESS or `ray start` has left the address of."""
    here = {"env_vars": {"PYTHONPATH": str(ROOT)}}
    try:
        ray.init(num_cpus=workers, include_dashboard=False, runtime_env=here)
    except ValueError as error:
        if workers is None:
            raise
        raise UserError(
            f"--workers {workers} is for a Ray of our own, and there is one already (RAY_ADDRESS "
            f"or `ray start`): leave --workers out, or stop that Ray. Ray said: {error}"
        ) from None


def mapped(data: ray.data.Dataset, work: Callable, **how) -> ray.data.Dataset:
    return data.map_batches(work, fn_kwargs=how, **BLOCKS)


def read(files: pa.Table, cfg: Config) -> Iterator[pa.Table]:
    rules = clean.Config(input=cfg.input, out=cfg.out)
    shape = dedup.bands_and_rows(cfg.threshold)
    for file, path in zip(*files.to_pydict().values(), strict=True):
        skipped = Skipped()
        rows = enumerate(cfg.rows(skipped, with_texts, [path]), start=file << 32)
        numbered = (row | {NUMBER: number} for number, row in rows)
        for batch in batches(numbered, clean.BATCH, lambda row: len(text_of(row))):
            kept, _, _ = clean.clean_rows(batch, rules)
            if kept:
                texts = [text_of(row) for row in kept]
                digests, keys = dedup.sketch(texts, *shape)
                columns = {"number": [row[NUMBER] for row in kept], "text": texts}
                columns |= {"digest": digests, "keys": [key.tobytes() for key in keys]}
                yield pa.table(columns | {"part": [digest[0] % PARTS for digest in digests]})
        print(skipped, end="")  # on the driver, by Ray


# ---- duplicates


def duplicates(documents: ray.data.Dataset, threshold: float) -> np.ndarray:
    """The numbers of the documents to drop."""
    digests = documents.select_columns(["number", "part", "digest"])
    (repeats,) = by_part(digests, ["number"], repeated)
    keys = mapped(documents, banded, repeats=repeats, bands=dedup.bands_and_rows(threshold)[0])
    pairs = np.unique(np.stack(by_part(keys, ["earlier", "later"], paired), axis=1), axis=0)
    if not len(pairs):
        return repeats
    numbers, groups = linked(pairs)
    candidates = mapped(documents, grouped, numbers=numbers, parts=groups % PARTS)
    (similar,) = by_part(candidates, ["number"], compared, pairs=pairs, threshold=threshold)
    return np.concatenate([repeats, similar])


def by_part(data: ray.data.Dataset, names: list[str], work: Callable, **how) -> list[np.ndarray]:
    """Columns of work(rows, **how), for all rows with one "part", in the order of the documents."""

    def in_order(rows: pa.Table) -> pa.Table:
        return work(rows.sort_by("number"), **how)

    groups = data.groupby("part", num_partitions=PARTS)
    tables = list(groups.map_groups(in_order, batch_format="pyarrow").iter_batches(**BLOCKS))
    none = np.zeros(0, np.int64)
    return [np.concatenate([none, *(rows[name].to_numpy() for rows in tables)]) for name in names]


def repeated(rows: pa.Table) -> pa.Table:
    digests = np.frombuffer(b"".join(rows["digest"].to_pylist()), "V16")
    _, firsts = np.unique(digests, return_index=True)
    return pa.table({"number": np.delete(rows["number"].to_numpy(), firsts)})


def without(documents: pa.Table, dropped: np.ndarray) -> pa.Table:
    return documents.filter(~np.isin(documents["number"], dropped))


def banded(documents: pa.Table, repeats: np.ndarray, bands: int) -> pa.Table:
    firsts = without(documents, repeats)
    keys = np.frombuffer(b"".join(firsts["keys"].to_pylist()), np.uint64).reshape(-1, bands)
    part = np.arange(bands, dtype=np.uint64) * PARTS + keys % PARTS  # equal keys share a part
    number = np.repeat(firsts["number"].to_numpy(), bands)
    return pa.table({"number": number, "part": part.ravel(), "key": keys.ravel()})


def paired(rows: pa.Table) -> pa.Table:
    numbers = rows["number"].to_numpy()
    pairs = numbers[dedup.candidate_pairs(rows["key"].to_numpy()[:, None])]
    return pa.table({"earlier": pairs[:, 0], "later": pairs[:, 1]})


def linked(pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(the numbers in the pairs, the group of each); a chain of pairs is one group."""
    numbers, ends = np.unique(pairs, return_inverse=True)
    earlier, later = ends.reshape(-1, 2).T
    groups = np.arange(len(numbers))
    while (groups[earlier] != groups[later]).any():
        least = np.minimum(groups[earlier], groups[later])
        np.minimum.at(groups, earlier, least)
        np.minimum.at(groups, later, least)
        groups = groups[groups]
    return numbers, groups


def grouped(documents: pa.Table, numbers: np.ndarray, parts: np.ndarray) -> pa.Table:
    found = documents.filter(np.isin(documents["number"], numbers)).select(["number", "text"])
    return found.append_column("part", [parts[np.searchsorted(numbers, found["number"])]])


def compared(rows: pa.Table, pairs: np.ndarray, threshold: float) -> pa.Table:
    numbers = rows["number"].to_numpy()
    places = np.searchsorted(numbers, pairs[np.isin(pairs[:, 0], numbers)])
    parent = np.arange(len(numbers))
    dedup.join_similar(rows["text"].to_pylist(), places, threshold, parent)
    return pa.table({"number": numbers[parent != np.arange(len(numbers))]})


# ---- shards


def encoded(documents: pa.Table, cfg: Config, dropped: np.ndarray) -> pa.Table:
    tok = Tokenizer.load(cfg.tokenizer)
    texts = without(documents, dropped)["text"].to_pylist()
    is_val = pa.array([in_share(text, cfg.val_fraction) for text in texts], pa.bool_())
    ids = pa.array(list(tok.encode_stream(texts)), pa.list_(pa.int32()))
    return pa.table({"is_val": is_val, "ids": ids})


def write(cfg: Config, documents: ray.data.Dataset, dropped: np.ndarray) -> int:
    """Write the shards; returns the tokens in them."""

    def each() -> Iterator[tuple[str, np.ndarray]]:
        for block in mapped(documents, encoded, cfg=cfg, dropped=dropped).iter_batches(**BLOCKS):
            for is_val, ids in zip(block["is_val"].to_pylist(), block["ids"], strict=True):
                yield "val" if is_val else "train", ids.values.to_numpy()

    writers = shards.write_encoded(each(), Tokenizer.load(cfg.tokenizer), cfg.out)
    return sum(writer.tokens for writer in writers.values())


if __name__ == "__main__":
    run_command(Config, main)
