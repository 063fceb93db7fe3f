"""Files that are never seen half-written, alone or as a set.

One file is written under a temporary name in the same directory, synced to the disk, and renamed:

    loss.png.4711-1.tmp ── written ── synced ── renamed ──> loss.png
    loss.png               the old file, or none, until the rename

4711 is the number of the process and 1 counts its files, so two writers never share a name. Files
that belong together, such as the shards of a corpus, are replaced together: see `together`.

Read in this order: `replacing`, `together`, `finish`; then the small writers.
"""

import contextlib
import io
import itertools
import json
import os
import re
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

try:
    import fcntl
except ImportError:  # Windows, where a file that is open cannot be deleted
    fcntl = None  # type: ignore[assignment]

from nanophi.cli import UserError
from nanophi.expect import Expected, check_fields, read_json

# Files of tokenizers, models and runs. They are no documents, and no command writes others over
# them.
TOKENIZER_NAMES = frozenset(
    ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.tsv"]
)
MODEL_NAMES = frozenset(
    [
        *("config.json", "generation_config.json"),
        *("model.safetensors", "model.safetensors.index.json"),
        *("run.json", "metrics.jsonl", "train_state.pt"),
    ]
)
OWN_NAMES = TOKENIZER_NAMES | MODEL_NAMES

# ---- one file

TEMPORARY = re.compile(r"\.\d+-\d+\.tmp$")  # how the names of files that are being written end
_numbers = itertools.count(1)


