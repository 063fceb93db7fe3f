"""Output files: one file of rows, or numbered files that a later command continues.

    write_rows("news.jsonl", rows)           news.jsonl
    write_files("news.jsonl", rows, 1000)    news-00000.jsonl  news-00001.jsonl  ...

A file appears under its name only when it is complete, and numbered files all together. Until then
they are collected in a folder beside:

    news.jsonl.tmp/      news-00000.jsonl  news-00001.jsonl  settings
        the last one is complete: the old numbered files go, and these take their places

So numbered files are resumable: each is made of the same number of rows read, and their number says
which row comes next. The settings beside them hold the flags that decide what is in them, so that
`Numbered` refuses to go on with other flags:

    news.jsonl.settings    {"sample": 1.0, ..., "files": [["raw/a.jsonl", 20113]]}

formats.py writes the rows; corpus.py offers `write_rows` to the other packages.
"""

import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any

from nanophi.claims import Output
from nanophi.cli import UserError
from nanophi.expect import check_fields, read_json
from nanophi.files import finish, replacing, together, write_json
from nanophi.text.formats import FORMATS, as_it_is, opened, writable, write_jsonl

# ---- 1. one file


def rows_output(flag: str, path: str | None) -> Output:
    """An output of rows, to be claimed; a UserError where its name says no format."""
    if path is not None:
        writable(path)
    return Output(flag, path)


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
    name = re.compile(re.escape(numbered(path, 0).name).replace("00000", r"\d{5,}"))
    files = [file for file in folder.iterdir() if name.fullmatch(file.name)]
    return sorted(files, key=lambda file: (len(file.name), file.name))


def write_files(path: str | Path, rows: Iterable[dict], rows_per_file: int) -> int:
    """Write rows as numbered files; returns how many rows. Files that exist already are not
    touched: a UserError.
    """
    existing = numbered_files(path)
    if existing:
        raise UserError(
            f"{existing[0]} is there already: delete it (and those behind it) or name another --out"
        )
    files = Numbered(path)
    written = files.write_groups(rows, rows_per_file)
    files.publish()
    return written


# ---- 3. collecting and resuming


def settings_of(path: str | Path) -> Path:
    """The file that says how the numbered files of a path were made. Its name has no format of
    documents, so that no command reads it as one.
    """
    return Path(f"{path}.settings")


class Numbered:
    """The numbered files of a path while they are made.

    complete: how many of them are there, up to the first gap
    """

    def __init__(self, path: str | Path, settings: dict | None = None, resume: bool = False):
        """settings: the flags that decide what is in the files

        resume: go on behind the files of an interrupted run, or else of a finished one; a UserError
        where they were made with other settings. Without it, what an interrupted run has left goes
        """
        self.path = Path(path)
        self.folder = Path(f"{path}.tmp")
        now = json.loads(json.dumps(settings))  # tuples become lists, as in the file
        self.complete = 0
        finish(self.path.parent)
        if resume and self.folder.is_dir():
            _refuse_other_settings(self.folder / "settings", now)
        elif resume and settings_of(path).exists():
            _refuse_other_settings(settings_of(path), now)
            self.folder = self.path.parent
        else:
            self._begin(now)
            return
        while self.place(self.complete).exists():
            self.complete += 1

    def _begin(self, settings: Any) -> None:
        """An empty folder with the settings; old files must be such as may be replaced."""
        existing = numbered_files(self.path)
        if existing and not settings_of(self.path).exists():
            raise UserError(
                f"{existing[0]} is there, and {settings_of(self.path)} does not say whence: name "
                "another --out"
            )
        if self.folder.is_dir():
            shutil.rmtree(self.folder)
        self.folder.mkdir(parents=True)
        if settings is not None:
            write_json(self.folder / "settings", settings)

    def place(self, number: int) -> Path:
        """Where a numbered file is while it is made."""
        return self.folder / numbered(self.path, number).name

    def write_groups(
        self,
        rows: Iterable[dict],
        size: int,
        change: Callable[[Iterator[dict]], Iterable[dict]] = as_it_is,
    ) -> int:
        """Write each group of `size` rows as one file, behind those that are complete; returns how
        many rows were written.

        change: what is done to the rows of a group before they are written; it may drop some
        """
        rows = iter(rows)
        written = 0
        while True:
            first_row = next(rows, None)
            if first_row is None:
                return written
            group = chain([first_row], islice(rows, size - 1))
            written += write_rows(self.place(self.complete), change(group))
            self.complete += 1

    def publish(self) -> None:
        """Give the files their places, instead of the old ones, all at once."""
        if self.folder == self.path.parent:
            return
        new = [self.place(number) for number in range(self.complete)]
        with together(self.path.parent) as files:
            for file in new:
                files.rename(file, self.path.parent / file.name)
            if (self.folder / "settings").exists():
                files.rename(self.folder / "settings", settings_of(self.path))
            for old in numbered_files(self.path)[len(new) :]:
                files.delete(old)
        shutil.rmtree(self.folder)

    def discard(self) -> None:
        """Delete what was made."""
        if self.folder != self.path.parent:
            shutil.rmtree(self.folder)


def _refuse_other_settings(file: Path, now: dict) -> None:
    advice = "leave --resume out"
    before = read_json(file, advice)
    check_fields(before, {}, file, advice)
    differing = [name for name in now if before.get(name) != now[name]]
    if differing:
        raise UserError(f"--resume: {', '.join(differing)} differ from what {file} says; {advice}")


# ---- 4. rows that are read more than once and kept nowhere


@contextmanager
def kept_rows(rows: Iterable[dict], beside: str | Path) -> Iterator[Iterable[dict]]:
    """Yield the rows as something that can be iterated over again and again.

    They lie in a file without a name, on the disk of the path `beside`: it goes with the process,
    however that ends. One iteration must end before the next one begins.
    """
    folder = Path(beside).parent
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile("w+", encoding="utf-8", newline="\n", dir=folder) as file:
        write_jsonl(file, rows)
        yield _Kept(file)


@dataclass(frozen=True)
class _Kept:
    """The rows of a .jsonl file that is open, from its beginning each time."""

    file: IO

    def __iter__(self) -> Iterator[dict]:
        self.file.seek(0)
        return map(json.loads, self.file)
