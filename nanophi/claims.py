"""What a command writes is claimed here, before any work.

    with claim(inputs, Output("--out", "clean.jsonl"), Output("--dropped", None)):
        ...                              nobody else writes these files now

An output is refused where that would lose something: it is an input, a file of another kind, a file
of a model, tokenizer or run; or where it could not be written at the end. While a command works, a
lock says so:

    clean.jsonl.lock     beside a file that is being written: the number of the process
    out/sft/.lock        in a directory that is being written

The system frees the lock of a process that dies. The file that it leaves is taken over.

Read in this order: `Output`, `claim`, `Lock`. train/run_files.py claims the directories of runs.
"""

import contextlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from nanophi.cli import UserError, at_end
from nanophi.files import (
    OWN_NAMES,
    fcntl,
    refuse_special,
    remove_leftovers,
    try_lock,
)

# How files of a kind begin, by the end of their names.
BEGINNINGS = {
    ".png": b"\x89PNG",
    ".parquet": b"PAR1",
    ".gz": b"\x1f\x8b",
    ".bz2": b"BZh",
    ".xz": b"\xfd7zXZ",
    ".zst": b"\x28\xb5\x2f\xfd",
    ".jsonl": b"{",
    ".json": b"[",
}


@dataclass(frozen=True)
class Output:
    """Something that a command writes.

    flag:   names it in messages, such as "--out"
    path:   None where the command does not write it this time
    suffix: how the name must end, where that says the kind: ".png"
    begins: how files of its kind begin; None: as BEGINNINGS says
    folder: a directory is written and not a file
    files:  names of the files that are written into the directory
    foreign: names of files whose presence says that the directory holds something else
    """

    flag: str
    path: str | Path | None
    suffix: str = ""
    begins: bytes | None = None
    folder: bool = False
    files: tuple[str, ...] = ()
    foreign: tuple[str, ...] = ()


@contextlib.contextmanager
def claim(inputs: Iterable[str | Path], *outputs: Output) -> Iterator[None]:
    """Refuse outputs that would lose something, or lock them until the end of the block.

    inputs: the files and directories that the command reads
    """
    written = [output for output in outputs if output.path is not None]
    read = {os.path.realpath(path) for path in inputs}
    seen: dict[str, str] = {}
    for output in written:
        refuse(output, read)
        real = os.path.realpath(str(output.path))
        if real in seen:
            raise UserError(f"{seen[real]} and {output.flag} are one file, {output.path}")
        seen[real] = output.flag
    with contextlib.ExitStack() as locks:
        for output in written:
            locks.callback(Lock(Path(str(output.path)), output.folder, output.flag).release)
        yield


def refuse(output: Output, read: set[str] = frozenset()) -> None:  # type: ignore[assignment]
    """A UserError for an output that would lose something or cannot be written.

    read: the real paths of all inputs
    """
    assert output.path is not None
    if not str(output.path).strip():
        raise UserError(f"{output.flag} is empty: name what to write")
    path = Path(os.path.realpath(output.path))
    if output.folder:
        _refuse_folder(output, path, read)
    else:
        _refuse_file(output, path, read)
    above = path if path.is_dir() else _first_that_exists(path)
    if not above.is_dir():
        raise UserError(f"{output.flag} {output.path}: {above} is a file and no directory")
    if not os.access(above, os.W_OK | os.X_OK):
        raise UserError(f"{output.flag} {output.path}: {above} is write-protected")


