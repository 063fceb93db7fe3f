"""Token shards: clean documents as token ids on disk, memory-mapped when they are read.

    python -m nanophi.text.shards --input clean.jsonl --tokenizer out/tokenizer --out out/tokens

A shard is one file, little-endian:

    64 bytes    header, see HEADER
    tokens      uint16 or uint32; every document ends in [EOS]
    offsets     uint64, documents + 1: document i is tokens[offsets[i] : offsets[i + 1]]

Two documents, [5, 6] and [7], with the id 2 for [EOS]:

    tokens      5 6 2 7 2
    offsets     0     3   5

The files are `train-00000.bin ...` and `val-00000.bin ...`. Which of the two a document goes to
depends on nothing but its text. So it stays out of training however the corpus is ordered or grows.

To read this file: the format, ShardWriter writes it, Shard and TokenSet read it, `write_shards`
makes a directory of shards, `main` is the command.
"""

import contextlib
import os
import shutil
import struct
import zlib
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import BinaryIO

import numpy as np

from nanophi.claims import Output, claim
from nanophi.cli import Progress, UserError, flag, run_command
from nanophi.files import MODEL_NAMES, finish, together
from nanophi.parallel import batches, ordered
from nanophi.text.corpus import Reading, Skipped
from nanophi.text.schemas import text_of
from nanophi.text.share import in_share
from nanophi.tokenizer.tokenizer import Tokenizer

# ---- the format

MAGIC = b"nanophi\0"
VERSION = 2
HEADER = struct.Struct(  # 64 bytes
    "<"
    "8s"  # MAGIC
    "I"  # VERSION
    "I"  # bytes of a token, 2 or 4
    "Q"  # tokens
    "Q"  # documents
    "I"  # CRC-32 of the tokens
    "16s"  # fingerprint of the tokenizer
    "I"  # CRC-32 of the offsets
    "I"  # CRC-32 of all that stands before it in the header
    "4x"  # zeros
)
BEFORE_CRC = HEADER.size - 8  # bytes of the header that its own CRC-32 covers
SHARD_TOKENS = 100_000_000  # after which a new shard begins
COMMAND = "python -m nanophi.text.shards"  # what error messages advise


# ---- writing


class ShardWriter:
    """Writes documents into `{split}-00000.bin`, and goes on to the next file whenever one has
    `shard_tokens` tokens.

    Tokens go to the disk as they come. The header, which counts them, is written at last.

    number: how many shards are finished; tokens, documents: what they hold, [EOS] included
    """

    def __init__(self, directory: Path, split: str, tok: Tokenizer, shard_tokens: int):
        self.directory = directory
        self.split = split
        self.tok = tok
        self.shard_tokens = shard_tokens
        self.dtype = np.dtype("<u2" if len(tok) <= 1 << 16 else "<u4")
        self.number = 0
        self.tokens = 0
        self.documents = 0
        self._begin()

    def _begin(self) -> None:
        """Forget the shard before; the next one's file is opened with its first document."""
        self._file: BinaryIO | None = None  # of the open shard
        self._crc = 0  # of its tokens so far
        self._offsets = array("Q", [0])  # of its documents so far

    def add(self, ids: np.ndarray) -> None:
        """Write a document. ids: (tokens,), without [EOS], which is appended here."""
        if self._file is None:
            self.directory.mkdir(parents=True, exist_ok=True)
            path = self.directory / f"{self.split}-{self.number:05d}.bin"
            self._file = open(path, "wb")  # noqa: SIM115 - `close` closes it
            self._file.write(bytes(HEADER.size))
        raw = np.append(ids, self.tok.eos_id).astype(self.dtype).tobytes()
        self._file.write(raw)
        self._crc = zlib.crc32(raw, self._crc)
        self._offsets.append(self._offsets[-1] + len(ids) + 1)
        if self._offsets[-1] >= self.shard_tokens:
            self.close()

    def close(self) -> None:
        """Finish the open shard, if there is one."""
        if self._file is None:
            return
        tokens = self._offsets[-1]
        documents = len(self._offsets) - 1
        offsets = np.array(self._offsets, dtype="<u8").tobytes()
        fingerprint = self.tok.fingerprint.encode()
        sizes = (self.dtype.itemsize, tokens, documents)
        fields = (MAGIC, VERSION, *sizes, self._crc, fingerprint, zlib.crc32(offsets))
        own_crc = zlib.crc32(HEADER.pack(*fields, 0)[:BEFORE_CRC])
        with self._file as file:
            file.write(offsets)
            file.seek(0)
            file.write(HEADER.pack(*fields, own_crc))
            file.flush()
            os.fsync(file.fileno())
        self.number += 1
        self.tokens += tokens
        self.documents += documents
        self._begin()

    def abandon(self) -> None:
        """Close the open file as it is, after an error."""
        if self._file is not None:
            with contextlib.suppress(OSError):  # a full disk refuses the last bytes once more
                self._file.close()


# ---- reading


