from collections import Counter

import nanophi
from examples import small
from nanophi.tokenizer.levels import level_named

LIMIT = 30


def test_a_pair_is_merged_from_left_to_right(mine):
    assert mine.merge_pair([1, 1, 1, 2], (1, 1), 9) == [9, 1, 2]
    assert mine.merge_pair([5, 6, 5, 6], (5, 6), 7) == [7, 7]
    assert mine.merge_pair([], (1, 1), 9) == []


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
    assert mine.learn_merges(words, first_new=256, limit=LIMIT) == expected
