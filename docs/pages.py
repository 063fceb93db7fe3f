"""The pages of docs/ run: every block of Python in them is executed, and what it prints is what the
page says.

    python -m docs.pages docs/en/03-fast-bpe.md            does the page say what its code prints?
    python -m docs.pages docs/en/03-fast-bpe.md --write    write what it prints into the page,
                                                           and into the same page in Chinese

A page is Markdown. A block of Python (or of a shell command) is followed by what it prints:

    ```python
    print(1 + 1)
    ```
    ```output
    2
    ```

The blocks of a page run in order and share their variables. The English page and the Chinese one
have the same blocks, so one of them is run, and `differences` compares the two.

Whole numbers and words are compared exactly, numbers with a decimal point to about two digits:
machines round differently.
"""

import codeop
import contextlib
import io
import re
import runpy
import shlex
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
LANGUAGES = ("en", "zh")

BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FRACTION = re.compile(r"-?\d[\d,]*\.\d+(?:e[+-]?\d+)?")  # a number with a decimal point
RUNS = ("python", "bash")


@dataclass
class Block:
    """A fenced block: its language, its text, and where it begins and ends in the page."""

    language: str
    text: str
    start: int
    stop: int


def blocks_of(page: str) -> list[Block]:
    """
    >>> [(b.language, b.text) for b in blocks_of("a\\n```python\\nx = 1\\n```\\nb\\n")]
    [('python', 'x = 1\\n')]
    """
    found = BLOCK.finditer(page)
    return [Block(m.group(1), m.group(2), m.start(), m.end()) for m in found]


def pages(language: str) -> list[Path]:
    return sorted((DOCS / language).glob("*.md"))


# ---- running a page


def run_page(path: Path) -> list[str]:
    """What each block of the page that can be run prints, in order."""
    variables: dict = {"__name__": "__main__"}
    printed = []
    for block in blocks_of(path.read_text(encoding="utf-8")):
        if block.language not in RUNS:
            continue
        run = run_python if block.language == "python" else run_command_lines
        try:
            printed.append(run(block.text, variables))
        except Exception as error:
            trace = "".join(traceback.format_exception(error)[-3:])
            raise AssertionError(f"{path.name}: this block fails:\n{block.text}\n{trace}") from None
    return printed


def run_python(code: str, variables: dict) -> str:
    """Run a block with the variables of the blocks before it; returns what it prints."""
    with caught() as printed:
        exec(compile(code, "<page>", "exec"), variables)
    return printed.getvalue()


def run_command_lines(commands: str, variables: dict) -> str:
    """Run each line `python ...` as the shell would, but in this process: starting torch for each
    of them would take most of the time.
    """
    with caught() as printed:
        for line in commands.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words:
                assert words[0] == "python", f"only commands of python are run: {line}"
                run_as_python(words[1:])
    return printed.getvalue()


