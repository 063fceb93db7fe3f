"""Near-duplicates are found, and different texts of the same characters are not."""

import random

from nanophi.text.dedup import jaccard, near_duplicates, shingles


def random_text(seed: int, length: int = 300) -> str:
    rng = random.Random(seed)
    return "".join(chr(rng.randrange(0x4E00, 0x5800)) for _ in range(length))


def test_same_characters_in_another_order_are_another_text():
    """The original compared sets of single characters: 狗咬了人 equalled 人咬了狗."""
    assert jaccard(shingles("昨天狗咬了人"), shingles("昨天人咬了狗")) == 0.0
    assert near_duplicates(["狗咬了人", "人咬了狗"]) == []


def test_copies_with_small_changes_go_and_the_first_stays():
    a, b = random_text(1), random_text(2)
    changed = a[:150] + "改" + a[151:]
    punctuated = "，".join(a[i : i + 10] for i in range(0, 300, 10))
    assert near_duplicates([a, b, changed, a, punctuated]) == [2, 3, 4]


def test_half_a_copy_stays():
    a = random_text(1)
    assert near_duplicates([a, a[:150] + random_text(3, 150)]) == []


def test_short_and_empty_texts():
    assert near_duplicates(["", "好", "好", "不好", "！"]) == [2, 4]
