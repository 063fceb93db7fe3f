"""Output files: one file of rows, or numbered files that a later command continues.

    write_rows("news.jsonl", rows)           news.jsonl
    write_files("news.jsonl", rows, 1000)    news-00000.jsonl  news-00001.jsonl  ...

Each file appears under its name only when it is complete.

Numbered files are resumable: each is made of the same number of rows read, so their number says
which row comes next. A settings file beside them holds the flags that decide what is in them, so
that `complete_files` refuses to go on with other flags:

    news.jsonl.settings    {"sample": 1.0, ..., "files": [["raw/a.jsonl", 20113]]}

formats.py writes the rows; corpus.py, the door, offers `write_rows` to the other rooms.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from pathlib import Path

from nanophi.cli import UserError
from nanophi.files import replacing, write_json
from nanophi.text.formats import FORMATS, as_it_is, opened, writable

# ---- 1. one file


def write_rows(path: str | Path, rows: Iterable[dict]) -> int:
    """Write rows in the format that the name says, atomically; returns how many."""
    path = Path(path)
    form = FORMATS[writable(path)]
    write = form.write
    assert write is not None
    written = 0

    def counted() -> Iterator[dict]:
        nonlocal written
        for row in rows:
            written += 1
            yield row

    with replacing(path) as beside, opened(beside, form.mode, like=path) as file:
        write(file, counted())
    return written


# ---- 2. numbered files


def numbered(path: str | Path, number: int) -> Path:
    """The path of one numbered file.

    >>> numbered("out/news.jsonl.gz", 3).as_posix()
    'out/news-00003.jsonl.gz'
    """
    path = Path(path)
    stem = path.name.split(writable(path))[0]
    return path.with_name(f"{stem}-{number:05d}{path.name[len(stem) :]}")


def numbered_files(path: str | Path) -> list[Path]:
    """The numbered files of a path that exist, in order."""
    folder = Path(path).parent
    if not folder.exists():
        return []
    name = re.compile(re.escape(numbered(path, 0).name).replace("00000", r"\d{5}"))
    return sorted(file for file in folder.iterdir() if name.fullmatch(file.name))


def write_files(path: str | Path, rows: Iterable[dict], rows_per_file: int) -> int:
    """Write rows as numbered files; returns how many rows. Files that exist already are not
    touched: a UserError.
    """
    existing = numbered_files(path)
    if existing:
        raise UserError(
            f"{existing[0]} is there already: delete it (and those behind it) or name another --out"
        )
    return write_groups(path, rows, rows_per_file)


def write_groups(
    path: str | Path,
    rows: Iterable[dict],
    size: int,
    first_number: int = 0,
    change: Callable[[Iterator[dict]], Iterable[dict]] = as_it_is,
) -> int:
    """Write each group of `size` rows as one numbered file; returns how many rows were written.

    first_number: of the first file to write
    change: what is done to the rows of a group before they are written; it may drop some
    """
    rows = iter(rows)
    number = first_number
    written = 0
    while True:
        first_row = next(rows, None)
        if first_row is None:
            return written
        group = chain([first_row], islice(rows, size - 1))
        written += write_rows(numbered(path, number), change(group))
        number += 1


# ---- 3. resuming


def settings_of(path: str | Path) -> Path:
    """The file that says how the numbered files of a path were made. Its name has no format of
    documents, so that no command reads it as one.
    """
    return Path(f"{path}.settings")


def complete_files(path: str | Path, settings: dict, resume: bool) -> int:
    """How many numbered files of a path stay.

    resume: with it, which needs the settings file, all files up to the first gap stay; a UserError
        where they were made with other settings. Without it none stays: they are deleted, and
        `settings` is written
    """
    file = settings_of(path)
    now = json.loads(json.dumps(settings))  # tuples become lists, as in the file
    existing = numbered_files(path)
    if existing and not file.exists():
        raise UserError(
            f"{existing[0]} is there, and {file} does not say whence: name another --out"
        )
    if resume:
        _refuse_other_settings(file, now)
        complete = 0
        while numbered(path, complete).exists():
            complete += 1
        return complete
    # From the last to the first: if a kill interrupts this, the files that remain are still those
    # that a command with the old settings would continue.
    for old in reversed(existing):
        old.unlink()
    write_json(file, now)
    return 0


def _refuse_other_settings(file: Path, now: dict) -> None:
    before = json.loads(file.read_text(encoding="utf-8"))
    differing = [name for name in now if before.get(name) != now[name]]
    if differing:
        raise UserError(
            f"--resume: {', '.join(differing)} differ from what {file} says; leave --resume out"
        )