def _refuse_file(output: Output, path: Path, read: set[str]) -> None:
    if str(path) in read:
        raise UserError(
            f"{output.flag} {output.path} is an input and would be overwritten: name another file"
        )
    if not path.name.endswith(output.suffix):
        raise UserError(f"{output.flag} {output.path}: its name should end in {output.suffix}")
    refuse_special(path)
    if not path.exists():
        return
    if path.name in OWN_NAMES:
        raise UserError(
            f"{output.flag} {output.path} is a file of a model, tokenizer or run, which it would "
            "destroy: name another file"
        )
    if not os.access(path, os.W_OK):
        raise UserError(f"{output.flag} {output.path} is write-protected")
    begins = BEGINNINGS.get(path.suffix, b"") if output.begins is None else output.begins
    with open(path, "rb") as file:
        head = file.read(1024).removeprefix(b"\xef\xbb\xbf")
    is_text = path.suffix not in (".png", ".parquet", ".gz", ".bz2", ".xz", ".zst")
    has_zeros = is_text and b"\0" in head and not head.startswith((b"\xff\xfe", b"\xfe\xff"))
    if head.strip() and (has_zeros or not head.lstrip().startswith(begins)):
        raise UserError(
            f"{output.flag} {output.path} is there and is a file of another kind: delete it, or "
            "name another file"
        )


def _refuse_folder(output: Output, path: Path, read: set[str]) -> None:
    if path.exists() and not path.is_dir():
        raise UserError(f"{output.flag} {output.path} is a file: name a directory")
    for name in output.files:
        if str(path / name) in read:
            raise UserError(
                f"{output.flag} {output.path}: {name} in it is an input and would be overwritten: "
                "name another directory"
            )
    present = [name for name in output.foreign if (path / name).exists()]
    if present:
        raise UserError(
            f"{output.flag} {output.path} holds a model or run ({present[0]}), which it would "
            "spoil: name another directory"
        )


def _first_that_exists(path: Path) -> Path:
    """The nearest directory above a path that is there."""
    return next(above for above in path.parents if os.path.lexists(above))


# ---- locks

_held: dict[str, "Lock"] = {}  # of this process, by path


class Lock:
    """Says that this process writes an output, until `release` or the end of the command."""

    def __init__(self, path: Path, folder: bool, flag: str = "--out"):
        """A UserError where another process writes the output. Directories are made."""
        self.process = os.getpid()
        self.output = Path(os.path.realpath(path))
        directory = self.output if folder else self.output.parent
        self.made = [above for above in (directory, *directory.parents) if not above.exists()]
        directory.mkdir(parents=True, exist_ok=True)
        self.path = directory / ".lock" if folder else Path(f"{self.output}.lock")
        # A process that begins again, as in a notebook, takes over what it has left.
        earlier = _held.pop(str(self.path), None)
        if earlier is not None:
            self.made = earlier.made
            earlier.release(keep_folders=True)
        self.file = self._acquire(flag)
        self.file.truncate(0)
        self.file.write(f"{os.getpid()}\n".encode())
        self.file.flush()
        _held[str(self.path)] = self
        at_end.callback(self.release)
        if not folder:
            remove_leftovers(self.output)

    def _acquire(self, flag: str) -> IO:
        """The lock file, open and locked."""
        while True:
            file = open(self.path, "ab+")  # noqa: SIM115 - it is held until `release`
            if not try_lock(file):
                file.seek(0)
                writer = file.read(20).decode("ascii", "ignore").strip() or "another"
                file.close()
                raise UserError(
                    f"{self.output} is being written by process {writer}: wait for its end, or "
                    f"name another {flag}"
                )
            # Between the opening and the lock, the process before may have deleted the file.
            if self.path.exists() and os.path.samestat(os.fstat(file.fileno()), self.path.stat()):
                return file
            file.close()

    def release(self, keep_folders: bool = False) -> None:
        """Let others write; the directories that were made and are still empty go."""
        if self.file.closed or self.process != os.getpid():  # a forked process has a copy
            return
        _held.pop(str(self.path), None)
        if fcntl is None:
            self.file.close()  # Windows deletes no open file
        self.path.unlink(missing_ok=True)
        self.file.close()
        for directory in [] if keep_folders else self.made:
            with contextlib.suppress(OSError):
                directory.rmdir()
