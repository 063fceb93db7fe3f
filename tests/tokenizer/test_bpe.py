"""BPE training: the twins agree, and both agree with HF's BpeTrainer merge for merge."""

import json
from collections import Counter
from functools import cache

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import models, pre_tokenizers, trainers

from nanophi.cli import UserError
from nanophi.tokenizer.bpe import encode_word_naive, learn_merges_naive, merge_pair, train_bpe
from nanophi.tokenizer.fast import merges as numpy_merges
from nanophi.tokenizer.fast import words as numpy_words
from nanophi.tokenizer.fast.merges import Trainer
from nanophi.tokenizer.fast.table import Table
from nanophi.tokenizer.fast.words import WordCounter, count_words
from nanophi.tokenizer.levels import ByteLevel, CharLevel
from nanophi.tokenizer.tokenizer import SPECIAL_TOKENS, merge_word
from tests.conftest import TEXTS


def hf_model(texts, vocab_size, min_frequency):
    hf = HFTokenizer(models.BPE())
    hf.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    hf.train_from_iterator(texts, trainer)
    return json.loads(hf.to_str())["model"]


@pytest.mark.parametrize("vocab_size", [263, 300, 700])
@pytest.mark.parametrize("min_frequency", [1, 2, 4])
def test_vocabulary_and_merges_are_those_of_hf(vocab_size, min_frequency):
    ours = train_bpe(TEXTS, vocab_size, min_frequency).to_dict()["model"]
    theirs = hf_model(TEXTS, vocab_size, min_frequency)
    assert ours["merges"] == theirs["merges"]
    assert ours["vocab"] == theirs["vocab"]


@given(st.lists(st.text(st.sampled_from("ab 哈呀1!\n"), max_size=30), min_size=1, max_size=6))
@example(["aaaa aaa aa"])  # overlapping runs: "aaa" holds two "aa", of which one can be merged
@example(["abab ababab"])
def test_random_texts_give_the_merges_of_hf(texts):
    if not any(texts):
        return
    ours = train_bpe(texts, 290, 2).to_dict()["model"]
    assert ours["merges"] == hf_model(texts, 290, 2)["merges"]


words = st.dictionaries(
    st.text("abcd", min_size=1, max_size=12), st.integers(1, 5), min_size=1, max_size=12
)


@pytest.mark.parametrize("positions", [1, 4, 16_384])
@pytest.mark.parametrize("few_symbols", [True, False])
@given(words=words, min_frequency=st.integers(1, 4), floor=st.integers(1, 20))
@example(words={"aaaaaaaaaaab": 1, "aaaa": 3, "baaab": 2}, min_frequency=1, floor=1)
@example(words={"abcdabcd": 3, "cdab": 3, "ab": 1, "cd": 1}, min_frequency=1, floor=20)
def test_numpy_equals_naive(words, min_frequency, floor, positions, few_symbols):
    """Whatever a batch may hold, wherever the floor begins, and by both ways to build the index."""
    naive = {tuple("abcd".index(char) for char in word): count for word, count in words.items()}
    counted = count_words(
        [word for word, count in words.items() for _ in range(count)], CharLevel()
    )
    slots, weights = counted.lay_out({symbol: i for i, symbol in enumerate("abcd")})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(numpy_merges, "BATCH_POSITIONS", positions)
        patch.setattr(numpy_merges, "SLOTS_AT_ONCE", 64)
        trainer = Trainer(slots, weights, 4, 40, min_frequency)
        trainer.floor = max(trainer.lowest, floor)
        if not few_symbols:
            patch.setattr(Trainer, "_few_pairs", lambda trainer: False)
        assert trainer.run() == learn_merges_naive(naive, 4, 40, min_frequency)


def words_of(counter: WordCounter) -> Counter:
    """What a counter holds, as strings."""
    found = Counter()
    for begin, length, count in zip(counter.begins, counter.lengths, counter.counts, strict=True):
        found["".join(map(chr, counter.codes[begin : begin + length]))] += int(count)
    return found


