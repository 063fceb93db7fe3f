"""Token shards: clean documents as token ids on disk, memory-mapped when read.

    python -m nanophi.text.shards --input clean.jsonl --tokenizer out/tokenizer --out out/tokens

A shard is one file, little-endian:

    64 bytes    header: magic "nanophi\\0", version, bytes per token (2 or 4), tokens, documents, CRC-32 of the tokens,
                fingerprint of the tokenizer
    tokens      uint16 or uint32; every document ends in [EOS]
    offsets     uint64, documents + 1: document i is tokens[offsets[i] : offsets[i + 1]]

`train-00000.bin ...` and `val-00000.bin ...`: which of the two a document goes to depends on nothing but its text, so
that it stays out of training however the corpus is ordered or grows.
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
from pathlib import Path

import numpy as np

from nanophi.cli import Progress, UserError, flag, run_command
from nanophi.parallel import batches, ordered
from nanophi.text.corpus import Reading, Skipped
from nanophi.text.schemas import text_of
from nanophi.text.share import in_share
from nanophi.tokenizer.tokenizer import Tokenizer

MAGIC, VERSION = b"nanophi\0", 1
HEADER = struct.Struct("<8sIIQQI16s12x")  # 64 bytes


class ShardWriter:
    """Writes documents into `{split}-{number}.bin`, a new one whenever `shard_tokens` are together. Tokens go to the
    disk as they come; the header, which counts them, at last."""

    def __init__(self, directory: Path, split: str, tok: Tokenizer, shard_tokens: int):
        self.directory, self.split, self.tok, self.shard_tokens = (
            directory,
            split,
            tok,
            shard_tokens,
        )
        self.dtype = np.dtype("<u2" if len(tok) <= 1 << 16 else "<u4")
        self.number, self.tokens, self.documents = 0, 0, 0
        self._file, self._crc, self._offsets = None, 0, array("Q", [0])

    def add(self, ids: np.ndarray) -> None:
        if self._file is None:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._file = open(self.directory / f"{self.split}-{self.number:05d}.bin", "wb")  # noqa: SIM115 - `close` does
            self._file.write(bytes(HEADER.size))
        raw = np.append(ids, self.tok.eos_id).astype(self.dtype).tobytes()
        self._file.write(raw)
        self._crc = zlib.crc32(raw, self._crc)
        self._offsets.append(self._offsets[-1] + len(ids) + 1)
        if self._offsets[-1] >= self.shard_tokens:
            self.close()

    def abandon(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):  # a full disk refuses the rest once more
                self._file.close()

    def close(self) -> None:
        """Finish the open shard, if there is one."""
        if self._file is None:
            return
        tokens, documents = self._offsets[-1], len(self._offsets) - 1
        with self._file as file:
            file.write(np.array(self._offsets, dtype="<u8").tobytes())
            file.seek(0)
            sizes = (self.dtype.itemsize, tokens, documents, self._crc)
            file.write(HEADER.pack(MAGIC, VERSION, *sizes, self.tok.fingerprint.encode()))
            file.flush()
            os.fsync(file.fileno())
        self.number, self.tokens, self.documents = (
            self.number + 1,
            self.tokens + tokens,
            self.documents + documents,
        )
        self._file, self._crc, self._offsets = None, 0, array("Q", [0])


class Shard:
    """One file, memory-mapped: `shard[i]` is document i, a view of its ids."""

    def __init__(self, path: Path):
        size = path.stat().st_size
        with open(path, "rb") as file:
            header = file.read(HEADER.size)
        if len(header) < HEADER.size or not header.startswith(MAGIC):
            raise UserError(
                f"{path} is no token shard; python -m nanophi.text.shards --out {path.parent} writes them"
            )
        _, version, itemsize, tokens, documents, self.crc, fingerprint = HEADER.unpack(header)
        if version != VERSION:
            raise UserError(
                f"{path} is a shard of version {version}, this code reads {VERSION}: write it again"
            )
        if size != HEADER.size + tokens * itemsize + (documents + 1) * 8:
            raise UserError(f"{path} is cut short or damaged: {size:,} bytes; write it again")
        self.fingerprint = fingerprint.decode()
        self.tokens = np.memmap(
            path, dtype=f"<u{itemsize}", mode="r", offset=HEADER.size, shape=(tokens,)
        )
        end = HEADER.size + tokens * itemsize
        self.offsets = np.memmap(path, dtype="<u8", mode="r", offset=end, shape=(documents + 1,))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]


class TokenSet:
    """All documents of one split of a shard directory: `len(set)`, `set[i]`, `set.lengths`."""

    def __init__(self, directory: str | Path, split: str, tok: Tokenizer | None = None):
        self.shards = [Shard(path) for path in sorted(Path(directory).glob(f"{split}-*.bin"))]
        if not self.shards and split == "train":
            raise UserError(
                f"no token shards in {directory}; python -m nanophi.text.shards --out {directory} writes them"
            )
        for shard in self.shards:
            if tok is not None and shard.fingerprint != tok.fingerprint:
                raise UserError(
                    f"the shards in {directory} were made with another tokenizer ({shard.fingerprint}, this one is "
                    f"{tok.fingerprint}); python -m nanophi.text.shards --out {directory} makes them again"
                )
        counts = [len(shard) for shard in self.shards]
        self.starts = np.cumsum([0, *counts])
        lengths = [np.diff(shard.offsets.astype(np.int64)) for shard in self.shards]
        self.lengths = np.concatenate(lengths) if lengths else np.zeros(0, dtype=np.int64)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, index: int) -> np.ndarray:
        which = int(np.searchsorted(self.starts, index, side="right")) - 1
        return self.shards[which][index - int(self.starts[which])]

    @property
    def data_id(self) -> str:
        """Names the tokens: changes when any of them does."""
        return "-".join(f"{len(shard.tokens)}.{shard.crc:08x}" for shard in self.shards)


def _encode(texts: list[str], tok: Tokenizer, val_fraction: float) -> list[tuple[str, np.ndarray]]:
    """(split, ids) of each text: the work of one process on a batch. The split is a function of the text alone."""
    splits = ("val" if in_share(text, val_fraction) else "train" for text in texts)
    return list(zip(splits, tok.encode_stream(texts), strict=True))


def write_shards(
    texts: Iterable[str],
    tok: Tokenizer,
    directory: str | Path,
    val_fraction: float,
    shard_tokens: int = 100_000_000,
    workers: int = 1,
) -> dict[str, ShardWriter]:
    """Encode documents into a shard directory; returns the writers of "train" and "val", with their counts.

    Shards already there are replaced as a set, once the new ones are complete.
    """
    directory = Path(directory)
    fresh = directory / "new.tmp"
    if fresh.exists():
        shutil.rmtree(fresh)
    writers = {split: ShardWriter(fresh, split, tok, shard_tokens) for split in ("train", "val")}
    try:
        for encoded in ordered(
            partial(_encode, tok=tok, val_fraction=val_fraction), batches(texts, 500_000), workers
        ):
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
    names = {new.name for new in fresh.iterdir()}
    for name in names:
        os.replace(fresh / name, directory / name)
    for split in writers:
        for old in directory.glob(f"{split}-[0-9]*.bin"):
            if old.name not in names:
                old.unlink()
    fresh.rmdir()
    return writers


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


def main(cfg: Config) -> dict:
    """Encode; returns the counts it prints."""
    tok = Tokenizer.load(cfg.tokenizer)
    read, skipped = {"characters": 0, "bytes": 0}, Skipped()

    def counted() -> Iterator[str]:
        with Progress("documents", None) as bar:
            for text in cfg.rows(skipped, text_of):
                read["characters"] += len(text)
                read["bytes"] += len(text.encode("utf-8", "surrogatepass"))
                yield text
                bar.update()

    writers = write_shards(counted(), tok, cfg.out, cfg.val_fraction, workers=cfg.workers)
    train, val = writers["train"], writers["val"]
    documents, tokens = train.documents + val.documents, train.tokens + val.tokens
    print(
        f"{skipped}shards: {documents:,} documents, {skipped.count:,} bad rows skipped, "
        f"{read['characters']:,} characters -> {tokens:,} tokens "
        f"({read['characters'] / tokens:.2f} characters, {read['bytes'] / tokens:.2f} bytes each); "
        f"{train.tokens:,} to train on, {val.tokens:,} for validation, in {cfg.out}"
    )
    return read | {
        "skipped": skipped.count,
        "tokens": tokens,
        "train_tokens": train.tokens,
        "val_tokens": val.tokens,
    }


if __name__ == "__main__":
    run_command(Config, main)
