"""BPE training (Sennrich et al. 2016): which pairs of tokens to merge, learned from counted words.

The rule: merge the most frequent adjacent pair; among equals the one with the smaller ids; stop below `min_frequency`.
Pairs are counted raw ("aaa" holds two "aa") and merged left to right. Here it stands as it is said, to read and to test
with; merges.py does the same in numpy. Both give the merges of HF tokenizers' BpeTrainer, one for one.

    words   {word: how often}, a word being one pre-token of the split, as a tuple of ids of bytes or characters
    pair    two adjacent token ids        merges  the pairs chosen so far, in order        ids  a word being merged
"""

from collections import Counter
from collections.abc import Iterable
from itertools import pairwise

from nanophi.cli import UserError
from nanophi.tokenizer.levels import level_named
from nanophi.tokenizer.tokenizer import SPECIAL_TOKENS, Tokenizer

Pair = tuple[int, int]


def merge_pair(ids: list[int], pair: Pair, new: int) -> list[int]:
    """Replace each occurrence of `pair`, left to right: merge_pair([1, 1, 1, 2], (1, 1), 9) -> [9, 1, 2]."""
    merged, i = [], 0
    while i < len(ids):
        if i + 1 < len(ids) and (ids[i], ids[i + 1]) == pair:
            merged.append(new)
            i += 2
        else:
            merged.append(ids[i])
            i += 1
    return merged


def learn_merges_naive(
    words: dict[tuple[int, ...], int], first_new: int, limit: int, min_frequency: int
) -> list[Pair]:
    """The rule as it is said: count every pair anew before each merge. O(merges x corpus)."""
    corpus = [(list(word), count) for word, count in words.items()]
    merges = []
    while len(merges) < limit:
        counts = Counter()
        for ids, count in corpus:
            for pair in pairwise(ids):
                counts[pair] += count
        pair = min(counts, key=lambda p: (-counts[p], p), default=None)
        if pair is None or counts[pair] < max(min_frequency, 1):
            break
        corpus = [(merge_pair(ids, pair, first_new + len(merges)), count) for ids, count in corpus]
        merges.append(pair)
    return merges


def train_bpe(
    texts: Iterable[str],
    vocab_size: int = 40960,
    min_frequency: int = 2,
    level: str = "byte",
    byte_fallback: bool = False,
    split: str = "gpt2",
) -> Tokenizer:
    """Learn a tokenizer from texts. vocab_size counts the 7 special tokens and the 256 bytes, or at the level "char"
    all characters of the texts (and with byte_fallback the bytes too); fewer tokens come out where the text runs out
    of pairs that occur `min_frequency` times. level, byte_fallback, split: see levels.level_named."""
    chosen, first = level_named(level, byte_fallback, split), len(SPECIAL_TOKENS)

    def first_merge_id(alphabet: list[str], what: str) -> int:
        smallest = first + len(alphabet)
        if vocab_size < smallest:
            raise UserError(
                f"vocab_size {vocab_size} is too small: the special tokens and the {what} are {smallest}"
            )
        return smallest

    from nanophi.tokenizer.fast.merges import LARGEST_VOCABULARY, Trainer
    from nanophi.tokenizer.fast.words import count_words

    if vocab_size > LARGEST_VOCABULARY:
        raise UserError(
            f"vocab_size {vocab_size:,} is too large: at most {LARGEST_VOCABULARY:,} are trained here"
        )
    first_merge_id(chosen.alphabet(()), "bytes")  # before the texts are read
    counted = count_words(texts, chosen)
    if not len(counted.counts):
        raise UserError("there is no text to train a tokenizer on")
    tokens = counted.alphabet()
    smallest = first_merge_id(tokens, "characters of this text")
    slots, weights = counted.lay_out({symbol: i for i, symbol in enumerate(tokens)})
    del counted
    trainer = Trainer(slots, weights, len(tokens), vocab_size - smallest, min_frequency)
    merges = trainer.run()
    for left, right in merges:
        tokens.append(tokens[left] + tokens[right])
    assert len(set(tokens)) == len(tokens), "two merges spell the same token"
    tok = Tokenizer(chosen, tokens, [(first + left, first + right) for left, right in merges])
    tok.merge_counts = trainer.merge_counts
    return tok
