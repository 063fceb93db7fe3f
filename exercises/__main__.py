"""python -m exercises: what is passed, and what is not yet; see exercises/__init__.py."""

import shutil
import sys
import traceback
from pathlib import Path

from exercises import FOLDER, Exercise, exercises


def main(words: list[str]) -> int:
    known = {exercise.number: exercise for exercise in exercises()}
    numbers = [word for word in words if not word.startswith("-")]
    flags = [word for word in words if word.startswith("-")]
    is_wrong = any(not word.isdigit() or int(word) not in known for word in numbers)
    if is_wrong or set(flags) - {"--reference"}:
        print(
            f"error: exercises are 1 to {max(known)}, as in `python -m exercises 7`; "
            "--reference tests the library's own answer",
            file=sys.stderr,
        )
        return 2
    if numbers:
        passed = [show(known[int(word)], "--reference" in flags) for word in numbers]
        return 0 if all(passed) else 1
    for exercise in known.values():
        print(f"{state(exercise):8} {exercise.number:2}  {exercise.title}")
    print(
        "\npython -m exercises 1 begins the first one / 开始第一个；text / 题目: exercises/01_merge"
    )
    return 0


def state(exercise: Exercise) -> str:
    """passed, begun, or nothing yet."""
    is_begun = exercise.changes_library or (exercise.folder / "my.py").exists()
    if not is_begun:
        return ""
    if not any(exercise.failures("my").values()):
        return "passed"
    return "" if exercise.changes_library else "begun"


def show(exercise: Exercise, reference: bool) -> bool:
    """Test one exercise and print what fails, and where."""
    print(f"{exercise.number}  {exercise.title}")
    print(f"   read {exercise.folder / 'README.md'}, or README_zh.md")
    if exercise.changes_library:
        tested = "nanophi"
        if reference:
            patch = exercise.folder / "change.patch"
            print(f"   the answer: {patch}; where nanophi is unchanged, git apply takes it")
    elif reference:
        tested = "reference"
    else:
        tested = "my"
        mine = exercise.folder / "my.py"
        if not mine.exists():
            shutil.copy(exercise.folder / "stub.py", mine)
        print(f"   write {mine}")
    results = exercise.failures(tested)
    for name, error in results.items():
        print(f"   {'passes' if error is None else 'FAILS '}  {name}")
        if error is not None:
            reason = str(error).strip().split("\n")[0] or type(error).__name__
            print(f"           {place_of(error, exercise.changes_library)}: {reason}")
    return not any(results.values())


def place_of(error: Exception, in_library: bool) -> str:
    """File and line: the last one in my.py, or in the library where the exercise changes it, if the
    error came through there; else that in test.py.
    """
    frames = traceback.extract_tb(error.__traceback__)
    library = FOLDER.parent / "nanophi"
    for frame in reversed(frames):
        path = Path(frame.filename)
        if path.is_relative_to(library) if in_library else path.name == "my.py":
            return f"{path.name}:{frame.lineno}"
    for frame in reversed(frames):
        if Path(frame.filename).name == "test.py":
            return f"test.py:{frame.lineno}"
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}"


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
