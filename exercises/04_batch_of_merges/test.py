import random
from collections import Counter
from itertools import pairwise

CORPORA = 300
LIMIT = 12  # merges of each
LARGEST = 8  # pairs that are offered at once


def test_pairs_that_can_overlap_are_not_merged_together(mine):
    for best, why in (
        ([((1, 2), 8), ((2, 3), 6)], '"1 2 3" holds both'),
        ([((2, 3), 8), ((1, 2), 6)], '"1 2 3" holds both'),
        ([((1, 2), 8), ((2, 1), 6)], '"1 2 1" holds both'),
        ([((1, 1), 8), ((3, 4), 3)], '"1 1 1" four times gives the pair (new, 1) four times'),
    ):
        found = mine.safe_count(best)
        assert found == 1, f"{best}: {why}, so 1 is safe; yours says {found}"


def test_the_third_pair_may_stop_what_the_second_did_not(mine):
    found = mine.safe_count([((1, 2), 9), ((3, 4), 8), ((4, 5), 7), ((6, 7), 6)])
    assert found == 2, f"(4, 5) overlaps (3, 4), so 2 are safe; yours says {found}"


def test_pairs_without_a_common_token_are_merged_together(mine):
    found = mine.safe_count([((1, 2), 8), ((3, 4), 6), ((5, 6), 6)])
    assert found == 3, f"(1, 2), (3, 4) and (5, 6) share nothing: 3 are safe; yours says {found}"


def test_never_another_result_than_one_by_one_and_more_than_one_on_average(mine):
    dice = random.Random(0)
    merges = batches = 0
    corpora = [random_words(dice) for _ in range(CORPORA)]
    for words in sorted(corpora, key=lambda words: sum(map(len, words))):  # the smallest first
        expected, ids, _ = learn(words, lambda best: 1)
        found, found_ids, used = learn(words, mine.safe_count)
        for number, pair in enumerate(expected):
            assert found[number : number + 1] == [pair], (
                f"merge {number} of the words {words} is {pair} one by one; yours merges "
                f"{found[: number + 1]}"
            )
        assert found_ids == ids, f"{words} become {ids} one by one, {found_ids} with yours"
        merges += len(expected)
        batches += used
    average = merges / batches
    assert average > 1.2, f"a batch holds {average:.2f} merges on average, expected above 1.2"


def random_words(dice):
    """Word -> count: 1 to 8 words of 2 to 7 of some 6 symbols."""
    symbols = range(dice.randint(2, 8))
    words = [tuple(dice.choices(symbols, k=dice.randint(2, 7))) for _ in range(dice.randint(1, 8))]
    return {word: dice.randint(1, 9) for word in words}


def learn(words, how_many):
    """(merges, words after them, number of batches), all pairs counted anew for each batch."""
    corpus = [(list(word), count) for word, count in words.items()]
    merges = []
    batches = 0
    while len(merges) < LIMIT:
        counts = Counter()
        for ids, count in corpus:
            for pair in pairwise(ids):
                counts[pair] += count
        best = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        best = [(pair, count) for pair, count in best if count >= 2]
        best = best[: min(LARGEST, LIMIT - len(merges))]
        if not best:
            break
        size = how_many(list(best))
        assert size in range(1, len(best) + 1), f"{size} of {len(best)} pairs: expected 1 or more"
        new = {pair: 100 + len(merges) + i for i, (pair, _) in enumerate(best[:size])}
        corpus = [(merged(ids, new), count) for ids, count in corpus]
        merges += new
        batches += 1
    return merges, [ids for ids, _ in corpus], batches


def merged(ids, new):
    """One pass from left to right; new: pair -> id."""
    result = []
    i = 0
    while i < len(ids):
        pair = tuple(ids[i : i + 2])
        result.append(new.get(pair, ids[i]))
        i += 2 if pair in new else 1
    return result
