from collections import Counter
from itertools import zip_longest

import nanophi
from examples import small
from nanophi.tokenizer.levels import level_named

LIMIT = 30


def test_a_pair_is_merged_from_left_to_right(mine):
    for ids, pair, new, expected in (
        ([1, 1, 1, 2], (1, 1), 9, [9, 1, 2]),
        ([5, 6, 5, 6], (5, 6), 7, [7, 7]),
        ([1, 2, 3], (2, 1), 9, [1, 2, 3]),
        ([], (1, 1), 9, []),
    ):
        found = mine.merge_pair(list(ids), pair, new)
        assert found == expected, f"{ids} with {pair} -> {new} is {expected}; {found} came"


def test_the_merges_of_the_example(mine):
    words = {(0, 1, 2): 3, (0, 1): 2, (1, 2): 3}
    agrees(mine.learn_merges(words, 9, 5), [(1, 2), (0, 9), (0, 1)])


def test_among_equally_frequent_pairs_the_smaller_ids_go_first(mine):
    words = {(3, 1): 2, (1, 3): 2, (1, 2): 2}
    agrees(mine.learn_merges(words, 9, 5), [(1, 2), (1, 3), (3, 1)])


def test_learning_stops_when_no_pair_occurs_twice_or_there_are_enough(mine):
    for words, limit, expected in (
        ({(0,): 5}, 5, []),
        ({(0, 1): 1}, 5, []),
        ({(0, 1): 2}, 5, [(0, 1)]),
        ({(0, 1, 2): 2}, 1, [(0, 1)]),
    ):
        found = mine.learn_merges(words, 9, limit)
        assert found == expected, f"{words} with the limit {limit}: {expected}; {found} came"


def test_the_merges_are_those_of_the_fast_trainer(mine):
    texts = small.texts("documents")[:20]
    level = level_named("byte", byte_fallback=False, split="gpt2")
    alphabet = {symbol: number for number, symbol in enumerate(level.alphabet(()))}
    words = Counter(
        tuple(alphabet[symbol] for symbol in level.symbols(word))
        for text in texts
        for word in level.words(level.normalized(text))
    )
    tok = nanophi.train_bpe(texts, vocab_size=7 + 256 + LIMIT)
    expected = [(left - 7, right - 7) for left, right in tok.merge_list]
    agrees(mine.learn_merges(words, first_new=256, limit=LIMIT), expected)


def agrees(found, expected):
    """Where they differ first."""
    for number, (theirs, yours) in enumerate(zip_longest(expected, found)):
        assert yours == theirs, f"merge {number}: expected {theirs}, yours {yours}"
