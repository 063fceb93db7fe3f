"""BPE training: the twins agree, and both agree with HF's BpeTrainer merge for merge."""

import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import models, pre_tokenizers, trainers

from nanophi.cli import UserError
from nanophi.text.bpe import learn_merges, learn_merges_naive, merge_pair, train_bpe
from nanophi.text.tokenizer import SPECIAL_TOKENS
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


words = st.dictionaries(st.lists(st.integers(0, 3), min_size=1, max_size=9).map(tuple), st.integers(1, 5), max_size=8)


@given(words, st.integers(1, 4))
def test_incremental_equals_naive(words, min_frequency):
    """Twelve merges at most: beyond that two merges may spell one token, which byte strings of real text do not."""
    assert learn_merges(words, 4, 12, min_frequency) == learn_merges_naive(words, 4, 12, min_frequency)


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
