"""Reading and writing documents: the one place that knows file formats and row schemas.

    .jsonl / .json   one object a line / one array of objects        .txt   a document per line, paragraph or file
    each of them plain or .gz / .xz

Everything streams but .json, which is one value. A document is {"text": str, ...}; conversations and preference pairs
keep their own keys, see `messages_of` and `preference_of`.
"""

import glob
import gzip
import json
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Literal, TypeVar

from nanophi.cli import UserError
from nanophi.files import replacing, utf8

OPENERS = {".gz": gzip.open, ".xz": lzma.open}
FORMATS = (".jsonl", ".json", ".txt")
SampleBy = Literal["line", "paragraph", "document"]
T = TypeVar("T")

# Row schemas: the keys that hold text; what is asked, and what is learned (and so ends in punctuation).
ASKED = ("instruction", "input", "prompt")
LEARNED = ("text", "output", "response", "chosen", "rejected")
TURNS = {"messages": ("role", "content"), "conversations": ("from", "value")}
ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's names


def expand(inputs: Iterable[str | Path]) -> list[Path]:
    """Files, directories (all readable files in them) and globs -> files, in order, each once."""
    found: dict[Path, None] = {}
    for item in map(str, inputs):
        paths = [Path(item)] if Path(item).exists() else [Path(p) for p in sorted(glob.glob(item, recursive=True))]
        if not paths:
            raise UserError(f"no such file, directory or glob: {item}")
        for path in paths:
            inside = sorted(p for p in path.rglob("*") if p.is_file() and format_of(p)) if path.is_dir() else [path]
            if not inside:
                raise UserError(f"{path} holds no file that ends in {', '.join(FORMATS)} (or those with .gz, .xz)")
            found |= dict.fromkeys(inside)
    return list(found)


def format_of(path: Path) -> str | None:
    """`.jsonl` for news.jsonl.xz; None where the format is not known."""
    suffixes = [s for s in path.suffixes if s not in OPENERS]
    return suffixes[-1] if suffixes and suffixes[-1] in FORMATS else None


class Skipped:
    """Counts bad rows where a command goes on without them: read_rows(inputs, on_bad=Skipped())."""

    def __init__(self):
        self.count = 0
        self.first: list[str] = []  # a few messages to show

    def __call__(self, message: str) -> None:
        self.count += 1
        if len(self.first) < 3:
            self.first.append(message)

    def __str__(self) -> str:
        rest = self.count - len(self.first)
        return "".join(f"skipped: {message}\n" for message in self.first) + f"skipped: {rest:,} more\n" * (rest > 0)


def refuse(message: str) -> None:
    raise UserError(message)


def as_it_is(row: dict) -> dict:
    return row


def read_rows(
    inputs: Iterable[str | Path],
    sample_by: SampleBy = "line",
    use: Callable[[dict], T] = as_it_is,
    on_bad: Callable[[str], None] = refuse,
) -> Iterator[T]:
    """use(row) for every row of the inputs, in order, checked. A .txt file gives {"text": ...} by line, paragraph or
    document.

    on_bad gets a message, with file and line, for each row that is not UTF-8, no JSON, of the wrong shape or refused
    by `use` with a UserError; by default that ends the reading, with `Skipped()` the rows are left out.
    """
    for path in expand(inputs):
        kind = format_of(path)
        if kind is None:
            raise UserError(f"{path}: unknown format; known are {', '.join(FORMATS)}, plain or .gz or .xz")
        try:
            with OPENERS.get(path.suffix, open)(path, "rb") as file:
                for where, make in _rows(file, kind, path, sample_by, on_bad):
                    try:
                        row = use(checked(make()))
                    except UserError as error:
                        on_bad(f"{where}: {error}")
                    else:
                        yield row
        except (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error) as error:
            raise UserError(f"{path} is damaged or no {path.suffix} file: {error}") from None


def _rows(file, kind: str, path: Path, sample_by: str, on_bad) -> Iterator[tuple[str, Callable[[], dict]]]:
    """(where it stands, what makes it) of each row; making it may raise a UserError."""
    if kind == ".json":
        try:
            rows = _parse("".join(line for _, line in _lines(file, path, refuse)))
            if not isinstance(rows, list):
                raise UserError("holds no array of objects; one object a line is called .jsonl here")
        except UserError as error:
            on_bad(f"{path}: {error}")
            return
        yield from ((f"{path}, element {number}", partial(as_it_is, row)) for number, row in enumerate(rows, start=1))
    elif kind == ".txt":
        texts = split_text((line for _, line in _lines(file, path, on_bad)), sample_by)
        yield from ((str(path), partial(dict, text=text)) for text in texts)
    else:
        lines = ((number, line) for number, line in _lines(file, path, on_bad) if line.strip())
        yield from ((f"{path}, line {number}", partial(_parse, line)) for number, line in lines)


