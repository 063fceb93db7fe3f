"""Filters: which documents are no text to learn from. Each measures one thing; a document beyond a limit is dropped.

Filters keep or drop whole documents and change nothing; questions and answers of conversations are not filtered.
"""

import unicodedata
from collections import Counter
from dataclasses import dataclass

import numpy as np

from nanophi.cli import flag
from nanophi.text.rules import LOST, MISREAD


@dataclass(kw_only=True)
class Limits:
    """Flags: the limits beyond which a document is dropped. The defaults drop what no reader would miss."""

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


def han_share(text: str) -> float:
    """Share of Han among the letters; 1 for a text without letters."""
    codes = _codes(text)
    han = ((codes >= 0x3400) & (codes <= 0x9FFF)) | ((codes >= 0x20000) & (codes <= 0x3FFFF))
    letters = sum(count for char, count in Counter(text).items() if char.isalpha())
    return int(han.sum()) / letters if letters else 1.0


def repeated_share(text: str) -> float:
    """Share of the 10-grams of characters that stood in the text before: 0.9 for one line written ten times."""
    codes = _codes(text).astype(np.uint64)
    if len(codes) < 20:
        return 0.0
    grams = np.zeros(len(codes) - 9, dtype=np.uint64)
    for offset in range(10):
        grams = grams * np.uint64(0x9E3779B97F4A7C15) + codes[offset : offset + len(grams)]
    grams.sort()
    return float((grams[1:] == grams[:-1]).mean())


def symbol_share(text: str) -> float:
    """Share of characters that are no letters, digits or white space: punctuation, lines of ====, emoji."""
    counts = Counter(text)
    visible = sum(count for char, count in counts.items() if not char.isspace())
    signs = sum(
        count
        for char, count in counts.items()
        if unicodedata.category(char)[0] in "PSC" and not char.isspace()
    )
    return signs / visible if visible else 0.0


def garbled_share(text: str) -> float:
    """Share of characters that are lost or mojibake."""
    lost = sum(len(match[0]) for pattern in (LOST, MISREAD) for match in pattern.finditer(text))
    return lost / len(text) if text else 0.0


def why_dropped(raw: str, text: str, limits: Limits) -> str | None:
    """The name of the first filter that refuses a document (as it came, and as it was cleaned), or None."""
    if not text.strip():
        return "empty"
    if len(text) < limits.min_length:
        return "short"
    if garbled_share(raw) > limits.max_garbled:
        return "garbled"
    if limits.min_han > 0 and han_share(text) < limits.min_han:
        return "language"
    if len(text) >= 50 and symbol_share(text) > limits.max_symbols:
        return "symbols"
    if repeated_share(text) > limits.max_repeated:
        return "repetition"
    return None


def _codes(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
