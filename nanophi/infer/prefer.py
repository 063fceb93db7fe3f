"""Preferences that a person gives: which of two answers is better. dpo.py learns them.

    提问> 感冒了要怎么办？
    1                    | 2
    -------------------- | --------------------
    我不知道。           | 多喝温水，好好休息。
    better: 1, 2 or s(kip)> 2

    mine.jsonl   {"prompt": "感冒了要怎么办？", "chosen": "多喝温水……", "rejected": "我不知道。"}

The answers stand in random order and without the names of their models, so that only the words
count. Each choice is on the disk before the next question: see `Preferences`.
"""

import errno
import os
import random
from collections.abc import Callable
from pathlib import Path

from nanophi.cli import UserError
from nanophi.columns import side_by_side
from nanophi.expect import parse_json
from nanophi.infer.pairs import fault
from nanophi.text.formats import as_json
from nanophi.text.schemas import preference_of, row_checker

# ---- asking

Answer = Callable[[str], str]  # a question -> an answer, which has not been shown


def preferring(
    answers: tuple[Answer, Answer], preferences: "Preferences", seed: int
) -> Callable[[str], None]:
    """A function that shows two answers to a question, asks which is better, and keeps that."""

    def ask(question: str) -> None:
        first, second = (answer(question).strip() for answer in answers)
        useless = fault(first, second, threshold=1.0)  # no pair is more similar than 1
        if useless is not None:
            reason = "both answers are equal" if useless == "equal" else "an answer is empty"
            print(f"({reason}: there is nothing to choose)")
            return
        texts = [first, second]
        # A session may ask about one question only. So the order follows the question and the rows
        # that are there, too: the seed alone would put the same model first in each session.
        random.Random(f"{seed} {len(preferences)} {question}").shuffle(texts)
        print(side_by_side(["1", "2"], texts))
        choice = ask_for_choice()
        if choice is not None:
            chosen, rejected = texts if choice == 1 else reversed(texts)
            preferences.append({"prompt": question, "chosen": chosen, "rejected": rejected})

    return ask


def ask_for_choice() -> int | None:
    """1 or 2; None to skip, which Ctrl-D does too."""
    while True:
        try:
            typed = input("better: 1, 2 or s(kip)> ").strip()
        except EOFError:
            print()
            return None
        if typed == "s":
            return None
        if typed in ("1", "2"):
            return int(typed)


# ---- keeping

BEGIN = b'{"prompt": "'  # how each row begins that is written here


class Preferences:
    """A .jsonl file of preference pairs that grows by one row at a time.

        {"prompt": "你是谁？", "chosen": "小助手。", "rejected": "嗯。"}⏎
        {"prompt": "你好", "cho                             the process was killed here

    A row is written at once and synced to the disk. So at most the last one can be half there, and
    the next session removes that half.
    """

    def __init__(self, path: str | Path):
        """A UserError, and nothing changed, where a file is there that holds anything else."""
        self.path = Path(path)
        self.before = 0
        self.more = 0
        if self.path.exists():
            self.before, end = count_pairs(self.path)
            self._mend(end)

    def __len__(self) -> int:
        return self.before + self.more

    def __str__(self) -> str:
        if not len(self):
            return f"no preference was chosen, so {self.path} holds none"
        word = "preference" if self.more == 1 else "preferences"
        return (
            f"{self.more:,} {word} more, {len(self):,} in all, in {self.path}; "
            f"dpo.py --data {self.path} learns them"
        )

    def _mend(self, end: int) -> None:
        """Remove what is behind the whole rows, and end the last of them with a newline."""
        with open(self.path, "rb+") as file:
            size = file.seek(0, os.SEEK_END)
            if end < size:
                file.truncate(end)
                print(
                    f"note: {self.path} ended with half a row ({size - end:,} bytes), which an "
                    "interrupted session had left: it is removed"
                )
            elif end > 0:
                file.seek(end - 1)
                if file.read(1) != b"\n":  # an editor has saved it so
                    file.write(b"\n")

    def append(self, row: dict) -> None:
        """Write one row. It is whole and on the disk, or on any error not there."""
        line = f"{as_json(row)}\n".encode()
        with open(self.path, "ab", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            try:
                if file.write(line) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
                os.fsync(file.fileno())
            except BaseException:  # also Ctrl-C
                file.truncate(end)
                raise
        self.more += 1


def count_pairs(path: Path) -> tuple[int, int]:
    """How many pairs a file holds, and the place behind the last whole one, in bytes.

    A UserError where a row is no preference pair.
    """
    check = row_checker()
    rows = 0
    end = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                if line.strip():
                    encoding = "utf-8-sig" if number == 1 else "utf-8"
                    preference_of(check(parse_json(line.decode(encoding))))
                    rows += 1
            except ValueError as error:  # also a UserError, and what Python says of wrong bytes
                if is_half_a_row(line):
                    break
                raise UserError(
                    f"--prefer {path}, line {number}: {error}; only a file of preference pairs, "
                    "in UTF-8, is continued: name another"
                ) from None
            end += len(line)
    return rows, end


def is_half_a_row(line: bytes) -> bool:
    r"""Whether a line is the beginning of a row that was written here, and not all of it.

    >>> is_half_a_row(b'{"prompt": "a", "cho'), is_half_a_row(b'{"pro')
    (True, True)

    A row of another kind is no half, and neither is half a row of other files:

    >>> is_half_a_row(b'{"prompt": "a", "response": "b"}'), is_half_a_row(b'{"text": "a')
    (False, False)
    """
    is_ours = line.startswith(BEGIN) or BEGIN.startswith(line)
    if line.endswith(b"\n") or not is_ours:
        return False
    try:
        parse_json(line.decode())
    except ValueError:
        return True
    return False
