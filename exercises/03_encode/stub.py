"""Exercise 3: encode a word by the rank of its pairs, and a text word by word."""

from collections.abc import Mapping

from nanophi.tokenizer.levels import Level

Pair = tuple[int, int]


def merge_word(ids: list[int], merges: Mapping[Pair, tuple[int, int]]) -> list[int]:
    """Merge the symbols of one word: the best-ranked adjacent pair each time, the leftmost first.

    ids: of the symbols; leave this list as it is. merges: pair -> (rank, id of the merged token);
    rank 0 is the best.

    h, u, g, s = 0, 1, 2, 4, and the merges u + g -> 5 (rank 0) and h + ug -> 6 (rank 1):

        merge_word([0, 1, 2, 4], {(1, 2): (0, 5), (0, 5): (1, 6)})  ->  [6, 4]
    """
    raise NotImplementedError("write merge_word")


def encode(
    text: str, level: Level, vocab: Mapping[str, int], merges: Mapping[Pair, tuple[int, int]]
) -> list[int]:
    """The ids of a text, word by word.

    level.normalized(text)  the text that is split
    level.words(...)        its words
    level.symbols(word)     a string: each character of it is a symbol
    vocab[symbol]           the id of a symbol
    """
    raise NotImplementedError("write encode")