@pytest.mark.parametrize("level", [ByteLevel(), CharLevel()], ids=["byte", "char"])
@pytest.mark.parametrize("different_hashes", [1, 3, 2**64])
@given(texts=st.lists(st.text(st.sampled_from("ab 哈呀，1'st!\n😀"), max_size=20), max_size=12))
def test_words_are_counted_exactly_whatever_the_hash(level, different_hashes, texts):
    """Two words of one hash must not be taken for each other.

    Even if all words have the same hash, each is counted by itself.
    """
    true_keys, few = numpy_words.keys_of, np.uint64(different_hashes % 2**64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(numpy_words, "BLOCK_CHARACTERS", 30)
        if different_hashes < 2**64:
            patch.setattr(
                numpy_words, "keys_of", lambda *where: true_keys(*where) % few | np.uint64(1 << 63)
            )
        expected = Counter(word for text in texts for word in level.words(level.normalized(text)))
        assert words_of(count_words(texts, level)) == expected


def test_half_a_surrogate_pair_is_refused():
    with pytest.raises(UserError, match="half of a surrogate pair"):
        train_bpe(["好\ud83d"], 300)


@pytest.mark.parametrize("key_type", [np.uint32, np.uint64])
@given(parts=st.lists(st.lists(st.integers(0, 2**32 - 1), max_size=200), max_size=4))
def test_table_is_a_dictionary(parts, key_type):
    table, expected = Table(key_type, bits=1), {}
    for part in parts:
        new = [key for key in dict.fromkeys(part) if key not in expected]
        rows = range(len(expected), len(expected) + len(new))
        table.add(np.array(new, key_type), np.array(rows, np.int32))
        expected |= dict(zip(new, rows, strict=True))
        asked = np.array([*expected, 1, 2, 3], key_type)
        assert table.find(asked).tolist() == [expected.get(key, -1) for key in asked.tolist()]


def test_merge_pair_is_leftmost_greedy():
    assert merge_pair([1, 1, 1, 2], (1, 1), 9) == [9, 1, 2]
    assert merge_pair([1, 1, 1, 1], (1, 1), 9) == [9, 9]


def test_mistakes():
    with pytest.raises(UserError, match="vocab_size 100 is too small"):
        train_bpe(TEXTS, 100)
    with pytest.raises(UserError, match="no text"):
        train_bpe([])
    with pytest.raises(UserError, match="level 'word'"):
        train_bpe(TEXTS, 300, level="word")
    with pytest.raises(UserError, match=r"takes a list of strings.* write train_bpe\(\[text\]\)"):
        train_bpe("感冒了要多喝水", 300)


pairs_of_ids = st.tuples(st.integers(0, 4), st.integers(0, 4))


@given(ids=st.lists(st.integers(0, 4), max_size=40), pairs=st.lists(pairs_of_ids, unique=True))
@example(ids=[0] * 7, pairs=[(0, 0), (1, 1), (1, 0)])
@example(ids=[0, 1, 0, 1, 1], pairs=[(1, 1), (0, 1)])
def test_the_heap_merges_as_the_naive_encoder(ids, pairs):
    """Whatever the merges make: here even a token that an earlier merge takes up."""
    merges = {pair: (rank, rank % 5) for rank, pair in enumerate(pairs)}
    before = list(ids)
    assert merge_word(ids, merges) == encode_word_naive(ids, merges)
    assert ids == before


@pytest.mark.parametrize("level", ["byte", "char"])
@given(word=st.text(st.sampled_from("感冒了要多喝水月光a's 1哈"), max_size=40))
def test_encode_word_is_the_naive_encoding(level, word):
    tok = trained(level)
    word = tok.level.normalized(word)
    symbols = [tok.vocab[symbol] for symbol in tok.level.symbols(word)]
    assert tok.encode_word(word) == encode_word_naive(symbols, tok.merges)


@cache
def trained(level: str):
    return train_bpe(TEXTS, 600, level=level)
