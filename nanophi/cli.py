"""The command line, once for every script: flags from a dataclass, users' mistakes as one line,
progress with an ETA.

It needs the standard library only, so that every part of the package may use it:

    @dataclass
    class Config:
        data: str = flag(help="token shards, as written by python -m nanophi.text.shards")
        steps: int = flag(1000, help="optimizer steps")

    if __name__ == "__main__":
        run_command(Config, main)      # parses the flags and calls main(cfg)
"""

import argparse
import atexit
import contextlib
import dataclasses
import difflib
import importlib
import io
import os
import signal
import sys
import time
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

SHOWN = 40  # characters of a wrong value in a message


class UserError(ValueError):
    """A mistake of the user. The message says what is wrong, where, and how to fix it."""


# ---- flags


def flag(default: Any = dataclasses.MISSING, **metadata: Any) -> Any:
    """A dataclass field that becomes the flag `--name`; a flag without a default is required.

    help:       what the flag does
    choices:    the values that it may take; of a table (dict) they are the keys, so that each new
                row is a new choice
    at_least, above, at_most:  the range of a number
    const:      the value where the flag stands without one, as in `--resume`
    positional: the values are given without the flag's name
    table:      the field is a dict, and each row of this table is a flag of its own. A row has the
                attributes kind, default, help, at_least, above and at_most. The dict holds the
                values that differ from the default
    """
    if "table" in metadata:
        return dataclasses.field(default_factory=dict, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


class _Parser(argparse.ArgumentParser):
    def parse_known_args(self, args=None, namespace=None):
        """Refuse a flag that stands twice: argparse would forget the first without a word."""
        args = sys.argv[1:] if args is None else list(args)
        seen = set()
        for word in args:
            if word == "--":
                break
            name = word.split("=")[0]
            flag_name = "--" + name.removeprefix("--").removeprefix("no-")
            if word.startswith("--") and flag_name in self._option_string_actions:
                if flag_name in seen:
                    self.error(f"{flag_name} is given twice: give all its values behind one")
                seen.add(flag_name)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> typing.NoReturn:
        """Print one line instead of the whole usage, with the flag that was probably meant."""
        known = [name for action in self._actions for name in action.option_strings]
        hint = ""
        if "unrecognized" in message:
            unknown = [word for word in message.split() if word.startswith("--")]
            similar = [difflib.get_close_matches(word, known, n=1) for word in unknown]
            meant = [name for names in similar for name in names]
            if meant:
                hint = f"did you mean {', '.join(meant)}? "
        line = " ".join(message.replace(": it is empty", " is empty").split())[:500]
        self.exit(2, f"error: {line}; {hint}--help explains every flag\n")


def parser_for(cls: type, description: str) -> argparse.ArgumentParser:
    """An argument parser with the flags of a dataclass, its own before inherited ones.

    Its help is Chinese where `shows_chinese` says so.
    """
    chinese = _chinese()
    if chinese is None:
        parser = _Parser(
            description=description,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
    else:
        parser = _Parser(
            description=chinese.description(description),
            allow_abbrev=False,
            formatter_class=chinese.Formatter,
            add_help=False,
        )
        chinese.name_groups(parser)
    types_of_fields = typing.get_type_hints(cls)
    own = cls.__annotations__
    for field in sorted(dataclasses.fields(cls), key=lambda field: field.name not in own):
        if "table" in field.metadata:
            for name, row in field.metadata["table"].items():
                _add_row(parser, field.name, name, row)
        else:
            _add_flag(parser, field, types_of_fields[field.name])
    return parser


def _add_flag(parser: argparse.ArgumentParser, field: dataclasses.Field, kind: Any) -> None:
    """Add the flag of one dataclass field, whose type is `kind`."""
    metadata = field.metadata
    if isinstance(
        kind, types.UnionType
    ):  # `int | None`: the flag takes an int, its absence means None
        kind = next(part for part in typing.get_args(kind) if part is not types.NoneType)
    required = field.default is dataclasses.MISSING
    default = None if required else field.default
    options: dict[str, Any] = {
        "dest": field.name,
        "required": required,
        "default": default,
        "help": _help(metadata.get("help", ""), default),
    }
    if kind is bool:
        options["action"] = argparse.BooleanOptionalAction
    elif "choices" in metadata:
        options["choices"] = tuple(metadata["choices"])
    elif typing.get_origin(kind) is typing.Literal:
        options["choices"] = typing.get_args(kind)
    elif typing.get_origin(kind) is list:
        options["nargs"] = "+"
        options["type"] = _parser_of(typing.get_args(kind)[0], metadata)
        options["metavar"] = "X"
    else:
        options["type"] = _parser_of(kind, metadata)
        options["metavar"] = "N" if kind in (int, float) else "X"
    if "const" in metadata:
        options["nargs"] = "?"
        options["const"] = metadata["const"]
    if metadata.get("positional"):
        name = field.name
        help_text = options["help"]
        parser.add_argument(name, nargs="+", type=_not_empty, help=help_text, metavar=name.upper())
    else:
        parser.add_argument(_flag_name(field.name), **options)


def _add_row(parser: argparse.ArgumentParser, field: str, name: str, row: Any) -> None:
    """Add the flag of one row of a table; `_collect` finds its value under "field.name"."""
    limits = {limit: getattr(row, limit) for limit in ("at_least", "above", "at_most")}
    parser.add_argument(
        _flag_name(name),
        dest=f"{field}.{name}",
        type=_parser_of(row.kind, limits),
        default=row.default,
        help=_help(row.help, row.default),
        metavar="N" if row.kind in (int, float) else "X",
    )


def _collect(cls: type, values: dict[str, Any]) -> dict[str, Any]:
    """Put the values of a table's flags into the dict of their field."""
    for field in dataclasses.fields(cls):
        if "table" not in field.metadata:
            continue
        given = {}
        for name, row in field.metadata["table"].items():
            value = values.pop(f"{field.name}.{name}")
            if value != row.default:
                given[name] = value
        values[field.name] = given
    return values


def _flag_name(name: str) -> str:
    return "--" + name.replace("_", "-")


def _help(text: str, default: Any) -> str:
    """The help text with the default; argparse reads % as a placeholder, so it is doubled."""
    chinese = _chinese()
    if chinese is not None:
        text = chinese.help_of(text)
        shown = "" if default is None else f"（默认：{default}）"
    else:
        shown = "" if default is None else f" (default: {default})"
    return (text + shown).replace("%", "%%")


def shows_chinese() -> bool:
    """Whether `--help` is Chinese: NANOPHI_LANG says so, or else the locale."""
    wanted = os.environ.get("NANOPHI_LANG")
    if not wanted:
        names = ("LC_ALL", "LC_MESSAGES", "LANG")  # in the order in which they count
        wanted = next((os.environ[name] for name in names if os.environ.get(name)), "")
    return wanted.lower().startswith("zh")


def _chinese() -> types.ModuleType | None:
    """The Chinese words of the command line, read only where they are wanted."""
    return importlib.import_module("nanophi.chinese") if shows_chinese() else None


LARGEST_WHOLE = 2**63 - 1  # of a flag without another limit: what 64 bits hold


def _parser_of(kind: type, metadata: Mapping[str, Any]) -> Callable[[str], Any]:
    """What turns the word behind a flag into its value, or refuses it."""
    if kind is str:
        return _not_empty
    if kind not in (int, float):
        return kind
    at_least = metadata.get("at_least")
    above = metadata.get("above")
    at_most = metadata.get("at_most")
    named = (("at least", at_least), ("above", above), ("at most", at_most))
    limits = [f"{words} {limit}" for words, limit in named if limit is not None]

    def number(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"invalid {kind.__name__} value: {text[:SHOWN]!r}"
            ) from None
        largest = LARGEST_WHOLE if kind is int else sys.float_info.max
        if not -largest <= value <= largest:  # also nan, of which no comparison is true
            raise argparse.ArgumentTypeError(f"{text[:SHOWN]} is no number that can be used")
        if outside(value, at_least, above, at_most):
            raise argparse.ArgumentTypeError(
                f"{text[:SHOWN]} is out of range: it must be {' and '.join(limits)}"
            )
        return value

    return number


def _not_empty(text: str) -> str:
    """A name or text. An empty one often comes from a shell variable that is not set."""
    if not text.strip():
        raise argparse.ArgumentTypeError("it is empty: is a variable of the shell not set?")
    return text


def outside(
    value: float,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
) -> bool:
    """Whether a number is out of a range, of which None is no limit.

    >>> outside(0, at_least=0), outside(0, above=0)
    (False, True)
    """
    return (
        (at_least is not None and value < at_least)
        or (above is not None and value <= above)
        or (at_most is not None and value > at_most)
    )


def row_named(table: Mapping[str, Any], name: str, kind: str) -> Any:
    """The row of a table, or a UserError that lists the rows there are.

    >>> row_named({"adamw": 1, "muon": 2}, "adam", "optimizer")  # doctest: +IGNORE_EXCEPTION_DETAIL
    Traceback (most recent call last):
    nanophi.cli.UserError: no optimizer is called 'adam'; there are adamw, muon
    """
    if name not in table:
        raise UserError(f"no {kind} is called {name!r}; there are {', '.join(table)}")
    return table[name]


# ---- running a command

# What is let go when a command ends, or the process: the locks of claims.py.
at_end = contextlib.ExitStack()
atexit.register(at_end.close)


def run_command(cls: type, main: Callable[[Any], Any], argv: list[str] | None = None) -> None:
    """Parse the flags of `cls`, call `main(cfg)`, and end with an exit code that scripts can chain
    on.

    0    success
    2    a user's mistake: one line on standard error; NANOPHI_TRACEBACK=1 shows where it was raised
    129  the terminal was closed
    130  interrupted by Ctrl-C
    141  the reader of standard output has gone away
    143  ended by SIGTERM. Like Ctrl-C it is an exception inside of `main`, so that files that are
         half written go
    """
    _prepare_streams()
    description = sys.modules[main.__module__].__doc__ or ""
    values = vars(parser_for(cls, description).parse_args(argv))
    cfg = cls(**_collect(cls, values))
    try:
        with _signals_as_exits(), at_end:
            main(cfg)
        sys.stdout.flush()  # a reader that has gone away is noticed here, not when Python ends
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except (UserError, OSError, MemoryError) as error:
        if os.environ.get("NANOPHI_TRACEBACK"):
            raise
        print("error:", " ".join(_message(error).split()), file=sys.stderr)
        sys.exit(2)


def _message(error: Exception) -> str:
    """What an exception says to a user."""
    if isinstance(error, MemoryError):
        return f"the memory does not suffice ({str(error)[:100] or 'nothing is left'})"
    if isinstance(error, OSError) and error.filename:
        return f"{error.strerror}: {error.filename}"
    return str(error)


@contextlib.contextmanager
def _signals_as_exits() -> Iterator[None]:
    """Inside, SIGTERM and the end of the terminal (SIGHUP) raise SystemExit.

    Without it they end the process at once, and its temporary files stay.
    """

    def leave(number: int, frame: types.FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = {}
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        # What nohup has told to ignore is ignored.
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
            with contextlib.suppress(ValueError):  # only the main thread can set a handler
                before[number] = signal.signal(number, leave)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def is_first_rank() -> bool:
    """Whether this process is rank 0 of those that torchrun started, or the only one.

    A cluster may set RANK for reasons of its own, so it counts only beside a WORLD_SIZE.
    """
    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    return alone or os.environ.get("RANK", "0") == "0"


def _prepare_streams() -> None:
    """Make standard input, output and error such that they end no command.

    A stream may be closed (`>&-`), and it may have an encoding that lacks Chinese, such as a
    terminal under LC_ALL=C, or one that lacks a sign: GBK has no ⏎. Then escapes are printed.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:  # it is closed, and this takes its place: the lowest number that is free
            os.open(os.devnull, os.O_RDWR)
    sys.stdin = sys.stdin or open(os.devnull, encoding="utf-8")  # noqa: SIM115 - until the end
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    if not is_first_rank():  # under torchrun only rank 0 prints; errors of all ranks are printed
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # In a log file, lines of both streams then come in the order of their printing.
            stream.reconfigure(errors="backslashreplace", line_buffering=True)


# ---- time, memory, progress


def duration(seconds: float) -> str:
    """Seconds as people say them.

    >>> duration(7), duration(738), duration(9000)
    ('7s', '12.3m', '2.5h')
    """
    if seconds < 60:
        return f"{seconds:.0f}s"
    if seconds < 3600:
        return f"{seconds / 60:.1f}m"
    return f"{seconds / 3600:.1f}h"


def peak_memory_gb() -> float:
    """Highest resident memory of this process (on Linux since the mark was reset)."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        peak_kb = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
        return peak_kb * 1024 / 1e9
    except (OSError, StopIteration):
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / 1e9 if sys.platform == "darwin" else peak * 1024 / 1e9


def shows_colours() -> bool:
    """Whether standard output is a terminal that shows colours; NO_COLOR (no-color.org) says no."""
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return not plain and sys.stdout is not None and sys.stdout.isatty()


class Progress:
    """Progress of a long job on standard error: a tqdm bar on a terminal, otherwise a plain line
    every `every_s` seconds.

        with Progress("merges", 8000) as bar:
            bar.update(1, "count 17")

    total: how many items there are, None where nobody knows; done: how many are done already. Only
    rank 0 shows it.
    """

    def __init__(self, what: str, total: int | None, done: int = 0, every_s: float = 15.0):
        self.what = what
        self.total = total
        self.first = done
        self.done = done
        self.every_s = every_s
        self.started = time.monotonic()
        self.shown = self.started  # when the last plain line was printed
        self.silent = not is_first_rank()
        self.bar = None if self.silent else self._terminal_bar()

    def _terminal_bar(self) -> Any:
        """tqdm's bar, 80 columns wide at most; None without a terminal or without tqdm."""
        if sys.stderr is None or not sys.stderr.isatty():
            return None
        try:
            from tqdm import tqdm
        except ImportError:  # training needs only torch, numpy and safetensors
            return None
        shape = None
        if self.total:
            shape = "{desc} {n_fmt}/{total_fmt} |{bar:10}| {remaining}{postfix}"
        return tqdm(
            total=self.total,
            initial=self.done,
            desc=self.what,
            dynamic_ncols=True,
            leave=False,
            bar_format=shape,
        )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def update(self, n: int = 1, text: str = "") -> None:
        """Count n more items, and show `text` after the numbers."""
        self.done += n
        if self.bar is not None:
            if text:
                self.bar.set_postfix_str(text, refresh=False)
            self.bar.update(n)
            return
        now = time.monotonic()
        if self.silent or now - self.shown < self.every_s:
            return
        self.shown = now
        line = f"{self.what} {self.done:,}"
        if self.total is not None:
            seconds_each = (now - self.started) / max(self.done - self.first, 1)
            left_s = seconds_each * (self.total - self.done)
            line += f"/{self.total:,}  eta {duration(left_s)}"
        print(f"{line}  {text}".rstrip(), file=sys.stderr, flush=True)

    def say(self, line: str) -> None:
        """Print a line that stays, without tearing the bar."""
        if self.bar is not None:
            self.bar.write(line)
        elif not self.silent:
            print(line, flush=True)
