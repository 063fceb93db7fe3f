"""Each filter against transformers' processor of the same name."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from nanophi.cli import UserError
from nanophi.infer.sampling import (
    Sampling,
    choose,
    forbid_repeated_ngrams,
    keep_top_k,
    keep_top_p,
    penalize_repetition,
)

histories = st.lists(st.integers(0, 9), min_size=1, max_size=20)


def random_logits(seed, rows=2, vocab=10):
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 3


@given(history=histories, penalty=st.floats(1.01, 3.0), seed=st.integers(0, 99))
def test_repetition_penalty(history, penalty, seed):
    logits, history = random_logits(seed), [history, history[::-1]]
    expected = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor(history), logits.clone())
    torch.testing.assert_close(penalize_repetition(logits, history, penalty), expected)


@given(history=histories, size=st.integers(1, 4), seed=st.integers(0, 99))
def test_no_repeat_ngram(history, size, seed):
    logits, history = random_logits(seed), [history, history[::-1]]
    expected = NoRepeatNGramLogitsProcessor(size)(torch.tensor(history), logits.clone())
    assert torch.equal(forbid_repeated_ngrams(logits, history, size), expected)


@given(k=st.integers(1, 12), seed=st.integers(0, 99))
def test_top_k(k, seed):
    logits = random_logits(seed).round()  # rounding makes ties
    assert torch.equal(keep_top_k(logits, k), TopKLogitsWarper(k)(None, logits))


@given(p=st.floats(0.01, 0.99), seed=st.integers(0, 99))
def test_top_p(p, seed):
    logits = random_logits(seed)
    assert torch.equal(keep_top_p(logits, p), TopPLogitsWarper(p)(None, logits))


def test_greedy_takes_the_first_maximum_after_the_penalties():
    logits = torch.tensor([[1.0, 5.0, 5.0, 0.0]])
    assert choose(logits, [[9 % 4]], Sampling()) == [1]
    assert choose(logits, [[1]], Sampling(repetition_penalty=2.0)) == [2]
    assert choose(logits, [[3, 1, 3]], Sampling(no_repeat_ngram_size=2)) == [2]


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": -1.0},
        {"top_k": 0},
        {"top_p": 1.5},
        {"repetition_penalty": 0.0},
        {"no_repeat_ngram_size": -1},
    ],
)
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(UserError, match="is out of range"):
        Sampling(**settings)


def test_sampling_is_reproducible_and_follows_the_probabilities():
    logits = torch.log(torch.tensor([[0.1, 0.6, 0.3]])).repeat(4000, 1)
    drawn = [
        choose(logits, [[]] * 4000, Sampling(temperature=1.0), torch.Generator().manual_seed(1))
        for _ in range(2)
    ]
    assert drawn[0] == drawn[1]
    shares = torch.tensor(drawn[0]).bincount(minlength=3) / 4000
    torch.testing.assert_close(shares, torch.tensor([0.1, 0.6, 0.3]), atol=0.03, rtol=0)
    assert set(choose(logits, [[]] * 4000, Sampling(temperature=1.0, top_k=2))) == {1, 2}
    assert set(choose(logits, [[]] * 4000, Sampling(temperature=1.0, top_p=0.5))) == {1}
    assert set(choose(logits, [[]] * 4000, Sampling(temperature=0.01))) == {1}