class Shard:
    """One file, memory-mapped: `shard[i]` is document i, a view of its ids with [EOS].

    tokens: (tokens,) uint16 or uint32; offsets: (documents + 1,) uint64; crc: CRC-32 of the tokens;
    fingerprint: of the tokenizer that made it
    """

    def __init__(self, path: Path):
        self.path = path
        size = path.stat().st_size
        with open(path, "rb") as file:
            header = file.read(HEADER.size)
        if len(header) < HEADER.size or not header.startswith(MAGIC):
            raise UserError(f"{path} is no token shard; {COMMAND} --out {path.parent} writes them")
        _, version, itemsize, tokens, documents, *crcs_and_name = HEADER.unpack(header)
        self.crc, fingerprint, self.offsets_crc, own_crc = crcs_and_name
        if version != VERSION:
            raise UserError(
                f"{path} is a shard of version {version}, this code reads {VERSION}: write it "
                f"again with {COMMAND}"
            )
        if own_crc != zlib.crc32(header[:BEFORE_CRC]) or any(header[BEFORE_CRC + 4 :]):
            raise self._damaged("its header has another checksum than it says")
        if itemsize not in (2, 4) or not tokens or not documents:
            raise self._damaged(f"{tokens} tokens of {itemsize} bytes in {documents} documents")
        self.fingerprint: str = fingerprint.decode("ascii", "replace")
        end_of_tokens = HEADER.size + tokens * itemsize
        if size != end_of_tokens + (documents + 1) * 8:
            raise self._damaged(f"it has {size:,} bytes, which is not what its header says")
        self.tokens = np.memmap(
            path, dtype=f"<u{itemsize}", mode="r", offset=HEADER.size, shape=(tokens,)
        )
        self.offsets = np.memmap(
            path, dtype="<u8", mode="r", offset=end_of_tokens, shape=(documents + 1,)
        )

    def check(self, vocabulary: int | None = None) -> None:
        """Read all of it, and refuse it if a bit has changed since it was written.

        vocabulary: the tokenizer's; every id must be in it
        """
        if zlib.crc32(self.offsets.data) != self.offsets_crc:
            raise self._damaged("its offsets have another checksum than its header says")
        if zlib.crc32(self.tokens.data) != self.crc:
            raise self._damaged("its tokens have another checksum than its header says")
        ends = self.offsets.astype(np.int64)
        if ends[0] != 0 or ends[-1] != len(self.tokens) or np.diff(ends).min() < 1:
            raise self._damaged("its offsets do not cut its tokens into documents")
        if vocabulary is not None and int(self.tokens.max()) >= vocabulary:
            raise UserError(
                f"{self.path} holds the id {self.tokens.max()}, the tokenizer has {vocabulary:,} "
                f"tokens; {COMMAND} --out {self.path.parent} writes it again"
            )

    def _damaged(self, reason: str) -> UserError:
        return UserError(
            f"{self.path} is cut short or damaged: {reason}; {COMMAND} --out {self.path.parent} "
            "writes it again"
        )

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]

    def __repr__(self) -> str:
        return f"Shard({len(self):,} documents, {len(self.tokens):,} tokens, {self.path})"


class TokenSet:
    """All documents of one split of a shard directory, in order: `len(tokens)`, `tokens[i]`.

    split: "train" or "val"; a directory without shards of "val" gives an empty set
    tok: if given, shards that another tokenizer made are a UserError
    lengths: (documents,) int64, tokens of each document with [EOS]
    """

    def __init__(self, directory: str | Path, split: str, tok: Tokenizer | None = None):
        self.directory = Path(directory)
        self.split = split
        finish(directory)
        self.shards = [Shard(path) for path in sorted(self.directory.glob(f"{split}-*.bin"))]
        if not self.shards and split == "train":
            raise UserError(
                f"no token shards in {directory}; {COMMAND} --out {directory} writes them"
            )
        for shard in self.shards:
            if tok is not None and shard.fingerprint != tok.fingerprint:
                raise UserError(
                    f"the shards in {directory} were made with another tokenizer "
                    f"({shard.fingerprint}, this one is {tok.fingerprint}); "
                    f"{COMMAND} --out {directory} makes them again"
                )
            shard.check(None if tok is None else len(tok))
        # (shards + 1,): the number of the first document of each shard, and the count of all.
        self.starts = np.cumsum([0, *(len(shard) for shard in self.shards)])
        lengths = [np.diff(shard.offsets.astype(np.int64)) for shard in self.shards]
        self.lengths = np.concatenate([np.zeros(0, dtype=np.int64), *lengths])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, index: int) -> np.ndarray:
        number = int(np.searchsorted(self.starts, index, side="right")) - 1  # of the shard
        return self.shards[number][index - int(self.starts[number])]

    def __repr__(self) -> str:
        tokens = sum(len(shard.tokens) for shard in self.shards)
        return (
            f"TokenSet({self.split}, {len(self):,} documents, {tokens:,} tokens, {self.directory})"
        )

    @property
    def data_id(self) -> str:
        """Names the tokens: changes when any of them does."""
        return "-".join(f"{len(shard.tokens)}.{shard.crc:08x}" for shard in self.shards)


