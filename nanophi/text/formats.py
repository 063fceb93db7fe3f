"""Files <-> rows: how each format is read and written, side by side.

    .jsonl     one JSON object a line
    .json      one array of objects
    .csv       a header, then one row a line
    .parquet   a table (needs the package pyarrow)
    .txt       texts without keys: one a line, a paragraph or a file
    wiki_00    what WikiExtractor writes; only read

The table `FORMATS` at the end holds a reader and a writer for each. A file may be compressed as
well: news.jsonl.gz, .bz2, .xz or .zst.

Rows are read and written one by one, so memory does not grow with the file. Exceptions are the
longest line, and the row groups of a parquet file.

Text is UTF-8, with or without a byte-order mark, UTF-16 with one, or GB18030. The last two are
recognised, and a line on standard error says so.

A reader yields (where, make) for each row:

    where    the place of the row, for messages: "news.jsonl, line 3"
    make     a function that returns the row. It raises a UserError where the row is broken

So a broken row does not end the reading: an exception inside the reader itself, a generator, would.
What the reader cannot give as a row, such as a line that cannot be decoded, it reports with
on_bad(message), and goes on where it can.

Read in this order: one simple format, `read_jsonl` and `write_jsonl`; the table; then the rest.
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
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import IO, Any, Literal, TypeVar

from nanophi.cli import UserError
from nanophi.text.schemas import text_of

T = TypeVar("T")
SampleBy = Literal["line", "paragraph", "document"]  # what is one row of a .txt file
Rows = Iterator[tuple[str, Callable[[], Any]]]
OnBad = Callable[[str], None]

READ_AT_ONCE = 1 << 16  # bytes of a file's beginning, or characters of a JSON array
TABLE_ROWS = 1024  # rows that are written into a parquet file at once


def as_it_is(value: T) -> T:
    """The value itself, where a function is expected."""
    return value


# ---- 1. names and compression


def _zstd() -> ModuleType:
    try:
        from compression import zstd  # type: ignore[import-not-found]  # Python 3.14
    except ImportError:
        try:
            from backports import zstd
        except ImportError:
            raise UserError(".zst needs one more package: pip install 'nanophi[zst]'") from None
    return zstd


def _open_zst(*arguments: Any, **named: Any) -> IO:
    return _zstd().open(*arguments, **named)


OPENERS: dict[str, Callable[..., IO]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _open_zst,
}
SIGNS_OF_DAMAGE = (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error)


@contextmanager
def opened(path: Path, mode: str = "rb", like: Path | None = None) -> Iterator[IO]:
    """Open a file, compressed or not as its name says. A damaged archive is a UserError.

    like: a path whose name decides instead, for a file that has a temporary name
    """
    suffix = (like or path).suffix
    opener = OPENERS.get(suffix, open)
    options = {} if "b" in mode else {"encoding": "utf-8", "newline": ""}
    try:
        with opener(path, mode, **options) as file:
            yield file
    except Exception as error:
        if not _is_damage(error):
            raise
        raise UserError(f"{path} is damaged or no {suffix} file: {error}") from None


def _is_damage(error: Exception) -> bool:
    """Whether the error says that an archive is damaged."""
    if isinstance(error, OSError) and error.errno is None:
        return True  # that is how bz2 says it; errors of the system have a number
    # The class ZstdError is known by its name, because its package may not be installed.
    return isinstance(error, SIGNS_OF_DAMAGE) or type(error).__name__ == "ZstdError"


def format_of(path: Path) -> str | None:
    """The key in FORMATS of the format that the name says; None where it says none.

    >>> format_of(Path("news.2024.jsonl.xz")), format_of(Path("wiki_07")), format_of(Path("a.md"))
    ('.jsonl', 'wiki_00', None)
    """
    suffixes = [suffix for suffix in path.suffixes if suffix not in OPENERS]
    if not suffixes and re.match(r"wiki_\d+", path.name):
        return "wiki_00"
    if suffixes and suffixes[-1] in FORMATS:
        return suffixes[-1]
    return None


def readable_names() -> str:
    """How files that can be read may end, for messages."""
    return f"{', '.join(FORMATS)}, plain or {', '.join(OPENERS)}"


def writable(path: str | Path) -> str:
    """The key in FORMATS of the format in which rows are written to this path, or a UserError."""
    kind = format_of(Path(path))
    written = [name for name, form in FORMATS.items() if form.write is not None]
    if kind not in written or Path(path).is_dir():
        names = f"{', '.join(written)}, plain or {', '.join(OPENERS)}"
        raise UserError(f"{path}: rows are written as {names}, so name such a file")
    return kind


# ---- 2. text: encodings and lines


def looks_like_gb18030(line: bytes) -> bool:
    """Whether bytes that are no UTF-8 are Chinese in GB18030.

    They must decode, and mostly to the commonest 3,755 characters, whose first bytes are B0 to D7.
    UTF-8 that is read as GB18030 often decodes too, but to rarer characters:

    >>> "的是".encode().decode("gb18030")
    '鐨勬槸'
    >>> looks_like_gb18030("的是".encode("gb18030")), looks_like_gb18030("的是".encode())
    (True, False)
    """
    try:
        text = line.decode("gb18030")
    except UnicodeDecodeError:
        return False
    letters = [char.encode("gb18030") for char in text if "\u3400" <= char <= "\u9fff"]
    common = sum(0xB0 <= letter[0] <= 0xD7 for letter in letters)
    return common > 0.7 * len(letters)


def encoding_of(path: Path) -> str:
    """The encoding of most lines at a file's beginning: utf-8-sig, utf-16 or gb18030.

    utf-8-sig is UTF-8 whose byte-order mark, if there is one, is dropped.
    """
    with opened(path) as file:
        head = file.read(READ_AT_ONCE)
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "utf-16"
    whole_lines = head[: head.rfind(b"\n") + 1]
    if not whole_lines:  # one long line: cut it where GB18030, of 1, 2 or 4 bytes, may be whole
        whole_lines = head[: len(head) - len(head) % 4]
    is_cut = len(head) == READ_AT_ONCE
    votes = 0  # lines of UTF-8, minus lines of GB18030
    for line in whole_lines.split(b"\n"):
        if not line.isascii():
            votes += _vote(line, is_cut)
    return "gb18030" if votes < 0 else "utf-8-sig"


def _vote(line: bytes, is_cut: bool) -> int:
    """1 for a line of UTF-8, -1 for one of GB18030, 0 for anything else.

    is_cut: whether the file goes on after its beginning, so that the line may end within a
        character
    """
    try:
        line.decode("utf-8")
    except UnicodeDecodeError as error:
        if is_cut and error.start > len(line) - 4:
            return 1
        return -1 if looks_like_gb18030(line) else 0
    return 1


def lines_of(path: Path, on_bad: OnBad) -> Iterator[tuple[int, str]]:
    """(number from 1, line) of a text file. Each line ends as it does in the file.

    on_bad gets a message for each line that cannot be decoded.
    """
    encoding = encoding_of(path)
    if encoding != "utf-8-sig":
        print(f"{path}: read as {encoding.upper()}", file=sys.stderr)
    with opened(path) as file:
        if encoding == "utf-16":
            yield from _utf16_lines(path, file, on_bad)
        else:
            yield from _lines_of_bytes(path, file, encoding, on_bad)


def _utf16_lines(path: Path, file: IO, on_bad: OnBad) -> Iterator[tuple[int, str]]:
    text = io.TextIOWrapper(file, "utf-16", newline="\n")
    try:
        yield from enumerate(text, start=1)
    except UnicodeError as error:
        on_bad(
            f"{path}: not UTF-16, though its first bytes say so ({error}); "
            "the rest of it is not read"
        )
    finally:
        text.detach()  # otherwise the wrapper would close the file, which `opened` does


def _lines_of_bytes(
    path: Path, file: IO, encoding: str, on_bad: OnBad
) -> Iterator[tuple[int, str]]:
    """Decode line by line, so that one bad line does not end the reading."""
    without_mark = encoding.removesuffix("-sig")
    offset = 0  # of the line in the file, in bytes
    for number, line in enumerate(file, start=1):
        try:
            text = line.decode(encoding if number == 1 else without_mark)
        except UnicodeDecodeError as error:
            hint = ""
            if encoding != "gb18030" and looks_like_gb18030(line):
                hint = " it looks like GB18030;"
            place = f"byte {offset + error.start:,} of the file"
            on_bad(
                f"{path}, line {number}: not {without_mark.upper()} ({error.reason}, {place});"
                f"{hint} convert it first"
            )
        else:
            yield number, text
        offset += len(line)


# ---- 3. .jsonl: one JSON object a line


def read_jsonl(path: Path, sample_by: SampleBy, on_bad: OnBad) -> Rows:
    for number, line in lines_of(path, on_bad):
        if line.strip():
            yield f"{path}, line {number}", partial(_parse, line)


def write_jsonl(file: IO, rows: Iterable[dict]) -> None:
    for row in rows:
        file.write(as_json(row) + "\n")


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"not JSON ({error})") from None


def as_json(row: dict) -> str:
    """A row as JSON, with Chinese as it is; dates and the like, from a parquet file, as text.

    Half of a surrogate pair, which may stand in a key that the schemas do not know, cannot be
    written in UTF-8. Such a row is written with escapes.

    >>> as_json({"text": "茶"}), as_json({"text": "茶", "half": chr(0xD83D)})
    ('{"text": "茶"}', '{"text": "\\\\u8336", "half": "\\\\ud83d"}')
    """
    text = json.dumps(row, ensure_ascii=False, default=str)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(row, default=str)
    return text


# ---- 4. .json: one array of objects


def read_json(path: Path, sample_by: SampleBy, on_bad: OnBad) -> Rows:
    """The elements of the array, one by one. The text is read in pieces:

        piece 1                 piece 2
        [{"text": "A"}, {"te    xt": "B"}]
         ^              ^
         |              not whole: drop what is done, append the next piece, try again
         whole: yield it

    For a long element the number of pieces doubles with each try, so that it is parsed a few times
    only. What stands after a broken element cannot be read, because nothing says where it ends.
    """
    decode = json.JSONDecoder().raw_decode
    between = re.compile(r"[\s,]*")
    pieces = _pieces(path, on_bad)
    text = next(pieces, "").lstrip()  # read, from the element that is being parsed
    if not text.startswith("["):
        on_bad(f"{path}: holds no array of objects; one object a line is called .jsonl here")
        return
    position = 1  # in `text`
    number = 1  # of the element
    pieces_to_read = 1
    while True:
        gap = between.match(text, position)
        assert gap is not None  # the pattern matches an empty string
        position = gap.end()
        if text.startswith("]", position):
            return
        try:
            value, position = decode(text, position)
        except (ValueError, RecursionError) as error:
            more = "".join(islice(pieces, pieces_to_read))
            if not more:
                reason = getattr(error, "msg", error)
                on_bad(f"{path}, element {number}: not JSON ({reason}); it ends the reading")
                return
            text = text[position:] + more
            position = 0
            pieces_to_read *= 2
        else:
            yield f"{path}, element {number}", partial(as_it_is, value)
            number += 1
            pieces_to_read = 1


def _pieces(path: Path, on_bad: OnBad) -> Iterator[str]:
    """The text of a file in pieces of READ_AT_ONCE characters or more, however long its lines
    are: often the whole array is one line.
    """
    parts: list[str] = []
    size = 0  # characters of `parts`
    for _, line in lines_of(path, on_bad):
        for start in range(0, len(line), READ_AT_ONCE):
            part = line[start : start + READ_AT_ONCE]
            parts.append(part)
            size += len(part)
            if size >= READ_AT_ONCE:
                yield "".join(parts)
                parts = []
                size = 0
    yield "".join(parts)


def write_json(file: IO, rows: Iterable[dict]) -> None:
    is_empty = True
    for row in rows:
        file.write("[\n" if is_empty else ",\n")
        file.write(as_json(row))
        is_empty = False
    file.write("[]\n" if is_empty else "\n]\n")


# ---- 5. .csv: a header, then one row a line


def read_csv(path: Path, sample_by: SampleBy, on_bad: OnBad) -> Rows:
    csv.field_size_limit(1 << 30)  # a long document has more than the default, 131,072 characters
    lines = (line for _, line in lines_of(path, on_bad))
    # Without `strict`, a lost quote would make one value of all that follows.
    table = csv.reader(lines, strict=True)
    header = next(table, [])
    try:
        for values in table:
            where = f"{path}, line {table.line_num}"
            if len(values) == len(header):
                yield where, partial(dict, zip(header, values, strict=True))
            elif values:
                columns = ", ".join(header)[:60]
                on_bad(f"{where}: {len(values)} values under {len(header)} columns ({columns})")
    except csv.Error as error:
        on_bad(f"{path}, line {table.line_num}: {error}; the rest of it is not read")


def write_csv(file: IO, rows: Iterable[dict]) -> None:
    """The columns are the keys of the first row; a row that lacks one has an empty value there."""
    table = None
    for row in rows:
        if table is None:
            table = csv.DictWriter(file, row, lineterminator="\n")
            table.writeheader()
        is_flat = not any(isinstance(value, list | dict) for value in row.values())
        if row.keys() - set(table.fieldnames) or not is_flat:
            raise UserError(
                f"a .csv has one header and flat values; not so {str(row)[:60]}: write .jsonl"
            )
        table.writerow(row)


# ---- 6. .parquet: a table


def load_parquet() -> ModuleType:
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(".parquet needs pyarrow: pip install 'nanophi[parquet]'") from None
    return pyarrow.parquet


def read_parquet(path: Path, sample_by: SampleBy, on_bad: OnBad) -> Rows:
    parquet = load_parquet()
    import pyarrow

    with tempfile.TemporaryFile() as plain, opened(path) as file:
        if path.suffix in OPENERS:
            # A table is read from its end, and a compressed file can only be read from its start.
            shutil.copyfileobj(file, plain)
            file = plain
        number = 0
        try:
            for batch in parquet.ParquetFile(file).iter_batches(batch_size=256):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", partial(dict, row)
        except (pyarrow.ArrowException, UnicodeDecodeError) as error:
            raise UserError(f"{path} is damaged or no .parquet file: {error}") from None


def write_parquet(file: IO, rows: Iterable[dict]) -> None:
    """The columns are the keys of the first TABLE_ROWS rows; a row that lacks one has a null there.
    pyarrow by itself would take the keys of the first row, and drop all others without a word.
    """
    parquet = load_parquet()
    import pyarrow

    rows = iter(rows)
    batch = list(islice(rows, TABLE_ROWS))
    columns = _keys_of(batch)
    try:
        table = pyarrow.Table.from_pylist(_filled(batch, columns))
        with parquet.ParquetWriter(file, table.schema) as writer:
            writer.write_table(table)
            batch = list(islice(rows, TABLE_ROWS))
            while batch:
                new = _keys_of(batch).keys() - columns.keys()
                if new:
                    raise UserError(
                        f"{', '.join(sorted(new))}: a key that none of the first {TABLE_ROWS:,} "
                        "rows has; write .jsonl"
                    )
                rows_of_table = _filled(batch, columns)
                writer.write_table(pyarrow.Table.from_pylist(rows_of_table, schema=table.schema))
                batch = list(islice(rows, TABLE_ROWS))
    except pyarrow.ArrowException as error:
        raise UserError(f"the rows do not fit one table ({error}): write .jsonl") from None


def _keys_of(rows: list[dict]) -> dict[str, None]:
    """The keys of all rows, each once, in order: a dict is an ordered set."""
    return dict.fromkeys(key for row in rows for key in row)


def _filled(rows: list[dict], columns: Iterable[str]) -> list[dict]:
    """Rows of exactly these keys.

    >>> _filled([{"text": "一"}], ["text", "source"])
    [{'text': '一', 'source': None}]
    """
    return [{key: row.get(key) for key in columns} for row in rows]


# ---- 7. .txt: texts without keys


def read_txt(path: Path, sample_by: SampleBy, on_bad: OnBad) -> Rows:
    lines = (line for _, line in lines_of(path, on_bad))
    for text in split_text(lines, sample_by):
        yield str(path), partial(dict, text=text)


def split_text(lines: Iterable[str], sample_by: SampleBy) -> Iterator[str]:
    """The lines of a .txt file -> texts, without blank ones.

    >>> lines = ["一\\n", "二\\n", "\\n", "三\\n"]
    >>> list(split_text(lines, "line")), list(split_text(lines, "paragraph"))
    (['一', '二', '三'], ['一\\n二', '三'])
    >>> list(split_text(lines, "document"))
    ['一\\n二\\n\\n三']
    """
    assert sample_by in ("line", "paragraph", "document"), sample_by
    if sample_by == "line":
        texts = lines
    elif sample_by == "paragraph":
        texts = _paragraphs(lines)
    else:
        texts = ["".join(lines)]
    for text in texts:
        if text.strip():
            yield text.strip("\r\n")


def _paragraphs(lines: Iterable[str]) -> Iterator[str]:
    """Consecutive lines, joined; each blank line ends a paragraph."""
    paragraph: list[str] = []
    for line in lines:
        paragraph.append(line)
        if not line.strip():
            yield "".join(paragraph)
            paragraph = []
    yield "".join(paragraph)


def write_txt(file: IO, rows: Iterable[dict]) -> None:
    """Paragraphs, as `--sample-by paragraph` reads them. A blank line ends each text, so blank
    lines within a text are left out.
    """
    for row in rows:
        lines = [line for line in text_of(row).split("\n") if line.strip()]
        file.write("\n".join(lines) + "\n\n")


# ---- 8. wiki_00: what WikiExtractor writes


def read_wiki(path: Path, sample_by: SampleBy, on_bad: OnBad) -> Rows:
    """Articles in this form, or one JSON object a line, which WikiExtractor --json writes:

    <doc id="1" url="..." title="数学">
    数学是……
    </doc>
    """
    where = ""  # the place of the article's first line
    row: dict[str, str] = {}  # the attributes of the article; empty between articles
    lines: list[str] = []
    for number, line in lines_of(path, on_bad):
        if line.startswith("{") and not row:
            yield f"{path}, line {number}", partial(_parse, line)
        elif line.startswith("<doc "):
            if row:
                on_bad(f"{where}: <doc> without its </doc>")
            where = f"{path}, line {number}"
            row = dict(re.findall(r'(\w+)="([^"]*)"', line))
            row.pop("text", None)
            lines = []
        elif line.startswith("</doc>"):
            yield where, partial(dict, row, text="".join(lines).strip("\n"))
            row = {}
        else:
            lines.append(line)
    if row:
        on_bad(f"{where}: <doc> without its </doc>")


# ---- 9. the table


@dataclass(frozen=True)
class Format:
    """How files of one format are read and written.

    read: (path, sample_by, on_bad) -> rows, as (where, make)
    write: (file, rows), which writes all rows; None for a format that is only read
    mode: how the file to write is opened: as text, or "wb" as bytes
    """

    read: Callable[[Path, SampleBy, OnBad], Rows]
    write: Callable[[IO, Iterable[dict]], None] | None = None
    mode: str = "wt"


FORMATS: dict[str, Format] = {
    ".jsonl": Format(read_jsonl, write_jsonl),
    ".json": Format(read_json, write_json),
    ".csv": Format(read_csv, write_csv),
    ".parquet": Format(read_parquet, write_parquet, mode="wb"),
    ".txt": Format(read_txt, write_txt),
    "wiki_00": Format(read_wiki),
}
