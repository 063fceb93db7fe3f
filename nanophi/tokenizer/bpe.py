"""BPE (Sennrich et al. 2016): the rule as it is said, and `train_bpe`, which learns a tokenizer.

Training merges the most frequent adjacent pair of tokens into a new token, again and again:

    words        hug 5 times, pug 2 times, hugs 1 time
    symbols      h u g    p u g    h u g s
    1st merge    u + g occurs 8 times    ->    h ug     p ug    h ug s
    2nd merge    h + ug occurs 6 times   ->    hug      p ug    hug s

Encoding a new word replays the merges in the order in which they were learned:

    sug -> s u g -> s ug          (1st merge; no other merge fits)

The names in this file:

    ids      a word while it is merged: a list of token ids
    pair     two adjacent ids
    merges   the pairs that were merged, in order; when encoding, pair -> (rank, merged id)
    words    {word: how often it occurs}; a word is a tuple of the ids of its symbols

Read in this order: `merge_pair`, `learn_merges_naive`, `encode_word_naive`, `train_bpe`. The naive
functions are for reading and for testing. What runs is fast/merges.py for training, and for
encoding `merge_word` in tokenizer.py and fast/encoder.py. The tests compare them with the naive
ones. The merges are those of HF tokenizers' BpeTrainer, one for one.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import pairwise

from nanophi.cli import UserError
from nanophi.tokenizer.fast.merges import LARGEST_VOCABULARY, Trainer
from nanophi.tokenizer.fast.words import count_words
from nanophi.tokenizer.levels import Level, level_named
from nanophi.tokenizer.tokenizer import (
    SPECIAL_TOKENS,
    Pair,
    Tokenizer,
    checked_size,
    refuse_one_string,
)

# ---- The rule


def merge_pair(ids: list[int], pair: Pair, new: int) -> list[int]:
    """Replace each occurrence of `pair` by the id `new`, from left to right.

    >>> merge_pair([1, 1, 1, 2], (1, 1), 9)
    [9, 1, 2]
    """
    merged = []
    i = 0
    while i < len(ids):
        if tuple(ids[i : i + 2]) == pair:
            merged.append(new)
            i += 2
        else:
            merged.append(ids[i])
            i += 1
    return merged


def learn_merges_naive(
    words: Mapping[tuple[int, ...], int], first_new: int, limit: int, min_frequency: int
) -> list[Pair]:
    """Learn at most `limit` merges. Before each merge all pairs are counted: O(merges x words).

    Among equally frequent pairs the one with the smaller ids is merged. Pairs are counted where
    they overlap, too: "aaa" holds two pairs "aa", although only one of them can be merged. Learning
    ends when no pair occurs `min_frequency` times. The new tokens have the ids first_new,
    first_new + 1, ...

    The words of the example above, with h, u, g, p, s = 0, 1, 2, 3, 4:

    >>> words = {(0, 1, 2): 5, (3, 1, 2): 2, (0, 1, 2, 4): 1}
    >>> learn_merges_naive(words, first_new=5, limit=10, min_frequency=2)
    [(1, 2), (0, 5), (3, 5)]
    """
    corpus = [(list(word), count) for word, count in words.items()]
    merges: list[Pair] = []
    while len(merges) < limit:
        counts: Counter[Pair] = Counter()
        for ids, count in corpus:
            for pair in pairwise(ids):
                counts[pair] += count
        if not counts:
            break
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        if counts[best] < min_frequency:
            break
        new = first_new + len(merges)
        corpus = [(merge_pair(ids, best, new), count) for ids, count in corpus]
        merges.append(best)
    return merges


def encode_word_naive(ids: list[int], merges: Mapping[Pair, tuple[int, int]]) -> list[int]:
    """Merge the symbols of one word: the best-ranked adjacent pair each time, the leftmost first.

    merges: pair -> (rank, id of the merged token), as in `Tokenizer.merges`. O(n^2) for n symbols.

    The word "hugs" with the merges of the example above:

    >>> encode_word_naive([0, 1, 2, 4], {(1, 2): (0, 5), (0, 5): (1, 6), (3, 5): (2, 7)})
    [6, 4]
    """
    ids = list(ids)
    while True:
        candidates = []
        for place, pair in enumerate(pairwise(ids)):
            if pair in merges:
                rank, merged = merges[pair]
                candidates.append((rank, place, merged))
        if not candidates:
            return ids
        _, place, merged = min(candidates)
        ids[place : place + 2] = [merged]


# ---- Training


def train_bpe(
    texts: Iterable[str],
    vocab_size: int = 40960,
    min_frequency: int = 2,
    level: str = "byte",
    byte_fallback: bool = False,
    split: str = "gpt2",
) -> Tokenizer:
    """Learn a tokenizer from texts, which may stream in.

    vocab_size: how many tokens to make. It counts the 7 special tokens and the 256 bytes, or at the
        level "char" all characters of the texts (and with byte_fallback the bytes too). There will
        be fewer tokens if the texts run out of pairs that occur `min_frequency` times.
    min_frequency: a pair that occurs less often is not merged.
    level, byte_fallback, split: see levels.level_named.

    >>> tok = train_bpe(["感冒了，感冒了"], vocab_size=20, level="char")
    >>> list(tok.vocab)  # NFKC turns ， into ,
    [',', '了', '冒', '感', '冒了', '感冒了']
    >>> tok.encode("感冒了,冒感")
    [12, 7, 9, 10]
    """
    refuse_one_string(texts, "train_bpe")
    vocab_size = checked_size(vocab_size, "vocab_size")
    min_frequency = checked_size(min_frequency, "min_frequency")
    chosen = level_named(level, byte_fallback, split)
    if vocab_size > LARGEST_VOCABULARY:
        raise UserError(
            f"vocab_size {vocab_size:,} is too large: "
            f"at most {LARGEST_VOCABULARY:,} are trained here"
        )
    # The bytes are known before the texts are read, the characters only afterwards.
    require_room(vocab_size, chosen.alphabet(()), "bytes")
    counted = count_words(texts, chosen)
    if len(counted.counts) == 0:
        raise UserError("there is no text to train a tokenizer on")
    alphabet = counted.alphabet()
    require_room(vocab_size, alphabet, "characters of this text")

    slots, weights = counted.lay_out({symbol: i for i, symbol in enumerate(alphabet)})
    del counted  # it is large, and merging needs the memory
    limit = vocab_size - len(SPECIAL_TOKENS) - len(alphabet)
    trainer = Trainer(slots, weights, len(alphabet), limit, min_frequency)
    return tokenizer_of(chosen, alphabet, trainer.run(), trainer.merge_counts)


def require_room(vocab_size: int, alphabet: list[str], description: str) -> None:
    """Refuse a vocab_size that the special tokens and the alphabet alone exceed."""
    smallest = len(SPECIAL_TOKENS) + len(alphabet)
    if vocab_size < smallest:
        raise UserError(
            f"vocab_size {vocab_size} is too small: "
            f"the special tokens and the {description} are {smallest}"
        )


def tokenizer_of(
    level: Level, alphabet: list[str], merges: list[Pair], merge_counts: list[int]
) -> Tokenizer:
    """A tokenizer from trained merges, in whose ids 0 is the first symbol of the alphabet."""
    tokens = list(alphabet)
    for left, right in merges:
        tokens.append(tokens[left] + tokens[right])
    # No two merges spell the same token, such as ab + c and a + bc. If ab is merged first, it is
    # merged wherever a b c stands, so bc is never made there, and the other way round.
    assert len(set(tokens)) == len(tokens), "two merges spell the same token"
    first = len(SPECIAL_TOKENS)  # in the tokenizer the special tokens come before the alphabet
    shifted = [(first + left, first + right) for left, right in merges]
    return Tokenizer(level, tokens, shifted, merge_counts)
