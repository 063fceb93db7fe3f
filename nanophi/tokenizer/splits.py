r"""How text becomes words (pre-tokens). No merge of BPE crosses the border of a word.

Each split is written twice, side by side:

    pattern   a regular expression; its matches are the words. It is the definition, and it is
              what single texts are encoded with.
    starts    the same in numpy, on the code points of many texts at once: True where a word begins.
              On a corpus it is several times faster than a regex engine called from Python.

    text      你 好 ， d o n ' t   g o
    words     你好|，|don|'t| go
    starts    1  0  1  1 0 0 1 0 1 0 0

The tests compare the two on random text. Read in this order: the patterns, `gpt2_starts` with the
small functions above it, SPLITS at the end. Another split is one more entry of SPLITS, which may
also come from outside:

    SPLITS["by line"] = Split(r"[^\n]*\n|[^\n]+", line_starts)

Every `starts` function takes code points (N,) and gives a mask (N,).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np

# ---- The patterns

# GPT-2's split (Radford et al. 2019): contractions; words, numbers and symbols, each with the space
# before it; white space. Chinese has no spaces, so a whole clause between two punctuation marks is
# one word.
GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

# Qwen2's split. Digits stand one by one. Line breaks stay with the punctuation before them. One
# mark or one blank stays with the letters after it.
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# The split of the char level: HF's Punctuation, Digits(individual_digits=True) and
# Metaspace(prepend_scheme="never") in one pattern. HF's Unicode tables are older than those of
# `regex`: a few hundred rare marks and cuneiform numbers differ, and none of them is Chinese.
ALONE = r"\p{P}$+<=>\^`|~\p{N}"  # punctuation and digits: each of them is a word of its own
CHAR_SPLIT = rf"[{ALONE}]|▁?[^{ALONE}▁]+|▁"

# The code point after each text where several lie in one array. It is half of a surrogate pair,
# which no text holds. It is a word of its own in every split: no word reaches into the next text.
BREAK = 0xDCFF


# ---- The kinds of characters

OTHER = 0  # punctuation, symbols, marks
LETTER = 1
NUMBER = 2
SPACE = 3
END = 4  # a BREAK


@cache
def class_of(*patterns: str) -> np.ndarray:
    r"""A table over all code points: 1 + the index of the pattern that matches, otherwise 0.

    The table is read off the `regex` module, so that the Unicode version of that module decides.
    (0x110000,) uint8.

    >>> table = class_of(r"\p{L}", r"\p{N}")
    >>> [int(table[ord(char)]) for char in "好7!"]
    [1, 2, 0]
    """
    import regex

    table = np.zeros(0x110000, np.uint8)
    all_characters = "".join(map(chr, range(0x110000)))
    for number, pattern in enumerate(patterns, start=1):
        for run in regex.finditer(f"{pattern}+", all_characters):
            table[run.start() : run.end()] = number
    return table


@cache
def _table_of_kinds() -> np.ndarray:
    table = class_of(r"\p{L}", r"\p{N}", r"\s").copy()
    table[BREAK] = END
    return table


def kinds_of(codes: np.ndarray) -> np.ndarray:
    """OTHER, LETTER, NUMBER or SPACE for each code point; END for a BREAK. (N,) uint8."""
    return _table_of_kinds().take(codes)


def changes(kinds: np.ndarray) -> np.ndarray:
    """Where a run of one kind begins. (N,) bool.

    >>> changes(np.array([1, 1, 3, 2, 2])).astype(int)
    array([1, 0, 1, 1, 0])
    """
    begins = np.ones(len(kinds), bool)
    np.not_equal(kinds[1:], kinds[:-1], out=begins[1:])
    return begins


# ---- The splits in numpy


def contraction_lengths(codes: np.ndarray, quotes: np.ndarray, any_case: bool) -> np.ndarray:
    """The lengths of the contractions at some apostrophes: 's 't 'm 'd are 2, 're 've 'll are 3.

    It is 0 where there is no contraction. quotes: indices of apostrophes, (M,). any_case: 'S counts
    as 's. Returns (M,) int64.

    >>> codes = np.array([ord(char) for char in "we've it's x'y"])
    >>> contraction_lengths(codes, np.flatnonzero(codes == ord("'")), any_case=False)
    array([3, 2, 0])
    """
    padded = np.append(codes, (0, 0))  # an apostrophe at the very end has two characters after it
    first = padded.take(quotes + 1)
    second = padded.take(quotes + 2)
    if any_case:
        first = _lower(first)
        second = _lower(second)
        # The regex engine takes the old long s for an s when it ignores case.
        first = np.where(first == ord("ſ"), ord("s"), first)
    lengths = np.zeros(len(quotes), np.int64)
    lengths[np.isin(first, [ord(char) for char in "stmd"])] = 2
    for a, b in ("re", "ve", "ll"):
        lengths[(first == ord(a)) & (second == ord(b))] = 3
    return lengths


def _lower(codes: np.ndarray) -> np.ndarray:
    """A to Z become a to z."""
    is_capital = (codes >= ord("A")) & (codes <= ord("Z"))
    return np.where(is_capital, codes + 32, codes)


def _join_contractions(
    starts: np.ndarray, codes: np.ndarray, quotes: np.ndarray, any_case: bool
) -> None:
    """Make each contraction at `quotes` one word: |it|'|stop -> |it|'s|top. Changes `starts`."""
    lengths = contraction_lengths(codes, quotes, any_case)
    begins = quotes[lengths > 0]
    ends = begins + lengths[lengths > 0]
    starts[begins + 1] = False
    starts[ends[ends < len(codes)]] = True


def gpt2_starts(codes: np.ndarray) -> np.ndarray:
    """GPT2_SPLIT in numpy, in three steps.

    text                   i t ' s     2   o k
    1. the kind changes   |it|'|s|  |2| |ok
    2. the last space     |it|'|s| | 2| ok       a blank joins the word after it
    3. contractions       |it|'s| | 2| ok

    >>> marked("it's  2 ok，你好吗？ 好", gpt2_starts)
    "|it|'s| | 2| ok|，|你好吗|？| 好"
    """
    # 1.
    kinds = kinds_of(codes)
    starts = changes(kinds)

    # 2. `\s+(?!\S)` leaves the last white space of a run to what follows. A blank joins the word
    # that follows; another white space, such as a tab, becomes a word of its own. At the end of a
    # text nothing follows.
    space = kinds == SPACE
    last = np.flatnonzero(space[:-1] & ~space[1:] & (kinds[1:] != END))
    starts[last] = True
    blanks = last[codes.take(last) == ord(" ")]
    starts[blanks + 1] = False

    # 3. The pattern tries a contraction first, wherever a word begins with an apostrophe.
    quotes = np.flatnonzero((codes == ord("'")) & starts)
    _join_contractions(starts, codes, quotes, any_case=False)
    return starts | (kinds == END)


def qwen2_starts(codes: np.ndarray) -> np.ndarray:
    r"""QWEN2_SPLIT in numpy, in five steps. "↵" is a line break:

    text                              好 。 ↵ ↵   ↵     y   1 2 ( a ) ' s
    1. the kind changes, digits      |好|。|↵↵ ↵  |y| |1|2|(|a|)'|s
    2. line breaks after marks       |好|。↵↵| ↵  |y| |1|2|(|a|)'|s
    3. line breaks in white space    |好|。↵↵| ↵|  |y| |1|2|(|a|)'|s
    4. the last space                |好|。↵↵| ↵| | y| |1|2|(|a|)'|s
    5. a single mark                 |好|。↵↵| ↵| | y| |1|2|(a|)'|s

    In step 4 a blank before a digit becomes a word of its own. In step 5 a mark joins the letters
    after it if it is the only mark there; ")'" are two. A contraction goes before that.

    >>> marked("好。\n\n \n  y 12(a)'s", qwen2_starts)
    "|好|。\n\n| \n| | y| |1|2|(a|)'|s"
    >>> marked("it's 'so' IT'S", qwen2_starts)
    "|it|'s| '|so|'| IT|'S"
    """
    kinds = kinds_of(codes)
    before = np.append(END, kinds[:-1])  # the kind of the character on the left
    after = np.append(kinds[1:], END)  # the kind of the character on the right
    starts = changes(kinds) | (kinds == NUMBER) | (kinds == END)  # 1.
    newline = (codes == ord("\n")) | (codes == ord("\r"))
    absorbed = _newlines_behind_marks(newline, before)  # 2.
    starts[absorbed] = False
    starts[1:] |= absorbed[:-1] & ~absorbed[1:]
    starts[_ends_of_line_breaks(kinds, newline, absorbed)] = True  # 3.
    _give_last_space(starts, codes, kinds, after, newline)  # 4.
    _join_single_marks(starts, codes, kinds, before, after)  # 5.
    return starts


def _newlines_behind_marks(newline: np.ndarray, before: np.ndarray) -> np.ndarray:
    r"""`[^\s\p{L}\p{N}]+[\r\n]*`: the line breaks that stand right after a mark. (N,) bool."""
    run_begins = changes(newline)
    run = np.cumsum(run_begins) - 1  # for each character the number of its run
    run_is_absorbed = (newline & (before == OTHER))[run_begins]
    return newline & run_is_absorbed.take(run)


def _ends_of_line_breaks(
    kinds: np.ndarray, newline: np.ndarray, absorbed: np.ndarray
) -> np.ndarray:
    r"""`\s*[\r\n]+`: the indices right after the last line break of each run of white space."""
    run = np.cumsum(changes(np.where(absorbed, END, kinds)))
    breaks = np.flatnonzero(newline & ~absorbed)
    is_last = np.ones(len(breaks), bool)
    is_last[:-1] = run.take(breaks[1:]) != run.take(breaks[:-1])
    cuts = breaks[is_last] + 1
    return cuts[cuts < len(kinds)]


def _give_last_space(
    starts: np.ndarray,
    codes: np.ndarray,
    kinds: np.ndarray,
    after: np.ndarray,
    newline: np.ndarray,
) -> None:
    r"""`\s+(?!\S)` leaves the last white space of a run to what follows. Changes `starts`.

    Letters take any white space, marks take a blank only; otherwise it becomes a word of its own.
    """
    last = np.flatnonzero((kinds == SPACE) & ~newline & (after != SPACE) & (after != END))
    starts[last] = True
    before_letter = after.take(last) == LETTER
    blank_before_mark = (after.take(last) == OTHER) & (codes.take(last) == ord(" "))
    joined = last[before_letter | blank_before_mark]
    starts[joined + 1] = False


def _join_single_marks(
    starts: np.ndarray,
    codes: np.ndarray,
    kinds: np.ndarray,
    before: np.ndarray,
    after: np.ndarray,
) -> None:
    r"""`[^\r\n\p{L}\p{N}]?\p{L}+`: a single mark joins the letters after it. Changes `starts`.

    A contraction is tried first: "'bad" is one word, "'sad" is the two words 's|ad.
    """
    single = np.flatnonzero((kinds == OTHER) & starts & (before != OTHER) & (after == LETTER))
    starts[single + 1] = False
    quotes = single[codes.take(single) == ord("'")]
    _join_contractions(starts, codes, quotes, any_case=True)


def char_starts(codes: np.ndarray) -> np.ndarray:
    """CHAR_SPLIT in numpy, on normalized text, in which "▁" stands for a space.

    >>> marked("感冒,喝▁12杯水", char_starts)
    '|感冒|,|喝|▁|1|2|杯水'
    """
    alone = class_of(f"[{ALONE}]").take(codes) > 0
    alone |= codes == BREAK
    starts = alone | (codes == ord("▁"))
    starts[:1] = True
    starts[1:] |= alone[:-1]
    return starts


def text_starts(codes: np.ndarray) -> np.ndarray:
    """No split at all: a whole text is one word."""
    is_break = codes == BREAK
    return changes(is_break) | is_break


def marked(text: str, starts: Callable[[np.ndarray], np.ndarray]) -> str:
    """The text with "|" before each word, to look at a split.

    >>> marked("hello world", gpt2_starts)
    '|hello| world'
    """
    codes = np.array([ord(char) for char in text], np.int64)
    shown = []
    for char, begins in zip(text, starts(codes), strict=True):
        shown.append("|" + char if begins else char)
    return "".join(shown)


# ---- The table


@dataclass(frozen=True)
class Split:
    """One way to cut text into words at byte level."""

    pattern: str  # a regular expression of the `regex` module; its matches cover the whole text
    starts: Callable[[np.ndarray], np.ndarray]  # the same in numpy: code points (N,) -> bool (N,)


SPLITS = {
    "gpt2": Split(GPT2_SPLIT, gpt2_starts),
    "qwen2": Split(QWEN2_SPLIT, qwen2_starts),
}
