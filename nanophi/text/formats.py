"""Files <-> rows: how each format is read and written, side by side.

    .jsonl     one JSON object a line
    .json      one array of objects
    .csv       a header, then one row a line; between the columns `,` or `;` or a tab
    .tsv       the same with tabs
    .parquet   a table (needs the package pyarrow)
    .txt       texts without keys: one a line, a paragraph or a file
    wiki_00    what WikiExtractor writes; only read

The table `FORMATS` at the end holds a reader and a writer for each. A file may be compressed as
well: news.jsonl.gz, .bz2, .xz or .zst.

Rows are read and written one by one, so memory does not grow with the file. Exceptions are the
longest line, and the row groups of a parquet file. A line of more than 64 MiB is a bad row, and so
is an element of a .json array: a small .gz may hold one of any length.

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

import bisect
import bz2
import codecs
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
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from types import ModuleType
from typing import IO, Any, AnyStr, Literal, TypeVar

from nanophi.cli import UserError
from nanophi.files import utf8
from nanophi.text.schemas import text_of

T = TypeVar("T")
SampleBy = Literal["line", "paragraph", "document"]  # what is one row of a .txt file
Rows = Iterator[tuple[str, Callable[[], Any]]]
OnBad = Callable[[str], None]

READ_AT_ONCE = 1 << 16  # bytes of a file's beginning, or of a JSON array
LONGEST = 64 << 20  # bytes of a line; characters in UTF-16, and of an element of a JSON array
DEEPEST = 40  # lists and objects in one another; pyarrow reads no table of 50 lists
TABLE_ROWS = 1024  # rows that are written into a parquet file at once
SEPARATORS = ",;\t"  # what may stand between the columns of a .csv


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


@contextmanager
def _open_gz(path: Path, mode: str, **named: Any) -> Iterator[Any]:
    """gzip.open, but for the name and the time that it writes into a new file: the same rows should
    give the same bytes, and the name is a temporary one.
    """
    if "r" in mode:
        with gzip.open(path, mode, **named) as file:
            yield file
        return
    with open(path, "wb") as raw, gzip.GzipFile("", "wb", fileobj=raw, mtime=0) as packed:
        if "b" in mode:
            yield packed
        else:
            with io.TextIOWrapper(packed, **named) as text:
                yield text


OPENERS: dict[str, Callable[..., Any]] = {
    ".gz": _open_gz,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _open_zst,
}
SIGNS_OF_DAMAGE = (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error)


@contextmanager
def opened(path: Path, mode: str = "rb", like: Path | None = None) -> Iterator[IO]:
    """Open a file, compressed or not as its name says. A damaged archive is a UserError.

    like: a path whose name decides instead, for a file that has a temporary name

    A pipe is refused: it gives its bytes once, and they are read twice, first for the encoding.
    """
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is no regular file: copy what it gives into a file first")
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
        # The line may be cut within a character at its end.
        text = codecs.getincrementaldecoder("gb18030")().decode(line)
    except UnicodeDecodeError:
        return False
    letters = [char.encode("gb18030") for char in text if "\u3400" <= char <= "\u9fff"]
    common = sum(0xB0 <= letter[0] <= 0xD7 for letter in letters)
    return common > 0.7 * len(letters)


def encoding_of(path: Path) -> str:
    """The encoding of most lines at a file's beginning: utf-8-sig, utf-16 or gb18030.

    utf-8-sig is UTF-8 whose byte-order mark, if there is one, is dropped. A line on standard error
    names any other encoding.
    """
    with opened(path) as file:
        head = file.read(READ_AT_ONCE)
    encoding = _encoding_of(head)
    if encoding != "utf-8-sig":
        print(f"{path}: read as {encoding.upper()}", file=sys.stderr)
    return encoding


def _encoding_of(head: bytes) -> str:
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "utf-16"
    *lines, last = head.split(b"\n")
    if not lines or len(head) < READ_AT_ONCE:
        lines.append(last)  # otherwise it is only the beginning of a line
    votes = sum(_vote(line) for line in lines if not line.isascii())
    return "gb18030" if votes < 0 else "utf-8-sig"


def _vote(line: bytes) -> int:
    """1 for a line of UTF-8, -1 for one of GB18030, 0 for anything else. The line may be cut within
    a character at its end.

    >>> _vote("茶".encode()), _vote("茶".encode()[:2]), _vote("茶".encode("gb18030"))
    (1, 1, -1)
    """
    try:
        codecs.getincrementaldecoder("utf-8")().decode(line)
    except UnicodeDecodeError:
        return -1 if looks_like_gb18030(line) else 0
    return 1


def lines_of(path: Path, on_bad: OnBad) -> Iterator[tuple[int, str]]:
    """(number from 1, line) of a text file. Each line ends as it does in the file.

    on_bad gets a message for each line that cannot be decoded or is too long.
    """
    encoding = encoding_of(path)
    with opened(path) as file:
        if encoding == "utf-16":
            yield from _utf16_lines(path, file, on_bad)
        else:
            yield from _lines_of_bytes(path, file, encoding, on_bad)


def _utf16_lines(path: Path, file: IO, on_bad: OnBad) -> Iterator[tuple[int, str]]:
    text = io.TextIOWrapper(file, "utf-16", newline="\n")
    try:
        yield from _not_too_long(path, text, on_bad)
    except UnicodeError as error:
        on_bad(f"{path}: {_not_utf16(error)}")
    finally:
        text.detach()  # otherwise the wrapper would close the file, which `opened` does


def _not_utf16(error: UnicodeError) -> str:
    return f"not UTF-16, though its first bytes say so ({error}); the rest of it is not read"


def _lines_of_bytes(
    path: Path, file: IO, encoding: str, on_bad: OnBad
) -> Iterator[tuple[int, str]]:
    """Decode line by line, so that one bad line does not end the reading."""
    without_mark = encoding.removesuffix("-sig")
    for number, line in _not_too_long(path, file, on_bad):
        try:
            text = line.decode(encoding if number == 1 else without_mark)
        except UnicodeDecodeError as error:
            hint = ""
            if encoding != "gb18030" and looks_like_gb18030(line):
                hint = " it looks like GB18030;"
            place = f"byte {file.tell() - len(line) + error.start:,} of the file"
            on_bad(
                f"{path}, line {number}: not {without_mark.upper()} ({error.reason}, {place});"
                f"{hint} convert it first"
            )
        else:
            yield number, text


def _not_too_long(path: Path, file: IO[AnyStr], on_bad: OnBad) -> Iterator[tuple[int, AnyStr]]:
    """(number from 1, line) of an open file. A line of more than LONGEST is read past in pieces, so
    that it is never whole in memory; on_bad gets a message.
    """
    number = 0
    while line := file.readline(LONGEST + 1):
        number += 1
        if len(line) <= LONGEST:
            yield number, line
            continue
        while line and line[-1:] not in (b"\n", "\n"):
            line = file.readline(READ_AT_ONCE)
        on_bad(f"{path}, line {number}: it is longer than {LONGEST >> 20} MiB and not read")


# ---- 3. .jsonl: one JSON object a line


def read_jsonl(path: Path, sample_by: SampleBy, on_bad: OnBad) -> Rows:
    for number, line in lines_of(path, on_bad):
        if line.strip():
            yield f"{path}, line {number}", partial(_parse, line)


def write_jsonl(file: IO, rows: Iterable[dict]) -> None:
    for row in rows:
        file.write(as_json(row) + "\n")


# A raw tab within a string is no JSON to the letter, but files have it. strict=False allows it.
JSON = json.JSONDecoder(strict=False)


def _parse(text: str) -> Any:
    """The value of a text of JSON, or a UserError."""
    try:
        value = JSON.decode(text)
    except RecursionError:
        raise UserError("it is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise UserError(f"not JSON ({error})") from None
    except ValueError:
        raise UserError("it holds a number of thousands of digits") from None
    if text.count("[") + text.count("{") > DEEPEST:  # this costs little, and few texts have so many
        _refuse_depth(value)
    return value


def _refuse_depth(value: Any) -> None:
    """A UserError where lists and objects are nested too deeply.

    Python could read some hundreds of levels, but not send them to another process, and pyarrow
    writes tables of so many that it cannot read.
    """
    level = [value]
    for _ in range(DEEPEST):
        parents = [parent for parent in level if isinstance(parent, list | dict)]
        level = [
            child
            for parent in parents
            for child in (parent.values() if isinstance(parent, dict) else parent)
        ]
        if not level:
            return
    raise UserError("it is nested too deeply")


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
    pieces = _pieces(path, on_bad)
    text = next(pieces, "").lstrip()  # read, from the element that is being parsed
    if not text.startswith("["):
        on_bad(f"{path}: holds no array of objects; one object a line is called .jsonl here")
        return
    position = 1  # in `text`
    number = 1  # of the element
    pieces_to_read = 1
    while True:
        position = _skip_gap(text, position)
        if text.startswith("]", position):
            return
        where = f"{path}, element {number}"
        try:
            _, end = FIND_END(text, position)
        except (ValueError, RecursionError) as error:
            reason = getattr(error, "msg", "it is nested too deeply")
            is_too_long = len(text) - position > LONGEST
            more = "" if is_too_long else "".join(islice(pieces, pieces_to_read))
            if not more or isinstance(error, RecursionError):
                hint = f", or longer than {LONGEST >> 20} MiB" if is_too_long else ""
                on_bad(f"{where}: not JSON ({reason}{hint}); it ends the reading")
                return
            text = text[position:] + more
            position = 0
            pieces_to_read *= 2
        else:
            yield where, partial(_parse_element, text[position:end])
            position = end
            number += 1
            pieces_to_read = 1


# The value of an element is made by `_parse`, as that of a line is. This one only finds its end, so
# it leaves numbers as they are written: one of too many digits does not stop it.
FIND_END = json.JSONDecoder(strict=False, parse_int=str).raw_decode
_GAP = re.compile(r"[\s,]*")
_ESCAPED_BYTE = re.compile("[\udc80-\udcff]")


def _skip_gap(text: str, position: int) -> int:
    """Where the next element begins, behind white space and commas."""
    gap = _GAP.match(text, position)
    assert gap is not None  # the pattern matches an empty string
    return gap.end()


def _parse_element(text: str) -> Any:
    """The value of an element; a UserError where it has bytes that could not be decoded."""
    if _ESCAPED_BYTE.search(text):
        raise UserError("it has bytes that are no text in the encoding of the file")
    return _parse(text)


def _pieces(path: Path, on_bad: OnBad) -> Iterator[str]:
    """The text of a file in pieces, however long its lines are: often the whole array is one line.

    A byte that cannot be decoded becomes half of a surrogate pair, U+DC80 to U+DCFF, which no text
    of a file can hold. So only the element that has it is bad.
    """
    encoding = encoding_of(path)
    with opened(path) as file:
        pieces = iter(partial(file.read, READ_AT_ONCE), b"")
        try:
            yield from codecs.iterdecode(pieces, encoding, "surrogateescape")
        except UnicodeError as error:
            on_bad(f"{path}: {_not_utf16(error)}")


def write_json(file: IO, rows: Iterable[dict]) -> None:
    is_empty = True
    for row in rows:
        file.write("[\n" if is_empty else ",\n")
        file.write(as_json(row))
        is_empty = False
    file.write("[]\n" if is_empty else "\n]\n")


# ---- 5. .csv and .tsv: a header, then one row a line


def read_csv(path: Path, sample_by: SampleBy, on_bad: OnBad, separator: str = "") -> Rows:
    """separator: what stands between the columns; without it, the header says it."""
    # A long document has more than the default, 131,072 characters.
    csv.field_size_limit(LONGEST)
    number = 0  # of the line that was read last

    def numbered_lines() -> Iterator[str]:
        nonlocal number
        for number, line in lines_of(path, on_bad):  # noqa: B007 - it is read outside
            yield line

    lines = numbered_lines()
    first = next((line for line in lines if line.strip()), "")
    # Without `strict`, a lost quote would make one value of all that follows.
    delimiter = separator or separator_of(first)
    table = csv.reader(chain([first], lines), strict=True, delimiter=delimiter)
    try:
        header = _columns(next(table, []))
        for values in table:
            where = f"{path}, line {number}"
            if len(values) == len(header):
                yield where, partial(dict, zip(header, values, strict=True))
            elif values:
                columns = ", ".join(header)[:60]
                on_bad(f"{where}: {len(values)} values under {len(header)} columns ({columns})")
    except csv.Error as error:
        is_line_end = "new-line character" in str(error)
        reason = "a line ends in CR alone, as on old Macs: end it in LF" if is_line_end else error
        on_bad(f"{path}, line {number}: {reason}; the rest of it is not read")


def separator_of(header: str) -> str:
    """What stands between the columns of a .csv: of `,` `;` and the tab the one that is most often
    in its first line, outside of quotes. Where Excel speaks German or French, it writes `;`.

        text;source           ;
        "a,b";source          ;   quotes keep the comma
        text                  ,   one column, and nothing between

    >>> separator_of('"a,b";source')
    ';'
    """
    unquoted = re.sub(r'"[^"]*("|$)', "", header)
    return max(SEPARATORS, key=unquoted.count)


def _columns(header: list[str]) -> list[str]:
    """The names of the columns. One without a name, as pandas writes its index, is called by its
    place. Two of one name are a csv.Error: a row would keep one of them only.

    >>> _columns(["", "text"])
    ['column_1', 'text']
    """
    names = [name or f"column_{place}" for place, name in enumerate(header, start=1)]
    twice = _twice(names)
    if twice is not None:
        raise csv.Error(f"two columns are called {twice!r}, rename one")
    return names


def _twice(names: Iterable[str]) -> str | None:
    """The first name that stands twice; None where there is none."""
    return next((name for name, times in Counter(names).items() if times > 1), None)


def write_csv(file: IO, rows: Iterable[dict], separator: str = ",") -> None:
    """The columns are the keys of the first row; a row that lacks one has an empty value there."""
    table = None
    for number, row in enumerate(rows, start=1):
        try:
            if table is None:
                table = csv.DictWriter(file, row, lineterminator="\n", delimiter=separator)
                _write_header(file, list(row), separator)
            is_flat = not any(isinstance(value, list | dict) for value in row.values())
            if row.keys() - set(table.fieldnames) or not is_flat:
                raise UserError(
                    f"a .csv has one header and flat values; not so {str(row)[:60]}: write .jsonl"
                )
            table.writerow(row)
        except UnicodeEncodeError as error:
            raise _unwritable(number, _column_with_half_a_pair(row), error) from None


def _write_header(file: IO, columns: list[str], separator: str) -> None:
    """Quotes around names that hold a separator: without, `separator_of` would count it."""
    has_separators = any(sign in name for name in columns for sign in SEPARATORS)
    csv.writer(
        file,
        lineterminator="\n",
        delimiter=separator,
        quoting=csv.QUOTE_ALL if has_separators else csv.QUOTE_MINIMAL,
    ).writerow(columns)


def _column_with_half_a_pair(row: dict) -> str:
    """The first key that holds half of a surrogate pair in itself or in its value."""
    halves = re.compile("[\ud800-\udfff]")
    return next(key for key, value in row.items() if halves.search(f"{key}{value}"))


def _unwritable(row: int, column: str, error: Exception) -> UserError:
    """Says that a table cannot hold a value."""
    return UserError(f"row {row:,}, column {column!r} cannot be written ({error}): write .jsonl")


# ---- 6. .parquet: a table


def load_parquet() -> ModuleType:
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(".parquet needs pyarrow: pip install 'nanophi[parquet]'") from None
    return pyarrow.parquet


# What pyarrow raises, beside its own ArrowException, at values that Python or a table cannot hold:
# OverflowError, UnicodeError, an unknown time zone (KeyError), a key that is no string.
NO_VALUE = (ArithmeticError, LookupError, TypeError, ValueError)


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
            table = parquet.ParquetFile(file)
            twice = _twice(table.schema_arrow.names)
            if twice is not None:
                on_bad(f"{path}: two columns are called {twice!r}, rename one; it is not read")
                return
            for batch in table.iter_batches(batch_size=256):
                for make in _rows_of(batch):
                    number += 1
                    yield f"{path}, row {number}", make
        except (pyarrow.ArrowException, UnicodeDecodeError) as error:
            raise UserError(f"{path} is damaged or no .parquet file: {error}") from None


def _rows_of(batch: Any) -> list[Callable[[], dict]]:
    """A function for each row of a batch. Where a value cannot be read, each row is read by itself,
    so that only its own is bad.
    """
    import pyarrow

    try:
        return [partial(as_it_is, row) for row in batch.to_pylist()]
    except (pyarrow.ArrowException, *NO_VALUE):
        return [partial(_row_at, batch, index) for index in range(batch.num_rows)]


def _row_at(batch: Any, index: int) -> dict:
    """One row of a batch, or a UserError that names the column."""
    import pyarrow

    row = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            row[name] = _value_of(column[index])
        except (pyarrow.ArrowException, *NO_VALUE) as error:
            raise UserError(f"the value under {name!r} cannot be read ({error})") from None
    return row


def _value_of(scalar: Any) -> Any:
    """A value of a table. A time that Python cannot hold becomes text; it ends at the year 9999.

    >>> import pyarrow
    >>> _value_of(pyarrow.scalar(2**62, pyarrow.timestamp("us")))
    '<value out of range: 4611686018427387904>'
    """
    import pyarrow

    try:
        return scalar.as_py()
    except (pyarrow.ArrowException, *NO_VALUE):
        return scalar.cast(pyarrow.string()).as_py()


def write_parquet(file: IO, rows: Iterable[dict]) -> None:
    """The columns are the keys of the first TABLE_ROWS rows; a row that lacks one has a null there.
    pyarrow by itself would take the keys of the first row, and drop all others without a word.
    """
    parquet = load_parquet()
    import pyarrow

    rows = iter(rows)
    batch = list(islice(rows, TABLE_ROWS))
    columns = _keys_of(batch)
    written = 0
    table = _table(batch, columns, None, written)
    try:
        with parquet.ParquetWriter(file, table.schema) as writer:
            writer.write_table(table)
            written += len(batch)
            batch = list(islice(rows, TABLE_ROWS))
            while batch:
                new = _keys_of(batch).keys() - columns.keys()
                if new:
                    raise UserError(
                        f"{', '.join(sorted(new))}: a key that none of the first {TABLE_ROWS:,} "
                        "rows has; write .jsonl"
                    )
                writer.write_table(_table(batch, columns, table.schema, written))
                written += len(batch)
                batch = list(islice(rows, TABLE_ROWS))
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # it comes from the system: the disk is full
        raise UserError(f"the rows do not fit one table ({error}): write .jsonl") from None


def _table(rows: list[dict], columns: Iterable[str], schema: Any, written: int) -> Any:
    """The rows as a table of pyarrow. A UserError names the row and the column that do not fit.

    schema: the types of the columns; None: as the values of these rows say
    written: how many rows the file has already
    """
    import pyarrow

    filled = _filled(rows, columns)
    try:
        table = pyarrow.Table.from_pylist(filled, schema=schema)
    except (pyarrow.ArrowException, *NO_VALUE) as error:
        row, column = _misfit(filled, columns, schema)
        raise _unwritable(written + row, column, error) from None
    if schema is not None:
        _refuse_new_keys_inside(filled, schema)
    return table


def _misfit(rows: list[dict], columns: Iterable[str], schema: Any) -> tuple[int, str]:
    """(number from 1, column) of the first value that does not fit the ones before it."""
    import pyarrow

    def fails(column: str, first_rows: int) -> bool:
        part = [{column: row[column]} for row in rows[:first_rows]]
        names = None if schema is None else pyarrow.schema([schema.field(column)])
        try:
            pyarrow.Table.from_pylist(part, schema=names)
        except (pyarrow.ArrowException, *NO_VALUE):
            return True
        return False

    column = next((column for column in columns if fails(column, len(rows))), next(iter(columns)))
    # If the first n rows fail, the first n + 1 fail as well: so halving finds the least n.
    counts = range(1, len(rows) + 1)
    place = bisect.bisect_left(counts, True, key=partial(fails, column))
    return counts[min(place, len(rows) - 1)], column


def _refuse_new_keys_inside(rows: list[dict], schema: Any) -> None:
    """A UserError where objects in a column have a key that no earlier row has. pyarrow would drop
    it without a word: {"role": "user", "content": "你好", "name": "小明"} without the name.
    """
    import pyarrow

    for field in schema:
        if not pyarrow.types.is_nested(field.type):
            continue
        found = pyarrow.field(field.name, pyarrow.array([row[field.name] for row in rows]).type)
        both = pyarrow.unify_schemas(
            [pyarrow.schema([field]), pyarrow.schema([found])], promote_options="permissive"
        )
        if both.field(0).type != field.type:
            raise UserError(
                f"column {field.name!r}: its objects have other keys than in the first "
                f"{TABLE_ROWS:,} rows; write .jsonl"
            )


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
        text = text_of(row)
        utf8(text)
        lines = [line for line in text.split("\n") if line.strip()]
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
            row = dict(re.findall(r'(\w+)="([^"]*)"', line)) | {"text": ""}
            lines = []
        elif line.startswith("</doc>") and row:
            yield where, partial(dict, row, text="".join(lines).strip("\n"))
            row = {}
        elif row:
            lines.append(line)
        elif line.strip():
            on_bad(f"{path}, line {number}: it is outside of <doc ...> and </doc>")
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
    ".tsv": Format(partial(read_csv, separator="\t"), partial(write_csv, separator="\t")),
    ".parquet": Format(read_parquet, write_parquet, mode="wb"),
    ".txt": Format(read_txt, write_txt),
    "wiki_00": Format(read_wiki),
}
