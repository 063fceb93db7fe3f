"""Filters: which documents are no text to learn from.

Each filter measures one thing, and a document beyond the limit is dropped under the filter's name:

    filter        measures                                   dropped where it is
    short         characters                                 below --min-length
    garbled       share of lost or misread characters        above --max-garbled
    language      share of Han among the letters             below --min-han
    symbols       share of punctuation and signs             above --max-symbols
    repetition    share of repeated 10-grams                 above --max-repeated

A new filter is one function that measures, one row of FILTERS, and one flag of Limits.

Filters keep or drop whole documents and change nothing. Questions and answers of conversations are
not filtered.
"""

import unicodedata
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from nanophi.cli import flag
from nanophi.text.rules import LOST, MISREAD

# ---- limits


@dataclass(kw_only=True)
class Limits:
    """Flags: the limits of the filters. The defaults drop what no reader would miss."""

    min_length: int = flag(1, at_least=1, help="drop documents of fewer characters")
    min_han: float = flag(
        0.0,
        at_least=0,
        at_most=1,
        help="drop documents with a smaller share of Han in their letters",
    )
    max_repeated: float = flag(
        0.8, at_least=0, at_most=1, help="drop documents with a larger share of repeated 10-grams"
    )
    max_symbols: float = flag(
        0.8, at_least=0, at_most=1, help="drop documents with more punctuation and signs"
    )
    max_garbled: float = flag(
        0.05, at_least=0, at_most=1, help="drop documents with more mojibake before cleaning"
    )


# ---- measures


def han_share(text: str) -> float:
    """Share of Han among the letters; 1 for a text without letters.

    >>> han_share("好的OK！"), han_share("123")
    (0.5, 1.0)
    """
    codes = code_points(text)
    common = (codes >= 0x3400) & (codes <= 0x9FFF)
    rare = (codes >= 0x20000) & (codes <= 0x3FFFF)
    han = int((common | rare).sum())
    letters = sum(count for char, count in Counter(text).items() if char.isalpha())
    return han / letters if letters else 1.0


def repeated_share(text: str) -> float:
    """Share of the 10-grams of characters that also stand earlier in the text; 0 for a text of
    fewer than 20 characters.

    >>> round(repeated_share("转发微博，关注有礼。" * 10), 3)  # 91 10-grams, 10 of them different
    0.9
    """
    codes = code_points(text).astype(np.uint64)
    if len(codes) < 20:
        return 0.0
    # A hash of each 10-gram: a polynomial in an odd 64-bit base, modulo 2^64.
    grams = np.zeros(len(codes) - 9, dtype=np.uint64)
    for offset in range(10):
        grams = grams * np.uint64(0x9E3779B97F4A7C15) + codes[offset : offset + len(grams)]
    grams.sort()
    return float((grams[1:] == grams[:-1]).mean())


def symbol_share(text: str) -> float:
    """Share of the visible characters that are no letters and no digits: punctuation, lines of
    ====, emoji; 0 for a text of fewer than 50 characters.

    >>> symbol_share("首页|||更多>>>|||" * 10)
    0.6923076923076923
    """
    if len(text) < 50:
        return 0.0
    counts = {char: count for char, count in Counter(text).items() if not char.isspace()}
    signs = sum(n for char, n in counts.items() if unicodedata.category(char)[0] in "PSC")
    visible = sum(counts.values())
    return signs / visible if visible else 0.0


def garbled_share(text: str) -> float:
    """Share of characters that are lost or mojibake.

    >>> garbled_share("好\\ufffd好\\ufffd")
    0.5
    """
    garbled = 0
    for pattern in (LOST, MISREAD):
        garbled += sum(len(match[0]) for match in pattern.finditer(text))
    return garbled / len(text) if text else 0.0


def code_points(text: str) -> np.ndarray:
    """(characters,) uint32: the code points of a text, half surrogate pairs included.

    >>> code_points("好a")
    array([22909,    97], dtype=uint32)
    """
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)


# ---- the table


@dataclass(frozen=True)
class Filter:
    """What a filter measures, and which field of Limits is its limit: `at_least` or `at_most`."""

    measure: Callable[[str], float]
    at_least: str | None = None
    at_most: str | None = None
    before_cleaning: bool = False  # whether it measures the document as it came

    def refuses(self, text: str, limits: Limits) -> bool:
        if self.at_most is not None:
            return self.measure(text) > getattr(limits, self.at_most)
        assert self.at_least is not None
        least = getattr(limits, self.at_least)
        # No measure is negative, so a limit of 0 refuses nothing and costs no measuring.
        return least > 0 and self.measure(text) < least


FILTERS: dict[str, Filter] = {  # in this order: the first that refuses a document names the reason
    "short": Filter(len, at_least="min_length"),
    "garbled": Filter(garbled_share, at_most="max_garbled", before_cleaning=True),
    "language": Filter(han_share, at_least="min_han"),
    "symbols": Filter(symbol_share, at_most="max_symbols"),
    "repetition": Filter(repeated_share, at_most="max_repeated"),
}


def why_dropped(raw: str, text: str, limits: Limits) -> str | None:
    """The name of the first filter that refuses a document, "empty" if nothing is left, or None.

    raw: the document as it came; text: the document as it was cleaned

    >>> why_dropped("哈" * 100, "哈" * 100, Limits())
    'repetition'
    """
    if not text.strip():
        return "empty"
    for name, row in FILTERS.items():
        if row.refuses(raw if row.before_cleaning else text, limits):
            return name
    return None