def _lines(file, path: Path, on_bad) -> Iterator[tuple[int, str]]:
    """Numbered lines of a binary file as text, with or without a byte-order mark; line ends stay as they are."""
    offset = 0
    for number, line in enumerate(file, start=1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            place = f"byte {offset + error.start:,} of the file"
            on_bad(f"{path}, line {number}: not UTF-8 ({error.reason}, {place}); convert it first")
        else:
            yield number, text
        offset += len(line)


def _parse(text: str):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"not JSON ({error})") from None


def checked(row) -> dict:
    """A row whose known keys hold what they should; a null is as good as absent. Anything else is a UserError."""
    if not isinstance(row, dict):
        raise UserError(f"a row is an object like {{'text': ...}}, not {str(row)[:40]!r}")
    row = {key: value for key, value in row.items() if value is not None}
    for key in (*ASKED, *LEARNED):
        if key in row and not isinstance(row[key], str):
            raise UserError(f"{key!r} should be a string, not {str(row[key])[:40]!r}")
        utf8(row.get(key, ""))
    for key in TURNS:
        if key in row:
            turns = row[key] if isinstance(row[key], list) else [None]
            for turn in turns:
                who, what = _turn_keys(turn) if isinstance(turn, dict) else (None, None)
                if who is None or not (isinstance(turn[who], str) and isinstance(turn[what], str)):
                    raise UserError(f"{key!r} should be a list of objects with role and content, as strings")
                utf8(turn[what])
    return row


def _turn_keys(turn: dict) -> tuple[str, str] | tuple[None, None]:
    """How a turn names its speaker and its text: role and content, or ShareGPT's from and value."""
    return next((keys for keys in TURNS.values() if all(key in turn for key in keys)), (None, None))


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


def texts_of(row: dict) -> list[str]:
    """The texts of a row of any schema: a document's text, a pair's three, a conversation's turns."""
    if "text" in row:
        return [row["text"]]
    if "chosen" in row or "rejected" in row:
        return list(preference_of(row))
    return [message["content"] for message in messages_of(row)]


def with_texts(row: dict) -> dict:
    """The row, if it is of a schema that `texts_of` knows."""
    texts_of(row)
    return row


def text_of(row: dict) -> str:
    """The text of a row of any schema; those of a conversation or a pair are joined by newlines."""
    return "\n".join(texts_of(row))


def read_texts(
    inputs: Iterable[str | Path], sample_by: SampleBy = "line", on_bad: Callable[[str], None] = refuse
) -> Iterator[str]:
    """`text_of` every row of the inputs."""
    return read_rows(inputs, sample_by, text_of, on_bad)


def messages_of(row: dict) -> list[dict]:
    """A conversation in any schema people have -> [{"role", "content"}, ...].

    {"instruction", "input"?, "output"}, {"prompt", "response"}, {"messages": [{"role", "content"}]},
    {"conversations": [{"from": "human" | "gpt", "value"}]}
    """
    for key in TURNS:
        if key in row:
            named = [(turn, *_turn_keys(turn)) for turn in row[key]]
            return [{"role": ROLES.get(turn[who], turn[who]), "content": turn[what]} for turn, who, what in named]
    for question, answer in (("instruction", "output"), ("prompt", "response")):
        if question in row and answer in row:
            asked = row[question] + ("\n" + row["input"] if row.get("input") else "")
            return [{"role": "user", "content": asked}, {"role": "assistant", "content": row[answer]}]
    raise UserError(
        f"a row with the keys {', '.join(row) or 'none'} is no conversation and no text; expected instruction and "
        "output, prompt and response, messages, or conversations; or text"
    )


def preference_of(row: dict) -> tuple[str, str, str]:
    """{"prompt", "chosen", "rejected"} -> the three."""
    keys = ("prompt", "chosen", "rejected")
    if missing := [key for key in keys if key not in row]:
        raise UserError(f"a preference pair needs {', '.join(missing)} too; this row has {', '.join(row) or 'no keys'}")
    return tuple(row[key] for key in keys)


def write_rows(path: str | Path, rows: Iterable[dict]) -> int:
    """Write rows as .jsonl (.gz and .xz too), atomically; returns how many."""
    path = Path(path)
    count = 0
    with replacing(path) as beside, OPENERS.get(path.suffix, open)(beside, "wt", encoding="utf-8", newline="") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    return count