def run_as_python(words: list[str]) -> None:
    """`python -m module ...` or `python script.py ...`, with the scripts of the repository."""
    is_module = words[0] == "-m"
    arguments = words[2:] if is_module else words[1:]
    before = sys.argv
    sys.argv = [words[1] if is_module else words[0], *arguments]
    try:
        if is_module:
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(str(ROOT / words[0]), run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise AssertionError(f"{shlex.join(words)} ends with {end.code}") from None
    finally:
        sys.argv = before


@contextlib.contextmanager
def caught():
    """Catch what is printed; progress bars, which go to stderr, are dropped."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(io.StringIO()):
        yield printed


def fault_when_pasted(code: str) -> str | None:
    """What Python's prompt would say to a block that is pasted line by line; None if nothing.

    The prompt ends a loop or a function at the first empty line, and at no other:

    >>> fault_when_pasted("for i in range(2):\\n    print(i)\\n\\nprint(7)\\n") is None
    True
    >>> fault_when_pasted("for i in range(2):\\n    print(i)\\nprint(7)\\n")
    'invalid syntax: print(7)'
    """
    begun: list[str] = []
    for line in [*code.splitlines(), ""]:
        begun.append(line)
        try:
            is_complete = codeop.compile_command("\n".join(begun), "<page>", "single") is not None
        except SyntaxError as error:
            return f"{error.msg}: {line}"
        if is_complete:
            begun = []
    return f"unfinished: {begun[0]}" if any(begun) else None


# ---- comparing


def said_outputs(page: str) -> list[str]:
    """What the page says each block prints: the block "output" right behind it, or nothing."""
    blocks = blocks_of(page)
    said = []
    for number, block in enumerate(blocks):
        if block.language not in RUNS:
            continue
        behind = blocks[number + 1] if number + 1 < len(blocks) else None
        is_output = behind is not None and behind.language == "output"
        if is_output and not page[block.stop : behind.start].strip():
            said.append(behind.text)
        else:
            said.append("")
    return said


def alike(said: str, printed: str) -> bool:
    """Whether two outputs are the same, but for the third digit of numbers with a decimal point.

    >>> alike("loss 7.6362 at step 1", "loss 7.6401 at step 1")
    True
    >>> alike("loss 7.6362 at step 1", "loss 7.6362 at step 2")
    False
    """
    if FRACTION.sub("~", said).split() != FRACTION.sub("~", printed).split():
        return False
    return all(
        close(number(a), number(b), digits(a))
        for a, b in zip(FRACTION.findall(said), FRACTION.findall(printed), strict=True)
    )


def number(text: str) -> float:
    return float(text.replace(",", ""))


def digits(text: str) -> int:
    """Digits behind the decimal point."""
    return len(re.split(r"e", text.split(".")[1])[0])


def close(a: float, b: float, behind_point: int) -> bool:
    """Within 2 %, or within one of the last digit shown."""
    return abs(a - b) <= max(0.02 * max(abs(a), abs(b)), 1.01 * 10.0**-behind_point)


def check_page(path: Path) -> None:
    """Raise an AssertionError if a block prints something else than the page says."""
    page = path.read_text(encoding="utf-8")
    for printed, said in zip(run_page(path), said_outputs(page), strict=True):
        assert alike(said, printed), (
            f"{path.name} says\n{said}\nbut its code prints\n{printed}\n"
            f"python -m docs.pages docs/{path.parent.name}/{path.name} --write mends it"
        )


def with_outputs(page: str, printed: list[str]) -> str:
    """The page with what its blocks print behind each of them."""
    parts = []
    end = 0
    blocks = blocks_of(page)
    outputs = iter(printed)
    for number, block in enumerate(blocks):
        if block.language not in RUNS:
            continue
        output = next(outputs)
        parts.append(page[end : block.stop])
        end = block.stop
        behind = blocks[number + 1] if number + 1 < len(blocks) else None
        is_output = behind is not None and behind.language == "output"
        if is_output and not page[block.stop : behind.start].strip():
            end = behind.stop
        if output:
            parts.append(f"\n\n```output\n{output.rstrip()}\n```")
    return "".join(parts) + page[end:]


# ---- two languages


def shape_of(page: str) -> dict[str, list]:
    """What two pages in two languages have in common: blocks, headings, tables, pictures."""
    outside = BLOCK.sub("", page)
    lines = outside.splitlines()
    return {
        "blocks": [(block.language, block.text) for block in blocks_of(page)],
        "headings": [len(line) - len(line.lstrip("#")) for line in lines if line.startswith("#")],
        "tables": [line.count("|") for line in lines if line.startswith("|")],
        "pictures": [Path(name).name for name in re.findall(r"!\[[^\]]*\]\(([^)]*)\)", outside)],
        "code": sorted(re.findall(r"\]\(([^)#]*\.py)(?:#[^)]*)?\)", outside)),
    }


def differences(name: str) -> list[str]:
    """In what the English and the Chinese page of a name differ, which should be language alone."""
    english, chinese = (
        shape_of((DOCS / language / name).read_text(encoding="utf-8")) for language in LANGUAGES
    )
    return [
        f"{what}: {a} and {b}"
        for what in english
        for a, b in [(english[what], chinese[what])]
        if a != b
    ]


def main(arguments: list[str]) -> int:
    write = "--write" in arguments
    paths = [Path(word).resolve() for word in arguments if word != "--write"]
    if not paths:
        print(__doc__)
        return 2
    for path in paths:
        if not write:
            check_page(path)
            print(f"{path.name}: its code prints what it says")
            continue
        printed = run_page(path)
        for language in LANGUAGES:
            other = DOCS / language / path.name
            if other.exists():
                page = other.read_text(encoding="utf-8")
                if len(said_outputs(page)) == len(printed):
                    other.write_text(with_outputs(page, printed), encoding="utf-8")
                    print(f"{language}/{path.name}: written")
                else:
                    print(f"{language}/{path.name}: left, as it has other blocks")
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    raise SystemExit(main(sys.argv[1:]))
