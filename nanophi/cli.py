"""The command line, once for every script: flags from a dataclass, users' mistakes as one line, progress with an ETA.

Standard library only, and below all rooms, so that each of them may use it:

    @dataclass
    class Config:
        data: str = flag(help="token shards, as written by python -m nanophi.text.shards")
        steps: int = flag(1000, help="optimizer steps")

    if __name__ == "__main__":
        run_command(Config, main)          # parses, calls main(cfg); a UserError ends in one line and exit code 2
"""

import argparse
import dataclasses
import difflib
import io
import os
import sys
import time
import types
import typing
from collections.abc import Mapping
from pathlib import Path


class UserError(ValueError):
    """A mistake of the person at the keyboard. The message says what is wrong, where, and how to fix it."""


def flag(default=dataclasses.MISSING, **metadata):
    """A dataclass field that becomes `--name`; without a default the flag is required.

    help: what it does; const: the value where the flag stands alone; positional: a list without a flag's name;
    at_least, above, at_most: the range of a number.
    """
    return dataclasses.field(default=default, metadata=metadata)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        """One line instead of the whole usage, with the flag that was probably meant."""
        known = [flag for action in self._actions for flag in action.option_strings]
        unknown = (
            [word for word in message.split() if word.startswith("--")]
            if "unrecognized" in message
            else []
        )
        meant = [close for word in unknown for close in difflib.get_close_matches(word, known, n=1)]
        hint = f"did you mean {', '.join(meant)}? " if meant else ""
        self.exit(2, f"error: {message}; {hint}--help explains every flag\n")