# ---- from texts to a directory of shards


def write_shards(
    texts: Iterable[str],
    tok: Tokenizer,
    directory: str | Path,
    val_fraction: float,
    shard_tokens: int = SHARD_TOKENS,
    workers: int = 1,
) -> dict[str, ShardWriter]:
    """Encode documents into a shard directory, as `write_encoded` does with ids.

    val_fraction: share of the documents that go to "val"
    workers: processes that encode; the shards are the same with any number
    """
    work = partial(_encode, tok=tok, val_fraction=val_fraction)
    encoded = chain.from_iterable(ordered(work, batches(texts, 500_000), workers))
    return write_encoded(encoded, tok, directory, shard_tokens)


def write_encoded(
    encoded: Iterable[tuple[str, np.ndarray]],
    tok: Tokenizer,
    directory: str | Path,
    shard_tokens: int = SHARD_TOKENS,
) -> dict[str, ShardWriter]:
    """Write documents into a shard directory; returns the writers of "train" and "val", with their
    counts.

    encoded: "train" or "val" and the ids of each document, without [EOS]
    shard_tokens: a shard ends with the document that makes it this long

    Shards that are there already are replaced together, when all new ones are complete. An error
    before that leaves the old ones as they were.
    """
    directory = Path(directory)
    fresh = directory / "new.tmp"
    if fresh.exists():
        shutil.rmtree(fresh)
    writers = {split: ShardWriter(fresh, split, tok, shard_tokens) for split in ("train", "val")}
    try:
        for split, ids in encoded:
            writers[split].add(ids)
        for writer in writers.values():
            writer.close()
        if not writers["train"].documents:
            raise UserError(
                "there is no document to train on: the input is empty, or all of it is validation"
            )
    except BaseException:
        for writer in writers.values():
            writer.abandon()
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    _replace_shards(directory, fresh)
    return writers


def _encode(texts: list[str], tok: Tokenizer, val_fraction: float) -> list[tuple[str, np.ndarray]]:
    """(split, ids) of each text: the work of one process on a batch. The split depends on the text
    alone."""
    splits = ["val" if in_share(text, val_fraction) else "train" for text in texts]
    return list(zip(splits, tok.encode_stream(texts), strict=True))


def _replace_shards(directory: Path, fresh: Path) -> None:
    """Move the new shards from `fresh` into the directory, and delete old ones beyond them."""
    new = {path.name for path in fresh.iterdir()}
    with together(directory) as files:
        for name in new:
            files.rename(fresh / name, directory / name)
        for split in ("train", "val"):
            for old in directory.glob(f"{split}-[0-9]*.bin"):
                if old.name not in new:
                    files.delete(old)
    fresh.rmdir()


# ---- the command


@dataclass(kw_only=True)
class Config(Reading):
    tokenizer: str = flag(help="directory of train_tokenizer.py")
    out: str = flag(help="directory for the shards")
    val_fraction: float = flag(
        0.01, at_least=0, at_most=0.9, help="share of documents kept for validation"
    )
    workers: int = flag(
        1, at_least=1, help="processes that encode; the shards are the same with any number"
    )


def main(cfg: Config) -> dict[str, int]:
    """Encode; returns the counts it prints."""
    out = Output("--out", cfg.out, folder=True, foreign=tuple(MODEL_NAMES))
    inputs = cfg.files(cfg.out)
    with claim(inputs, out):
        return encode(cfg, inputs)


def encode(cfg: Config, inputs: list[Path]) -> dict[str, int]:
    """Encode the inputs into --out, which has been claimed."""
    tok = Tokenizer.load(cfg.tokenizer)
    counts = {"characters": 0, "bytes": 0}
    skipped = Skipped()

    def texts() -> Iterator[str]:
        with Progress("documents", None) as bar:
            for text in cfg.rows(skipped, text_of, inputs):
                counts["characters"] += len(text)
                counts["bytes"] += len(text.encode("utf-8", "surrogatepass"))
                yield text
                bar.update()

    writers = write_shards(texts(), tok, cfg.out, cfg.val_fraction, workers=cfg.workers)
    train = writers["train"]
    val = writers["val"]
    documents = train.documents + val.documents
    tokens = train.tokens + val.tokens
    characters_per_token = counts["characters"] / tokens
    bytes_per_token = counts["bytes"] / tokens
    print(
        f"{skipped}shards: {documents:,} documents, {skipped.count:,} bad rows skipped, "
        f"{counts['characters']:,} characters -> {tokens:,} tokens "
        f"({characters_per_token:.2f} characters, {bytes_per_token:.2f} bytes each); "
        f"{train.tokens:,} to train on, {val.tokens:,} for validation, in {cfg.out}"
    )
    return counts | {
        "skipped": skipped.count,
        "tokens": tokens,
        "train_tokens": train.tokens,
        "val_tokens": val.tokens,
    }


if __name__ == "__main__":
    run_command(Config, main)
