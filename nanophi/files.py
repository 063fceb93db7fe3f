"""Files that are never seen half-written.

Each is written under a temporary name in the same directory, synced to the disk, and then renamed:

    loss.png.tmp ── written ── synced ── renamed ──> loss.png
    loss.png        the old file, or none, until the rename
"""

import contextlib
import json
import os
from pathlib import Path

from nanophi.cli import UserError


@contextlib.contextmanager
def replacing(path: str | Path):
    """Yield a temporary path in the same directory. On success that file becomes `path`; on any
    error it is removed.

        with replacing("out/model.bin") as beside:
            beside.write_bytes(data)

    A process may be killed at any moment: the old file or the new one is left, because a rename is
    atomic under POSIX. At worst a `*.tmp` file is left too, which the next writer of the same name
    overwrites.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".tmp")
    try:
        yield beside
        with open(beside, "rb+") as file:
            os.fsync(file.fileno())  # otherwise a power cut may keep the rename and lose the data
        os.replace(beside, path)
    except BaseException:  # also Ctrl-C
        beside.unlink(missing_ok=True)
        raise


def write_text(path: str | Path, text: str) -> None:
    """Write `text` as UTF-8. Newlines stay as they are, on Windows too."""
    with replacing(path) as beside:
        beside.write_bytes(text.encode("utf-8"))


def write_json(path: str | Path, value) -> None:
    """Write `value` as indented JSON. Chinese stays Chinese: "你", not "\\u4f60"."""
    write_text(path, json.dumps(value, ensure_ascii=False, indent=2) + "\n")


def utf8(text: str) -> bytes:
    """The UTF-8 bytes of a text.

    >>> utf8("你")
    b'\\xe4\\xbd\\xa0'

    JSON may spell half of a surrogate pair ("\\ud83d"). That is no character, and UTF-8 has no
    bytes for it, so it is a UserError.
    """
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        place = f"U+{ord(text[error.start]):04X} at character {error.start:,}"
        raise UserError(
            f"half of a surrogate pair ({place}) is no character: clean the text first"
        ) from None
