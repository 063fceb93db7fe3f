"""Each filter against transformers' processor of the same name."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import generate as script
import nanophi
from nanophi.cli import UserError, run_command
from nanophi.infer.sampling import (
    FILTERS,
    NEVER,
    Filter,
    Keywords,
    Sampling,
    choose,
    forbid_repeated_ngrams,
    keep_top_k,
    keep_top_p,
    penalize_repetition,
)
from tests.conftest import QUESTION

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
    assert torch.equal(keep_top_k(logits, [], k), TopKLogitsWarper(k)(None, logits))


@given(p=st.floats(0.01, 0.99), seed=st.integers(0, 99))
def test_top_p(p, seed):
    logits = random_logits(seed)
    assert torch.equal(keep_top_p(logits, [], p), TopPLogitsWarper(p)(None, logits))


def test_greedy_takes_the_first_maximum_after_the_penalties():
    logits = torch.tensor([[1.0, 5.0, 5.0, 0.0]])
    assert choose(logits, [[9 % 4]], Sampling()) == [1]
    assert choose(logits, [[1]], Sampling(repetition_penalty=2.0)) == [2]
    assert choose(logits, [[3, 1, 3]], Sampling(no_repeat_ngram_size=2)) == [2]


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": -1.0},
        {"top_k": -1},
        {"top_p": 1.5},
        {"repetition_penalty": 0.0},
        {"no_repeat_ngram_size": -1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"temperature": "1"},
        {"temperature": True},
        {"top_k": 2.0},
        {"top_k": "5"},
        {"top_p": 0},
        {"top_p": [0.5]},
        {"no_repeat_ngram_size": 1.5},
    ],
)
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(UserError, match="is out of range"):
        Sampling(**settings)


def test_none_and_the_neutral_value_turn_a_filter_off():
    """As in transformers. temperature=None was a TypeError, and top_k=0 was refused."""
    assert Sampling(**dict.fromkeys(FILTERS)).chosen == {}
    assert Sampling(top_k=0, top_p=1, temperature=0).chosen == {}
    assert Sampling(top_k=0, temperature=1).chosen == {"temperature": 1}


TINY, HUGE = 5e-324, 1e308


@pytest.mark.parametrize(
    "how",
    [
        {"temperature": 1e-45},
        {"temperature": TINY},
        {"temperature": TINY, "repetition_penalty": TINY},
        {"temperature": TINY, "no_repeat_ngram_size": 1},
        {"temperature": TINY, "top_p": TINY},
        {"temperature": 1.0, "repetition_penalty": TINY},
    ],
    ids=repr,
)
def test_extreme_settings_choose_the_likeliest(how):
    """1 / 1e-45 is beyond fp32, and the probabilities became nan: a RuntimeError of torch."""
    logits = torch.tensor([[0.0, -2.0, 5.0, -1.0]])
    history = [[2]] if "repetition_penalty" in how else [[1]]
    assert choose(logits, history, Sampling(**how)) == [2]


@pytest.mark.parametrize(
    "how", [{"temperature": HUGE, "top_k": 2}, {"temperature": 1.0, "repetition_penalty": HUGE}]
)
def test_extreme_settings_leave_numbers(how):
    logits = torch.tensor([[0.0, -2.0, 5.0, -1e4]])
    for history in ([[1]], [[0, 1, 2, 3]]):
        assert choose(logits, history, Sampling(**how))[0] in (0, 1, 2)


def test_unknown_filters_are_refused_with_the_names_of_the_known_ones():
    with pytest.raises(UserError, match=r"no sampling filter is called 'topk'; .* top_k, top_p"):
        Sampling(topk=5)


def test_editors_know_the_filters_of_the_table():
    assert Keywords.__annotations__.keys() == FILTERS.keys()


def test_filters_are_applied_in_the_order_of_the_table():
    how = Sampling(top_p=0.5, top_k=3, temperature=0.7, repetition_penalty=1.2)
    assert list(how.chosen) == ["repetition_penalty", "temperature", "top_k", "top_p"]
    assert Sampling(**{name: row.default for name, row in FILTERS.items()}).chosen == {}


@given(seed=st.integers(0, 99))
def test_top_p_of_1_keeps_every_probability(seed):
    logits = random_logits(seed, vocab=50) * 20
    assert torch.equal(keep_top_p(logits, [], 1.0).softmax(-1), logits.softmax(-1))


def keep_min_p(logits, history, p):
    probabilities = logits.softmax(-1)
    highest = probabilities.max(-1, keepdim=True).values
    return logits.masked_fill(probabilities < p * highest, NEVER)


def test_a_filter_from_outside_needs_one_function_and_one_row(house, monkeypatch, capsys):
    """min_p (Nguyen et al. 2024) through generate, stream and the command line."""
    row = Filter(keep_min_p, float, None, "drop what is below this share of the best", 0, None, 1)
    monkeypatch.setitem(FILTERS, "min_p", row)
    logits = random_logits(0)
    torch.testing.assert_close(
        keep_min_p(logits, [], 0.2), MinPLogitsWarper(min_p=0.2)(None, logits)
    )
    model, tok = nanophi.load(house / "sft")
    ids = nanophi.chat_prompt(QUESTION, tok)
    greedy = nanophi.generate(model, ids)
    # At temperature 3 an unfiltered answer is noise; min_p 1 leaves the likeliest id alone.
    generator = torch.Generator().manual_seed(0)
    noise = nanophi.generate(model, ids, temperature=3.0, generator=generator)
    assert noise != greedy
    assert nanophi.generate(model, ids, temperature=3.0, min_p=1.0) == greedy
    text = "".join(nanophi.stream(model, tok, ids, temperature=3.0, min_p=1.0))
    assert text == tok.decode(greedy, skip_special_tokens=True)
    command = ["--model", str(house / "sft"), "--prompt", QUESTION, "--device", "cpu"]
    run_command(script.Config, script.main, [*command, "--temperature", "3", "--min-p", "1"])
    assert capsys.readouterr().out == text + "\n"
    with pytest.raises(SystemExit):
        run_command(script.Config, script.main, [*command, "--min-p", "0.1"])
    assert "--top-k and --top-p and --min-p choose among sampled" in capsys.readouterr().err
    with pytest.raises(UserError, match="min_p 2 is out of range: it must be at least 0 and at m"):
        nanophi.generate(model, ids, min_p=2)


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
