"""How alike two answers are: one function, for everything that compares answers."""

from difflib import SequenceMatcher


def similarity(a: str, b: str) -> float:
    """0 (nothing in common) to 1 (equal): twice the matched characters over all characters of both."""
    return SequenceMatcher(None, a, b, autojunk=False).ratio()
