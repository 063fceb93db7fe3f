"""Files to rows: .jsonl .json .csv .parquet .txt and wiki extracts, plain or compressed.

    .jsonl  one object a line       .csv      a header, then a row a line     .txt     a line, paragraph or file each
    .json   one array of objects    .parquet  a table (needs pyarrow)         wiki_00  what WikiExtractor writes

Everything streams: memory does not grow with the file (a parquet file's own row groups and the longest line apart).
Text is UTF-8, with or without a byte-order mark, UTF-16 with one, or GB18030, which is recognised and said so.

A reader yields (where, make): where the row stands, for messages, and what makes it, which may raise a UserError.
"""

import bz2
import csv
import gzip
import io
import json
import lzma
import re
import shutil
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any, Literal

from nanophi.cli import UserError

SampleBy = Literal["line", "paragraph", "document"]
Rows = Iterator[tuple[str, Callable[[], Any]]]
CHUNK = 1 << 16  # bytes or characters read at once
WIKI_NAME = re.compile(r"wiki_\d+")


def _zstd():
    try:
        from compression import zstd  # Python 3.14
    except ImportError:
        try:
            from backports import zstd
        except ImportError:
            raise UserError(".zst needs one more package: pip install 'nanophi[zst]'") from None
    return zstd


def load_parquet():
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(".parquet needs pyarrow: pip install 'nanophi[parquet]'") from None
    return pyarrow.parquet


OPENERS = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": lambda *arguments, **named: _zstd().open(*arguments, **named),
}
DAMAGED = (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error)


@contextmanager
def opened(path: Path, mode: str = "rb", like: Path | None = None) -> Iterator[IO]:
    """Open a file, compressed or not as its name says (or that of `like`); damage is a UserError."""
    suffix = (like or path).suffix
    text = {} if "b" in mode else {"encoding": "utf-8", "newline": ""}
    try:
        with OPENERS.get(suffix, open)(path, mode, **text) as file:
            yield file
    except Exception as error:
        # bz2 says OSError without a number; the class ZstdError is not to be had before it is needed
        numberless = isinstance(error, OSError) and error.errno is None
        if not (isinstance(error, DAMAGED) or numberless or type(error).__name__ == "ZstdError"):
            raise
        raise UserError(f"{path} is damaged or no {suffix} file: {error}") from None


def format_of(path: Path) -> str | None:
    """`.jsonl` for news.jsonl.xz; None where the format is not known."""
    suffixes = [suffix for suffix in path.suffixes if suffix not in OPENERS]
    if not suffixes and WIKI_NAME.match(path.name):
        return "wiki"
    return suffixes[-1] if suffixes and suffixes[-1] in READERS else None


# ---- text: encodings and lines


def looks_like_gb18030(line: bytes) -> bool:
    """Whether bytes that are no UTF-8 are Chinese in GB18030: they decode, and mostly to the commonest 3,755 characters
    (the first bytes B0 to D7). UTF-8 read as GB18030 decodes too, but to rarer ones."""
    try:
        letters = [
            char.encode("gb18030")
            for char in line.decode("gb18030")
            if "\u3400" <= char <= "\u9fff"
        ]
    except UnicodeDecodeError:
        return False
    return len(letters) > 0 and sum(0xB0 <= letter[0] <= 0xD7 for letter in letters) > 0.7 * len(
        letters
    )


def encoding_of(path: Path) -> str:
    """What most lines of a file's beginning are written in: utf-8-sig, utf-16 or gb18030."""
    with opened(path) as file:
        head = file.read(CHUNK)
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "utf-16"
    whole = (
        head[: head.rfind(b"\n") + 1] or head[: len(head) - len(head) % 4]
    )  # no character cut at the end
    votes = 0
    for line in whole.split(b"\n"):
        if not line.isascii():
            try:
                line.decode("utf-8")
                votes += 1
            except UnicodeDecodeError as error:
                cut_off = len(head) == CHUNK and error.start > len(line) - 4
                votes += 1 if cut_off else -looks_like_gb18030(line)
    return "gb18030" if votes < 0 else "utf-8-sig"


def lines_of(path: Path, on_bad: Callable[[str], None]) -> Iterator[tuple[int, str]]:
    """Numbered lines of a text file, ends included as they are; on_bad for each that cannot be decoded."""
    encoding = encoding_of(path)
    if encoding != "utf-8-sig":
        print(f"{path}: read as {encoding.upper()}", file=sys.stderr)
    with opened(path) as file:
        if encoding == "utf-16":
            text = io.TextIOWrapper(file, encoding, newline="\n")
            try:
                yield from enumerate(text, start=1)
            except UnicodeError as error:
                on_bad(
                    f"{path}: not UTF-16, though its first bytes say so ({error}); the rest of it is not read"
                )
            finally:
                text.detach()
            return
        offset = 0
        for number, line in enumerate(file, start=1):
            try:
                text = line.decode(encoding if number == 1 else encoding.removesuffix("-sig"))
            except UnicodeDecodeError as error:
                other = (
                    " it looks like GB18030;"
                    if encoding != "gb18030" and looks_like_gb18030(line)
                    else ""
                )
                place = f"byte {offset + error.start:,} of the file"
                name = encoding.removesuffix("-sig").upper()
                on_bad(
                    f"{path}, line {number}: not {name} ({error.reason}, {place});{other} convert it first"
                )
            else:
                yield number, text
            offset += len(line)


