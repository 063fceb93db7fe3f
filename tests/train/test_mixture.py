"""Sources are drawn by their weights, each through epochs of its own, and a batch still depends on
the step alone.
"""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanophi.cli import UserError
from nanophi.train.mixture import PERIOD, Mixture, interleaved, parse_mixture, rows_in_period
from nanophi.train.packing import Packed


def source(first: int, documents: int, batch_rows: int = 4) -> Packed:
    """Documents of 17 tokens that fill a row of 16 each; every token is `first` + its document's
    number.
    """
    return Packed([np.full(17, first + i) for i in range(documents)], 16, batch_rows, seed=1)


def test_weights_are_kept_and_each_source_is_read_in_epochs():
    mixture = Mixture(
        {"news": source(1000, 30), "poetry": source(5000, 7)}, [0.3, 0.1], batch_rows=4
    )
    steps = 70
    seen = torch.cat([mixture.batch_at(step).ids[:, 0] for step in range(steps)])
    assert mixture.given(4 * steps).tolist() == [210, 70]
    for first, documents, times in ((1000, 30, 7), (5000, 7, 10)):
        of_it = seen[(seen >= first) & (seen < first + 1000)]
        for epoch in range(times):  # each epoch holds every document once
            part = of_it[epoch * documents : (epoch + 1) * documents]
            assert sorted(part.tolist()) == list(range(first, first + documents))
    assert (
        mixture.epochs(steps)
        == "news 75.0% of the rows = 7.00 epochs, poetry 25.0% of the rows = 10.00 epochs"
    )
    per_step = [(mixture.batch_at(step).ids[:, 0] < 5000).sum().item() for step in range(steps)]
    assert set(per_step) == {3}  # evenly spread


def test_a_batch_depends_on_the_step_alone():
    first, second = (
        Mixture({"a": source(1000, 9), "b": source(5000, 5)}, [1, 2.5], 4) for _ in range(2)
    )
    later = {step: second.batch_at(step) for step in (40_001, 3, 17)}
    for step, batch in later.items():
        again = first.batch_at(step)
        assert torch.equal(again.ids, batch.ids)
        assert torch.equal(again.cu_seqlens, batch.cu_seqlens)
        assert batch.cu_seqlens.tolist() == [0, 16, 32, 48, 64]
    assert first.data_id == second.data_id
    others = [Mixture({"a": source(1000, 9), "b": source(5000, 5)}, w, 4) for w in ([1, 2], None)]
    assert len({first.data_id, *(other.data_id for other in others)}) == 3


def test_without_weights_each_source_is_read_as_often():
    mixture = Mixture({"a": source(1000, 30), "b": source(5000, 10)}, None, 4)
    assert len(mixture) == 40
    assert mixture.steps_per_epoch == 10
    assert (mixture.given(40_000) / [30, 10]).tolist() == [1000, 1000]
    assert mixture.tokens == 40 * 17


@given(st.lists(st.floats(1e-9, 1e9), min_size=1, max_size=6))
def test_shares_are_the_weights(weights):
    mixture = Mixture({str(i): source(100 * i, 2) for i in range(len(weights))}, weights, 1)
    shares = mixture.before[-1] / PERIOD
    assert mixture.before[-1].sum() == PERIOD
    assert np.abs(shares - np.array(weights) / sum(weights)).max() <= len(weights) / PERIOD
    assert shares.min() > 0  # a source is never left out


def test_the_pattern_is_even():
    assert interleaved([2, 4]).tolist() == [1, 0, 1, 1, 0, 1]
    pattern = interleaved([100, 900])
    assert all(abs((pattern[:n] == 0).sum() - n / 10) <= 1 for n in range(1000))


def test_how_a_mixture_is_written():
    assert parse_mixture("out/tokens") == {"out/tokens": None}
    assert parse_mixture("news:0.3, poetry:0.1") == {"news": 0.3, "poetry": 0.1}
    assert parse_mixture("C:\\tokens") == {"C:\\tokens": None}
    for wrong, message in (
        ("a:0,b:1", "above 0"),
        ("a:1,b", "to every source or to none"),
        ("a,a", "each source once"),
        ("a:1,./a/:1", "each source once"),  # one source by two names was read twice as often
    ):
        with pytest.raises(UserError, match=message):
            parse_mixture(wrong)


WRONG = {
    "no source": (lambda: Mixture({}, None, 4), "of sources by name"),
    "a list": (lambda: Mixture([source(0, 9)], None, 4), "of sources by name"),
    "few weights": (lambda: mixed([1.0]), "1 weights for 2 sources"),
    "nan": (lambda: mixed([1.0, float("nan")]), "the weight of b is NaN, expected a number above"),
    "a negative weight": (lambda: mixed([-1, 2]), "the weight of a is -1, expected a number above"),
    "a text": (lambda: mixed(["1", "2"]), 'the weight of a is "1", expected a number'),
    "no rows": (lambda: Mixture({"a": source(0, 9)}, None, 0), "batch_rows is 0"),
    "a step before 0": (lambda: mixed(None).batch_at(-1), "a step is a whole number of at least 0"),
    "rows of two lengths": (
        lambda: Mixture({"a": source(0, 9), "b": Packed([[1, 2, 3]], 8, 4, seed=1)}, None, 4),
        r"rows of several lengths: \{'a': 16, 'b': 8\}",
    ),
}


def mixed(weights):
    return Mixture({"a": source(1000, 9), "b": source(5000, 5)}, weights, 4)


@pytest.mark.parametrize(("call", "message"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_mixture_is_one_line(call, message):
    """One weight for two sources was taken for that of the first, and the second was never read."""
    with pytest.raises(UserError, match=message):
        call()


@pytest.mark.parametrize(
    ("weights", "counts"),
    [
        ([1e-320, 1e-320], [5000, 5000]),
        ([1e308, 1e308], [5000, 5000]),
        ([5e-324, 1.7e308], [1, 9999]),
        ([3.0, 1.0], [7500, 2500]),
    ],
)
def test_tiny_and_huge_weights_keep_their_shares(weights, counts):
    """The sum of huge weights is infinite, and their shares were lost with a warning of numpy's."""
    assert rows_in_period(np.array(weights)).tolist() == counts
