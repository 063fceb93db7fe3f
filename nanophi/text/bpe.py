"""BPE training (Sennrich et al. 2016): which pairs of tokens to merge, learned from counted words.

Two implementations of one rule: `learn_merges_naive` to read, `learn_merges` to use, tested equal to each other and to
HF tokenizers' BpeTrainer, merge for merge. The rule: merge the most frequent adjacent pair; among equals the one with
the smaller ids; stop below `min_frequency`. Pairs are counted raw ("aaa" holds two "aa") and merged left to right.

    words   {word: how often}, a word being one pre-token of the split, as a tuple of ids of bytes or characters
    pair    two adjacent token ids        merges  the pairs chosen so far, in order        ids  a word being merged
"""

import heapq
from collections import Counter, defaultdict
from collections.abc import Iterable
from itertools import pairwise

from nanophi.cli import Progress, UserError
from nanophi.text.levels import Level, level_named
from nanophi.text.tokenizer import SPECIAL_TOKENS, Tokenizer

Pair = tuple[int, int]


def count_words(texts: Iterable[str], level: Level) -> Counter:
    """Texts -> how often each pre-token occurs."""
    words = Counter()
    for text in texts:
        words.update(level.words(level.normalized(text)))
    return words


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


def learn_merges_naive(words: dict[tuple[int, ...], int], first_new: int, limit: int, min_frequency: int) -> list[Pair]:
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


def learn_merges(words: dict[tuple[int, ...], int], first_new: int, limit: int, min_frequency: int) -> list[Pair]:
    """The same merges, touching only the words that hold the chosen pair.

    Counts are kept up to date, and a heap finds the largest. A pair's count never grows after the merge that made the
    pair possible, so heap entries can only be too high: an entry that no longer agrees is pushed again with today's
    count. Entries are (-count, pair), which puts ties in order of ids.
    """
    corpus, weights = [list(word) for word in words], list(words.values())
    counts: dict[Pair, int] = defaultdict(int)
    where: dict[Pair, set[int]] = defaultdict(set)  # words that hold the pair, or once did
    for index, ids in enumerate(corpus):
        for pair in pairwise(ids):
            counts[pair] += weights[index]
            where[pair].add(index)
    heap = [(-count, pair) for pair, count in counts.items()]
    heapq.heapify(heap)
    merges: list[Pair] = []
    with Progress("merges", limit) as bar:
        while heap and len(merges) < limit:
            negative, pair = heapq.heappop(heap)
            count = counts[pair]
            if count < max(min_frequency, 1):
                continue
            if count != -negative:
                heapq.heappush(heap, (-count, pair))
                continue
            new = first_new + len(merges)
            merges.append(pair)
            for made in _merge_everywhere(pair, new, corpus, weights, counts, where):
                heapq.heappush(heap, (-counts[made], made))
            bar.update(1, f"count {count:,}")
    return merges


def _merge_everywhere(pair: Pair, new: int, corpus, weights, counts, where) -> set[Pair]:
    """Merge `pair` in every word that holds it, adjusting the counts of its neighbours; return the pairs that arose."""
    left, right = pair
    made = set()
    for index in where.pop(pair):
        ids, weight = corpus[index], weights[index]
        i = 0
        while i < len(ids) - 1:
            if ids[i] != left or ids[i + 1] != right:
                i += 1
                continue
            if i > 0:
                counts[ids[i - 1], left] -= weight
                counts[ids[i - 1], new] += weight
                where[ids[i - 1], new].add(index)
                made.add((ids[i - 1], new))
            if i + 2 < len(ids):
                counts[right, ids[i + 2]] -= weight
                counts[new, ids[i + 2]] += weight
                where[new, ids[i + 2]].add(index)
                made.add((new, ids[i + 2]))
            ids[i : i + 2] = [new]
            i += 1
    del counts[pair]
    return made


def train_bpe(
    texts: Iterable[str],
    vocab_size: int = 40960,
    min_frequency: int = 2,
    level: str = "byte",
    byte_fallback: bool = False,
) -> Tokenizer:
    """Learn a tokenizer from texts. vocab_size counts the 7 special tokens and the 256 bytes, or at the level "char"
    all characters of the texts (and with byte_fallback the bytes too); fewer tokens come out where the text runs out
    of pairs that occur `min_frequency` times."""
    split, first = level_named(level, byte_fallback), len(SPECIAL_TOKENS)

    def first_merge_id(alphabet: list[str], what: str) -> int:
        smallest = first + len(alphabet)
        if vocab_size < smallest:
            raise UserError(f"vocab_size {vocab_size} is too small: the special tokens and the {what} are {smallest}")
        return smallest

    first_merge_id(split.alphabet(()), "bytes")  # before the texts are read
    counted = count_words(texts, split)
    if not counted:
        raise UserError("there is no text to train a tokenizer on")
    tokens = split.alphabet(counted)
    smallest = first_merge_id(tokens, "characters of this text")
    ids = {symbol: i for i, symbol in enumerate(tokens, start=first)}
    words = {tuple(ids[symbol] for symbol in split.symbols(word)): count for word, count in counted.items()}
    merges = learn_merges(words, smallest, vocab_size - smallest, min_frequency)
    for left, right in merges:
        tokens.append(tokens[left - first] + tokens[right - first])
    assert len(set(tokens)) == len(tokens), "two merges spell the same token"
    return Tokenizer(split, tokens, merges)