def parser_for(cls: type, description: str) -> argparse.ArgumentParser:
    """An argument parser with one flag per field of the dataclass `cls`; abbreviations are errors."""
    parser = _Parser(
        description=description,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    hints = typing.get_type_hints(cls)
    for field in sorted(
        dataclasses.fields(cls), key=lambda field: field.name not in cls.__annotations__
    ):  # own first
        kind, options = hints[field.name], {"dest": field.name}
        if isinstance(
            kind, types.UnionType
        ):  # `int | None`: the flag takes an int, its absence says None
            kind = next(part for part in typing.get_args(kind) if part is not types.NoneType)
        default = field.default
        options["required"] = default is dataclasses.MISSING
        options["default"] = None if default is dataclasses.MISSING else default
        shown = "" if default in (dataclasses.MISSING, None) else f" (default: {default})"
        options["help"] = (field.metadata.get("help", "") + shown).replace("%", "%%")
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif typing.get_origin(kind) is typing.Literal:
            options["choices"] = typing.get_args(kind)
        elif typing.get_origin(kind) is list:
            options |= {"nargs": "+", "type": typing.get_args(kind)[0], "metavar": "X"}
        else:
            options |= {
                "type": _in_range(kind, field.metadata),
                "metavar": "N" if kind in (int, float) else "X",
            }
            if "const" in field.metadata:  # the flag may stand alone
                options |= {"nargs": "?", "const": field.metadata["const"]}
        if field.metadata.get("positional"):
            parser.add_argument(
                field.name, nargs="+", help=options["help"], metavar=field.name.upper()
            )
        else:
            parser.add_argument("--" + field.name.replace("_", "-"), **options)
    return parser


def _in_range(kind: type, metadata: Mapping):
    """`kind`, or a function that also refuses what is out of range (nan always is)."""
    at_least, above, at_most = (metadata.get(name) for name in ("at_least", "above", "at_most"))
    limits = [
        f"{words} {limit}"
        for words, limit in (("at least", at_least), ("above", above), ("at most", at_most))
        if limit is not None
    ]
    if not limits:
        return kind

    def number(text: str):
        value = kind(text)
        right = (at_least is None or value >= at_least) and (above is None or value > above)
        if not (right and (at_most is None or value <= at_most)):
            raise argparse.ArgumentTypeError(
                f"{text} is out of range: it must be {' and '.join(limits)}"
            )
        return value

    number.__name__ = kind.__name__  # argparse says "invalid int value"
    return number


def run_command(cls: type, main, argv: list[str] | None = None) -> None:
    """Parse the flags of `cls`, call `main(cfg)`, and end with an exit code that scripts can chain on.

    0 success; 2 a user's mistake (one line on stderr; NANOPHI_TRACEBACK=1 shows where); 130 / 143 interrupted; 141 the
    reader of standard output has gone away.
    """
    description = sys.modules[main.__module__].__doc__ or ""
    cfg = cls(**vars(parser_for(cls, description).parse_args(argv)))
    if (
        os.environ.get("RANK", "0") != "0"
    ):  # of several ranks under torchrun the first one speaks; all may fail aloud
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - until the end
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(
            line_buffering=True
        )  # lines reach a log file in the order of those on stderr
    try:
        main(cfg)
        sys.stdout.flush()  # a reader that has gone away is noticed here, not in the interpreter's shutdown
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except (UserError, OSError) as error:
        if os.environ.get("NANOPHI_TRACEBACK"):
            raise
        text = (
            f"{error.strerror}: {error.filename}"
            if isinstance(error, OSError) and error.filename
            else str(error)
        )
        print("error:", " ".join(text.split()), file=sys.stderr)
        sys.exit(2)


def duration(seconds: float) -> str:
    """7 -> '7s', 738 -> '12.3m', 9000 -> '2.5h'."""
    if seconds < 60:
        return f"{seconds:.0f}s"
    return f"{seconds / 60:.1f}m" if seconds < 3600 else f"{seconds / 3600:.1f}h"


def peak_memory_gb() -> float:
    """Highest resident memory of this process: since its start or, on Linux, since the mark was reset."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024 / 1e9
    except OSError:
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / 1e9 if sys.platform == "darwin" else peak * 1024 / 1e9


class Progress:
    """Progress of a long job on stderr: a tqdm bar on a terminal, else a plain line every `every_s` seconds.

    `with Progress("merges", 8000) as bar: bar.update(1, "count 17")`
    """

    def __init__(self, what: str, total: int | None, done: int = 0, every_s: float = 15.0):
        self.what, self.total, self.first, self.done, self.every_s = (
            what,
            total,
            done,
            done,
            every_s,
        )
        self.started = self.shown = time.monotonic()
        self.bar = None
        self.silent = os.environ.get("RANK", "0") != "0"  # another rank's business, see `run`
        if sys.stderr.isatty() and not self.silent:
            try:
                from tqdm import tqdm
            except (
                ImportError
            ):  # training runs where only torch, numpy and safetensors are installed
                return
            shape = (
                "{desc} {n_fmt}/{total_fmt} |{bar:10}| {remaining}{postfix}" if total else None
            )  # fits 80 columns
            self.bar = tqdm(
                total=total,
                initial=done,
                desc=what,
                dynamic_ncols=True,
                leave=False,
                bar_format=shape,
            )

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        if self.bar is not None:
            self.bar.close()

    def update(self, n: int = 1, text: str = "") -> None:
        self.done += n
        if self.bar is not None:
            if text:
                self.bar.set_postfix_str(text, refresh=False)
            self.bar.update(n)
            return
        now = time.monotonic()
        if now - self.shown >= self.every_s and not self.silent:
            self.shown = now
            line = f"{self.what} {self.done:,}"
            if self.total is not None:
                left_s = (
                    (now - self.started) / max(self.done - self.first, 1) * (self.total - self.done)
                )
                line += f"/{self.total:,}  eta {duration(left_s)}"
            print(f"{line}  {text}".rstrip(), file=sys.stderr, flush=True)

    def say(self, line: str) -> None:
        """Print a line that stays, without tearing the bar."""
        if self.bar is not None:
            self.bar.write(line)
        elif not self.silent:
            print(line, flush=True)
