"""Reading and writing documents: the one place that knows file formats and row schemas. Streaming throughout.

    .jsonl / .json   one object a line / one array of objects        .txt   a document per line, paragraph or file
    each of them plain or .gz / .xz

A document is {"text": str, ...}; conversations and preference pairs keep their own keys, see `messages_of` and
`preference_of`.
"""

import glob
import gzip
import json
import lzma
from collections.abc import Iterable, Iterator
from pathlib import Path

from nanophi.cli import UserError
from nanophi.files import replacing

OPENERS = {".gz": gzip.open, ".xz": lzma.open}
FORMATS = (".jsonl", ".json", ".txt")


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


def open_text(path: Path, mode: str = "rt"):
    """Open plain or compressed text as UTF-8; newlines stay as they are."""
    return OPENERS.get(path.suffix, open)(path, mode, encoding="utf-8", newline="")


def read_rows(inputs: Iterable[str | Path], sample_by: str = "line") -> Iterator[dict]:
    """Every row of the inputs, in order. A .txt file gives {"text": ...} by line, paragraph or document."""
    for path in expand(inputs):
        kind = format_of(path)
        if kind is None:
            raise UserError(f"{path}: unknown format; known are {', '.join(FORMATS)}, plain or .gz or .xz")
        try:
            with open_text(path) as file:
                yield from _rows(file, kind, path, sample_by)
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8 ({error.reason} at byte {error.start}); convert it first") from None


def _rows(file, kind: str, path: Path, sample_by: str) -> Iterator[dict]:
    if kind == ".txt":
        yield from ({"text": text} for text in split_text(file, sample_by))
        return
    if kind == ".json":
        try:
            rows = json.load(file)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}: not JSON ({error}); one object a line is called .jsonl here") from None
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise UserError(f"{path} holds no array of objects")
        yield from rows
        return
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {number}: not JSON ({error.msg} at character {error.pos})") from None
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number}: a row is an object like {{'text': ...}}, not {line.strip()[:40]}")
        yield row


def split_text(lines: Iterable[str], sample_by: str) -> Iterator[str]:
    """Lines of a .txt file -> documents, blank ones dropped. Paragraphs end at blank lines, a document at the end."""
    if sample_by not in ("line", "paragraph", "document"):
        raise UserError(f"--sample-by {sample_by}: choose line, paragraph or document")
    held: list[str] = []
    for line in lines:
        ends = sample_by == "line" or (sample_by == "paragraph" and not line.strip())
        held.append(line)
        if ends:
            if text := "".join(held).strip():
                yield text
            held = []
    if text := "".join(held).strip():
        yield text


def read_texts(inputs: Iterable[str | Path], sample_by: str = "line") -> Iterator[str]:
    """The text of every document. Rows of another schema give all their texts, joined by newlines."""
    for row in read_rows(inputs, sample_by):
        if "text" in row:
            yield row["text"]
        elif (preference := preference_of(row)) is not None:
            yield "\n".join(preference)
        else:
            yield "\n".join(message["content"] for message in messages_of(row))


def messages_of(row: dict) -> list[dict]:
    """A conversation in any schema people have -> [{"role", "content"}, ...].

    {"instruction", "input"?, "output"}, {"prompt", "response"}, {"messages": [{"role", "content"}]},
    {"conversations": [{"from": "human" | "gpt", "value"}]}
    """
    if "messages" in row:
        return [{"role": m["role"], "content": m["content"]} for m in row["messages"]]
    if "conversations" in row:
        roles = {"human": "user", "gpt": "assistant"}
        return [{"role": roles.get(m["from"], m["from"]), "content": m["value"]} for m in row["conversations"]]
    for question, answer in (("instruction", "output"), ("prompt", "response")):
        if question in row and answer in row:
            asked = row[question] + ("\n" + row["input"] if row.get("input") else "")
            return [{"role": "user", "content": asked}, {"role": "assistant", "content": row[answer]}]
    raise UserError(
        f"a row with the keys {', '.join(row)} is no conversation; expected instruction and output, prompt and "
        "response, messages, or conversations"
    )


def preference_of(row: dict) -> tuple[str, str, str] | None:
    """{"prompt", "chosen", "rejected"} -> the three; None where the row is of another kind."""
    keys = ("prompt", "chosen", "rejected")
    return tuple(row[key] for key in keys) if all(key in row for key in keys) else None


def write_rows(path: str | Path, rows: Iterable[dict]) -> int:
    """Write rows as .jsonl (.gz and .xz too), atomically; returns how many."""
    path = Path(path)
    count = 0
    with replacing(path) as beside, OPENERS.get(path.suffix, open)(beside, "wt", encoding="utf-8", newline="") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    return count
