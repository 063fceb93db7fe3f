"""What a value should be, and one clear line where it is not: for files that anybody may have
written, for settings, and for arguments.

    out/sft/config.json: hidden_size is "64", expected a whole number of at least 1

A table says what is expected, field by field:

    >>> fields = {"step": Expected(int, at_least=1), "loss": Expected(float, optional=True)}
    >>> check_fields({"step": 3, "loss": None, "other": "is not looked at"}, fields, "line 1")
    >>> check_fields({"step": 0}, fields, "line 1")  # doctest: +IGNORE_EXCEPTION_DETAIL
    Traceback (most recent call last):
    nanophi.cli.UserError: line 1: step is 0, expected a whole number of at least 1

It stands below all rooms, so that each of them may use it.
"""

import dataclasses
import json
import os
import sys
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanophi.cli import LARGEST_WHOLE, SHOWN, UserError, outside, row_named

HUGE = 10**1000  # Python writes no whole number of more than 4,300 digits
LARGEST = {int: LARGEST_WHOLE, float: sys.float_info.max}
KINDS = {
    int: "a whole number",
    float: "a number",
    str: "a string",
    bool: "true or false",
    list: "a list",
    dict: "an object",
}


@dataclass(frozen=True)
class Expected:
    """What a value should be.

    kind:     int, float (which takes whole numbers too, but no nan or infinity), str, bool, list
              or dict
    of:       what each entry of a list should be
    at_least, above, at_most: the range of a number
    choices:  the values that there are
    optional: the value may be missing, or null
    """

    kind: type
    of: "Expected | None" = None
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    choices: tuple = ()
    optional: bool = False

    def __str__(self) -> str:
        if self.choices:
            return f"one of {', '.join(map(str, self.choices))}"
        limits = {"of at least": self.at_least, "above": self.above, "of at most": self.at_most}
        ranges = [f"{words} {limit}" for words, limit in limits.items() if limit is not None]
        text = KINDS[self.kind]
        if self.of is not None:
            text += f" of which each is {self.of}"
        return " ".join([text, " and ".join(ranges)]) if ranges else text

    def fits(self, value: Any) -> bool:
        """Whether a value, which is not null, is what is expected."""
        if self.choices:
            return value in self.choices
        is_kind = isinstance(value, self.kind) or (self.kind is float and isinstance(value, int))
        if not is_kind or (isinstance(value, bool) and self.kind is not bool):
            return False  # true and false are numbers to Python
        if self.of is not None:
            return all(entry is not None and self.of.fits(entry) for entry in value)
        if self.kind not in (int, float):
            return True
        # Comparisons with nan are false. Larger whole numbers do not fit into 64 bits.
        is_usable = -LARGEST[self.kind] <= value <= LARGEST[self.kind]
        return is_usable and not outside(value, self.at_least, self.above, self.at_most)


def shown(value: Any) -> str:
    """A wrong value as messages show it: as JSON, and not longer than a message can bear.

    >>> shown("64"), shown(None), shown([1] * 100)
    ('"64"', 'null', '[1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1…')
    >>> shown(10**5000)
    'a number of 16,610 bits'
    """
    if isinstance(value, int) and abs(value) >= HUGE:
        return f"a number of {value.bit_length():,} bits"
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        text = repr(type(value)) if isinstance(value, list | dict) else repr(value)
    return text if len(text) <= SHOWN else text[: SHOWN + 1] + "…"


def check(value: Any, expected: Expected, where: str, fix: str = "") -> None:
    """A UserError where a value is not what is expected.

    where: the value's place, such as "out/sft/config.json: hidden_size"; fix: what to do about it
    """
    if value is None and expected.optional:
        return
    if value is None or not expected.fits(value):
        found = "missing" if value is None else shown(value)
        advice = f"; {fix}" if fix else ""
        raise UserError(f"{where} is {found}, expected {expected}{advice}")


def check_fields(
    data: Any, fields: Mapping[str, Expected], where: str | Path, fix: str = ""
) -> None:
    """Check the entries of an object; entries that the table does not name may be anything.

    where: what holds the object, such as the path of a file
    """
    if not isinstance(data, dict):
        check(data, Expected(dict), f"{where}: what it holds", fix)
    for name, expected in fields.items():
        check(data.get(name), expected, f"{where}: {name}", fix)


# ---- files


def path_of(value: Any, what: str) -> Path:
    """A path that is given as a string or as a Path.

    >>> path_of(5, "the directory of a model")  # doctest: +IGNORE_EXCEPTION_DETAIL
    Traceback (most recent call last):
    nanophi.cli.UserError: the directory of a model is 5, expected its path
    """
    if not isinstance(value, str | os.PathLike):
        raise UserError(f"{what} is {shown(value)}, expected its path")
    return Path(value)


def read_json(path: str | Path, fix: str = "") -> Any:
    """What a JSON file holds. A UserError where it is missing, no text, or no JSON.

    fix: what to do about it, such as the command that writes the file
    """
    path = Path(path)
    advice = f"; {fix}" if fix else ""
    try:
        return parse_json(path.read_bytes().decode("utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing{advice}") from None
    except ValueError as error:
        raise UserError(f"{path} is damaged or no JSON: {error}{advice}") from None


def parse_json(text: str) -> Any:
    """`json.loads`, whose every failure is a ValueError with a short message.

    >>> parse_json("[" * 100_000)
    Traceback (most recent call last):
    ValueError: it is nested too deeply
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except json.JSONDecodeError:
        raise
    except ValueError:
        raise ValueError("it holds a number of thousands of digits") from None


# ---- settings: the fields of a dataclass that cli.flag has described


def check_settings(cfg: Any) -> None:
    """Check the values of a dataclass of flags.

    The parser has checked what comes from the command line, so this is for configs that are made
    in Python: `Config(steps="10", lr=-1)`.
    """
    hints = typing.get_type_hints(type(cfg))
    for field in dataclasses.fields(cfg):
        value = getattr(cfg, field.name)
        choices = field.metadata.get("choices")
        if isinstance(choices, Mapping) and isinstance(value, str):
            row_named(choices, value, field.name)
        elif "table" not in field.metadata:
            check(value, expected_of(hints[field.name], field.metadata), field.name)


def expected_of(hint: Any, metadata: Mapping[str, Any]) -> Expected:
    """What a field should be, by its type and what its flag says.

    >>> print(expected_of(int | None, {"at_least": 1}))
    a whole number of at least 1
    """
    parts = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    kind = next(part for part in parts if part is not types.NoneType)
    optional = types.NoneType in parts
    if "choices" in metadata:
        return Expected(str, choices=tuple(metadata["choices"]), optional=optional)
    if typing.get_origin(kind) is typing.Literal:
        return Expected(str, choices=typing.get_args(kind), optional=optional)
    if typing.get_origin(kind) is list:
        return Expected(list, of=Expected(typing.get_args(kind)[0]), optional=optional)
    return Expected(
        kind,
        at_least=metadata.get("at_least"),
        above=metadata.get("above"),
        at_most=metadata.get("at_most"),
        optional=optional,
    )