# ---- readers: (path, sample_by, on_bad) -> rows


def _as_it_is(value: Any) -> Any:
    return value


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"not JSON ({error})") from None


def read_jsonl(path: Path, sample_by: SampleBy, on_bad: Callable[[str], None]) -> Rows:
    for number, line in lines_of(path, on_bad):
        if line.strip():
            yield f"{path}, line {number}", partial(_parse, line)


def read_json(path: Path, sample_by: SampleBy, on_bad: Callable[[str], None]) -> Rows:
    """The elements of an array, one by one: read on until the next one is whole. What stands behind a broken element
    cannot be told apart, and is left out."""
    decode, more = json.JSONDecoder().raw_decode, _chunks(path, on_bad)
    held, at, number, wanted = next(more, "").lstrip(), 1, 1, 1
    if not held.startswith("["):
        on_bad(f"{path}: holds no array of objects; one object a line is called .jsonl here")
        return
    while True:
        at = re.compile(r"[\s,]*").match(held, at).end()
        if held[at : at + 1] == "]":
            return
        try:
            value, at = decode(held, at)
        except (ValueError, RecursionError) as error:
            arrived = [chunk for _, chunk in zip(range(wanted), more, strict=False)]
            held, at, wanted = (
                held[at:] + "".join(arrived),
                0,
                wanted * 2,
            )  # so that a long one is tried a few times
            if not any(arrived):
                on_bad(
                    f"{path}, element {number}: not JSON ({getattr(error, 'msg', error)}); it ends the reading"
                )
                return
        else:
            yield f"{path}, element {number}", partial(_as_it_is, value)
            number, wanted = number + 1, 1


def _chunks(path: Path, on_bad: Callable[[str], None]) -> Iterator[str]:
    """The text of a file in pieces of some 65,536 characters, however long its lines are."""
    held, size = [], 0
    for _, line in lines_of(path, on_bad):
        for at in range(0, len(line), CHUNK):
            held.append(line[at : at + CHUNK])
            size += len(held[-1])
            if size >= CHUNK:
                yield "".join(held)
                held, size = [], 0
    yield "".join(held)


def read_csv(path: Path, sample_by: SampleBy, on_bad: Callable[[str], None]) -> Rows:
    csv.field_size_limit(1 << 30)  # its default of 131,072 characters is less than a long document
    table = csv.reader(
        (line for _, line in lines_of(path, on_bad)), strict=True
    )  # or a lost quote would swallow all
    header = next(table, [])
    try:
        for values in table:
            where = f"{path}, line {table.line_num}"
            if len(values) == len(header):
                yield where, partial(dict, zip(header, values, strict=True))
            elif values:
                on_bad(
                    f"{where}: {len(values)} values under {len(header)} columns ({', '.join(header)[:60]})"
                )
    except csv.Error as error:
        on_bad(f"{path}, line {table.line_num}: {error}; the rest of it is not read")


def read_parquet(path: Path, sample_by: SampleBy, on_bad: Callable[[str], None]) -> Rows:
    parquet = load_parquet()
    with tempfile.TemporaryFile() as plain, opened(path) as file:
        if path.suffix in OPENERS:  # a table is read from its end, which a compressed file has not
            shutil.copyfileobj(file, plain)
            file = plain
        number = 0
        try:
            for batch in parquet.ParquetFile(file).iter_batches(batch_size=256):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", partial(dict, row)
        except (sys.modules["pyarrow"].ArrowException, UnicodeDecodeError) as error:
            raise UserError(f"{path} is damaged or no .parquet file: {error}") from None


def read_txt(path: Path, sample_by: SampleBy, on_bad: Callable[[str], None]) -> Rows:
    for text in split_text((line for _, line in lines_of(path, on_bad)), sample_by):
        yield str(path), partial(dict, text=text)


def split_text(lines: Iterable[str], sample_by: SampleBy) -> Iterator[str]:
    """Lines of a .txt file -> documents, blank ones dropped. Paragraphs end at blank lines, a document at the end."""
    assert sample_by in ("line", "paragraph", "document"), sample_by
    held: list[str] = []
    for line in lines:
        ends = sample_by == "line" or (sample_by == "paragraph" and not line.strip())
        held.append(line)
        if ends:
            if (text := "".join(held)).strip():
                yield text.strip("\r\n")
            held = []
    if (text := "".join(held)).strip():
        yield text.strip("\r\n")


def read_wiki(path: Path, sample_by: SampleBy, on_bad: Callable[[str], None]) -> Rows:
    """WikiExtractor's `<doc id="1" url="..." title="...">`, text, `</doc>`; or its --json, one object a line."""
    where, row, held = "", {}, []
    for number, line in lines_of(path, on_bad):
        if line.startswith("{") and not row:
            yield f"{path}, line {number}", partial(_parse, line)
        elif line.startswith("<doc "):
            if row:
                on_bad(f"{where}: <doc> without its </doc>")
            where, held = f"{path}, line {number}", []
            row = {
                key: value for key, value in re.findall(r'(\w+)="([^"]*)"', line) if key != "text"
            }
        elif line.startswith("</doc>"):
            yield where, partial(dict, row, text="".join(held).strip("\n"))
            row = {}
        else:
            held.append(line)
    if row:
        on_bad(f"{where}: <doc> without its </doc>")


READERS = {
    ".jsonl": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".parquet": read_parquet,
    ".txt": read_txt,
    "wiki": read_wiki,
}