def temporary_name(path: Path) -> Path:
    """A name beside `path` that no other writer uses."""
    return path.with_name(f"{path.name}.{os.getpid()}-{next(_numbers)}.tmp")


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path in the same directory. On success that file becomes `path`; on any
    error it is removed.

        with replacing("out/model.bin") as beside:
            beside.write_bytes(data)

    A process may be killed at any moment: the old file or the new one is left, because a rename is
    atomic under POSIX. A temporary file that a killed process left goes when the next writer of the
    same name comes. A link stays a link: the file that it points to is replaced. The new file has
    the permissions of the old one.
    """
    path = Path(os.path.realpath(path))
    refuse_special(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path)
    beside = temporary_name(path)
    held = hold(beside)
    try:
        yield beside
        with open(beside, "rb+") as file:
            os.fsync(file.fileno())  # a power cut may keep the rename and lose the data
        if path.exists():
            os.chmod(beside, stat.S_IMODE(path.stat().st_mode))
        if _open.files is None:
            os.replace(beside, path)
            held.close()
        else:
            _open.files.rename(beside, path, held)
    except BaseException as error:  # also Ctrl-C
        held.close()
        beside.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # a full disk does not say which file it has no room for
        raise


def refuse_special(path: Path) -> None:
    """A UserError for a path that is there and is no regular file: a folder, a pipe, a device."""
    if os.path.lexists(path) and not path.is_file():
        kind = "a folder" if path.is_dir() else "no regular file"
        raise UserError(f"{path} is {kind}: name a file to write")


# ---- what killed processes leave


def hold(beside: Path) -> IO:
    """Create a temporary file and lock it, which shows `remove_leftovers` that it is in use."""
    if fcntl is None:
        return io.BytesIO()  # nothing is held
    file = open(beside, "wb")  # noqa: SIM115 - the caller closes it
    try_lock(file)
    return file


def remove_leftovers(path: Path) -> None:
    """Remove the temporary files that killed writers of `path` have left beside it."""
    if fcntl is None or not path.parent.is_dir():
        return
    for other in path.parent.iterdir():
        ending = other.name.removeprefix(path.name)
        if ending != other.name and TEMPORARY.fullmatch(ending) and not is_locked(other):
            other.unlink(missing_ok=True)


def try_lock(file: IO) -> bool:
    """Lock an open file; False where somebody else holds its lock.

    The system frees the lock when the file is closed, also by the death of the process. Where a
    file system knows no locks, everybody gets one.
    """
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def is_locked(path: Path) -> bool:
    """Whether somebody holds the lock of a file, or it cannot be opened."""
    try:
        with open(path, "rb") as file:
            return not try_lock(file)
    except OSError:
        return True


# ---- several files: all or none

READY = "ready.tmp"  # the list of renames and deletions that count, in the directory itself


class FileSet:
    """Renames and deletions that are done together, within one directory or anywhere."""

    def __init__(self, directory: Path | None):
        self.directory = directory and Path(os.path.realpath(directory))
        self.renames: list[tuple[str, str]] = []  # paths in the directory, or whole ones
        self.deletions: list[str] = []
        self.held: list[IO] = []  # the locks of the temporary files

    def rename(self, beside: Path, path: Path, held: IO | None = None) -> None:
        """`beside` becomes `path` at the end."""
        self.renames.append((self._within(beside), self._within(path)))
        if held is not None:
            self.held.append(held)

    def delete(self, path: Path) -> None:
        """`path` goes at the end."""
        self.deletions.append(self._within(path))

    def _within(self, path: Path) -> str:
        whole = Path(os.path.realpath(path))
        return (
            str(whole) if self.directory is None else whole.relative_to(self.directory).as_posix()
        )

    def _place(self, path: str) -> Path:
        return Path(path) if self.directory is None else self.directory / path

    def do(self) -> None:
        """Rename and delete. What has been done before is passed over."""
        for beside, path in self.renames:
            with contextlib.suppress(FileNotFoundError):
                os.replace(self._place(beside), self._place(path))
        for path in self.deletions:
            self._place(path).unlink(missing_ok=True)

    def undo(self) -> None:
        """Delete the temporary files."""
        for beside, _ in self.renames:
            self._place(beside).unlink(missing_ok=True)

    def let_go(self) -> None:
        for file in self.held:
            file.close()


class _Open(threading.local):
    """The set that the `together` of this thread collects; None outside of one."""

    files: FileSet | None = None


_open = _Open()


@contextlib.contextmanager
def together(directory: str | Path | None = None) -> Iterator[FileSet]:
    """All files that are replaced inside of this block appear at its end, or none of them.

        with together("out/tokenizer"):
            write_text("out/tokenizer/a.json", ...)
            write_text("out/tokenizer/b.json", ...)

        written      a.json.17-1.tmp   b.json.17-2.tmp
        ready.tmp    a list of the renames: from here on all of them count
        renamed      a.json   b.json
        ready.tmp    goes

    If the process is killed between two renames, `finish` does the rest, which those who read the
    directory call first. Without a directory, for files that lie here and there, no such list is
    kept. A block within another one joins it.
    """
    if _open.files is not None:
        yield _open.files
        return
    if directory is not None:
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        finish(directory)
    files = FileSet(directory)
    _open.files = files
    try:
        yield files
    except BaseException:
        files.undo()
        raise
    else:
        _open.files = None  # so that the list is written at once
        if directory is not None:
            plan = {"renames": files.renames, "deletions": files.deletions}
            write_json(directory / READY, plan)
        files.do()
        if directory is not None:
            (directory / READY).unlink(missing_ok=True)
    finally:
        _open.files = None
        files.let_go()


def finish(directory: str | Path) -> None:
    """Do the rest of the renames that a killed `together` has left."""
    directory = Path(directory)
    ready = directory / READY
    if not ready.exists():
        return
    plan = read_json(ready)
    texts = Expected(list, of=Expected(str))
    fields = {"renames": Expected(list, of=texts), "deletions": texts}
    check_fields(plan, fields, ready)
    files = FileSet(directory)
    for path in itertools.chain(*plan["renames"], plan["deletions"]):
        # The directory may come from anywhere: nothing outside of it is touched.
        if not Path(os.path.realpath(directory / path)).is_relative_to(os.path.realpath(directory)):
            raise UserError(f"{ready} names {path}, which is not in {directory}: delete {ready}")
    for beside, path in (pair for pair in plan["renames"] if len(pair) == 2):
        if any(part.endswith(".tmp") for part in Path(beside).parts):
            files.renames.append((beside, path))
    files.deletions = plan["deletions"]
    files.do()
    ready.unlink(missing_ok=True)


# ---- small writers


def write_text(path: str | Path, text: str) -> None:
    """Write `text` as UTF-8. Newlines stay as they are, on Windows too."""
    with replacing(path) as beside:
        beside.write_bytes(text.encode("utf-8"))


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON. Chinese stays Chinese: "你", not "\\u4f60"."""
    text = json.dumps(value, ensure_ascii=False, indent=2)
    try:
        utf8(text)
    except UserError:  # a file name that is no text
        text = json.dumps(value, indent=2)
    write_text(path, text + "\n")


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
