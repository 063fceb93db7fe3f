"""Exercise 1: merge a pair, and learn merges."""

from collections.abc import Mapping

Pair = tuple[int, int]


def merge_pair(ids: list[int], pair: Pair, new: int) -> list[int]:
    """Replace each occurrence of `pair` by the id `new`, from left to right."""
    raise NotImplementedError("write merge_pair")


def learn_merges(words: Mapping[tuple[int, ...], int], first_new: int, limit: int) -> list[Pair]:
    """The first `limit` merges. words: a word as its ids -> how often it occurs.

    The new tokens have the ids first_new, first_new + 1, ... Stop when no pair occurs twice.
    """
    raise NotImplementedError("write learn_merges")
