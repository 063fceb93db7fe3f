"""Rows to files, in the formats that `formats.py` reads: functions (file, rows)."""

import csv
import json
from collections.abc import Iterable
from itertools import islice
from typing import IO

from nanophi.cli import UserError
from nanophi.text.formats import load_parquet
from nanophi.text.schemas import text_of


def as_json(row: dict) -> str:
    """A row as JSON, Chinese as Chinese; dates and the like of a parquet file as text."""
    text = json.dumps(row, ensure_ascii=False, default=str)
    try:
        text.encode()
    except UnicodeEncodeError:  # half a surrogate pair, in a key that nobody reads
        return json.dumps(row, default=str)
    return text


def write_jsonl(file: IO, rows: Iterable[dict]) -> None:
    for row in rows:
        file.write(as_json(row) + "\n")


def write_json(file: IO, rows: Iterable[dict]) -> None:
    between = "[\n"
    for row in rows:
        file.write(between + as_json(row))
        between = ",\n"
    file.write("\n]\n" if between != "[\n" else "[]\n")


def write_txt(file: IO, rows: Iterable[dict]) -> None:
    """Paragraphs, as --sample-by paragraph reads them: a blank line ends a document, those inside of it go."""
    for row in rows:
        file.write("\n".join(line for line in text_of(row).split("\n") if line.strip()) + "\n\n")


def write_csv(file: IO, rows: Iterable[dict]) -> None:
    table = None
    for row in rows:
        if table is None:
            table = csv.DictWriter(file, row, lineterminator="\n")
            table.writeheader()
        if row.keys() - set(table.fieldnames) or any(
            isinstance(value, list | dict) for value in row.values()
        ):
            raise UserError(
                f"a .csv has one header and flat values; not so {str(row)[:60]}: write .jsonl"
            )
        table.writerow(row)


def write_parquet(file: IO, rows: Iterable[dict]) -> None:
    """The columns are the keys of the first 1,024 rows; a row that lacks one has a null there."""
    parquet, writer = load_parquet(), None
    import pyarrow

    rows = iter(rows)
    try:
        while (batch := list(islice(rows, 1024))) or writer is None:
            keys = (
                writer.schema.names
                if writer
                else list(dict.fromkeys(key for row in batch for key in row))
            )
            if writer and (more := {key for row in batch for key in row} - set(keys)):
                raise UserError(
                    f"{', '.join(sorted(more))}: a key that none of the first 1,024 rows has; write .jsonl"
                )
            filled = [{key: row.get(key) for key in keys} for row in batch]
            table = pyarrow.Table.from_pylist(filled, schema=writer and writer.schema)
            writer = writer or parquet.ParquetWriter(file, table.schema)
            writer.write_table(table)
    except pyarrow.ArrowException as error:
        raise UserError(f"the rows do not fit one table ({error}): write .jsonl") from None
    finally:
        if writer is not None:
            writer.close()


WRITERS = {
    ".jsonl": write_jsonl,
    ".json": write_json,
    ".csv": write_csv,
    ".parquet": write_parquet,
    ".txt": write_txt,
}
