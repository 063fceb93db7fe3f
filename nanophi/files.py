"""Files that are never seen half-written: each is written beside its name, synced, then renamed over it."""

import contextlib
import json
import os
from pathlib import Path

from nanophi.cli import UserError


@contextlib.contextmanager
def replacing(path: str | Path):
    """Yield a temporary path in the same directory; on success it becomes `path`, on any error it is removed.

    A process killed at any moment leaves either the old file or the new one (POSIX rename is atomic), plus at
    worst a `*.tmp` file that the next writer of the same name overwrites.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".tmp")
    try:
        yield beside
        with open(beside, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def write_text(path: str | Path, text: str) -> None:
    """Write `text` as UTF-8 without touching its newlines."""
    with replacing(path) as beside:
        beside.write_bytes(text.encode("utf-8"))


def write_json(path: str | Path, value) -> None:
    """Write `value` as readable JSON, Chinese as Chinese."""
    write_text(path, json.dumps(value, ensure_ascii=False, indent=2) + "\n")


def utf8(text: str) -> bytes:
    """The bytes of a text. JSON may spell half of a surrogate pair ("\\ud83d"), which is no character: a UserError."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        place = f"U+{ord(text[error.start]):04X} at character {error.start:,}"
        raise UserError(
            f"half of a surrogate pair ({place}) is no character: clean the text first"
        ) from None
