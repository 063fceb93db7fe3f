"""Where words (pre-tokens) begin, found in numpy on whole arrays of code points.

The regular expressions in levels.py say the same and are what the tests compare with; on a corpus numpy is several
times faster than a regex engine called from Python. Every function takes code points (N,) and gives a mask (N,).
"""

from functools import cache

import numpy as np

ALONE = r"\p{P}$+<=>\^`|~\p{N}"  # at char level: punctuation and digits
OTHER, LETTER, NUMBER, SPACE, END = range(5)
BREAK = (
    0xDCFF  # half a surrogate pair, which no text holds: put between texts, it is a word of its own
)


@cache
def class_of(*patterns: str) -> np.ndarray:
    """A table over all code points: 1 + the index of the pattern that a character matches, else 0. (0x110000,) uint8.

    Read off the `regex` module itself, so that its Unicode version is the one that counts.
    """
    import regex

    table, everything = np.zeros(0x110000, np.uint8), "".join(map(chr, range(0x110000)))
    for i, pattern in enumerate(patterns, start=1):
        for run in regex.finditer(f"{pattern}+", everything):
            table[run.start() : run.end()] = i
    return table


def kinds_of(codes: np.ndarray) -> np.ndarray:
    """OTHER, LETTER, NUMBER or SPACE of each code point; END at a BREAK."""
    return _table_of_kinds().take(codes)


@cache
def _table_of_kinds() -> np.ndarray:
    table = class_of(r"\p{L}", r"\p{N}", r"\s").copy()
    table[BREAK] = END
    return table


def changes(kinds: np.ndarray) -> np.ndarray:
    """Where a run of one kind begins."""
    begins = np.ones(len(kinds), bool)
    np.not_equal(kinds[1:], kinds[:-1], out=begins[1:])
    return begins


def contraction_lengths(codes: np.ndarray, quotes: np.ndarray, any_case: bool) -> np.ndarray:
    """How many characters 's 't 'm 'd (2) or 're 've 'll (3) take at these apostrophes; 0 where there is none."""
    padded = np.append(codes, (0, 0))
    first, second = padded.take(quotes + 1), padded.take(quotes + 2)
    if any_case:
        first, second = (
            np.where((c >= ord("A")) & (c <= ord("Z")), c + 32, c) for c in (first, second)
        )
        first = np.where(first == ord("ſ"), ord("s"), first)  # the old long s
    long = np.zeros(len(quotes), bool)
    for a, b in ("re", "ve", "ll"):
        long |= (first == ord(a)) & (second == ord(b))
    return np.where(long, 3, np.where(np.isin(first, [ord(char) for char in "stmd"]), 2, 0))


def gpt2_starts(codes: np.ndarray) -> np.ndarray:
    """GPT2_SPLIT of levels.py."""
    kinds = kinds_of(codes)
    starts = changes(kinds)
    n, space = len(codes), kinds == SPACE
    # A run of white space before something else gives its last character away: a blank joins what follows, another
    # character stands alone.
    last = np.flatnonzero(space[:-1] & ~space[1:] & (kinds[1:] != END))
    starts[last] = True
    starts[last[codes.take(last) == ord(" ")] + 1] = False
    # A contraction is tried first, wherever a word begins with an apostrophe.
    quotes = np.flatnonzero((codes == ord("'")) & starts)
    lengths = contraction_lengths(codes, quotes, any_case=False)
    quotes, lengths = quotes[lengths > 0], lengths[lengths > 0]
    starts[quotes + 1] = False
    starts[(quotes + lengths)[quotes + lengths < n]] = True
    return starts | (kinds == END)


def qwen2_starts(codes: np.ndarray) -> np.ndarray:
    """QWEN2_SPLIT of levels.py."""
    kinds = kinds_of(codes)
    n = len(codes)
    newline = (codes == 10) | (codes == 13)
    before, after = np.append(END, kinds[:-1]), np.append(kinds[1:], END)
    starts = changes(kinds) | (kinds == NUMBER) | (kinds == END)
    # Line breaks right behind punctuation belong to it.
    line_starts = changes(newline)
    runs = np.cumsum(line_starts) - 1  # of line breaks, or of other characters
    absorbed = newline & (newline & (before == OTHER))[line_starts].take(runs)
    starts[absorbed] = False
    starts[1:] |= absorbed[:-1] & ~absorbed[1:]
    # The rest of the white space ends a word at its last line break. What then stands before something else gives its
    # last character away: to letters always, to punctuation if it is a blank.
    runs = np.cumsum(changes(np.where(absorbed, END, kinds)))
    breaks = np.flatnonzero(newline & ~absorbed)
    final = breaks[np.append(runs.take(breaks[1:]) != runs.take(breaks[:-1]), True)[: len(breaks)]]
    starts[(final + 1)[final + 1 < n]] = True
    last = np.flatnonzero((kinds == SPACE) & ~newline & (after != SPACE) & (after != END))
    starts[last] = True
    joins = (after.take(last) == LETTER) | (
        (after.take(last) == OTHER) & (codes.take(last) == ord(" "))
    )
    starts[last[joins] + 1] = False
    # A single mark before letters belongs to them, but a contraction comes first.
    single = np.flatnonzero((kinds == OTHER) & starts & (before != OTHER) & (after == LETTER))
    starts[single + 1] = False
    quotes = single[codes.take(single) == ord("'")]
    lengths = contraction_lengths(codes, quotes, any_case=True)
    behind = (quotes + lengths)[lengths > 0]
    starts[behind[behind < n]] = True
    return starts


def char_starts(codes: np.ndarray) -> np.ndarray:
    """CHAR_SPLIT of levels.py, on normalized text with "▁" for spaces."""
    alone = class_of(f"[{ALONE}]").take(codes) > 0
    alone |= codes == BREAK
    starts = alone | (codes == ord("▁"))
    starts[:1] = True
    starts[1:] |= alone[:-1]
    return starts
