"""What callers of the training functions may give: numpy and lists where that is clear, and one
line that says what was expected otherwise.
"""

import numpy as np
import pytest
import torch

import nanophi
from nanophi.cli import UserError
from nanophi.train.losses import dpo_loss
from nanophi.train.optim import build_optimizers, schedule
from nanophi.train.packing import Packed
from nanophi.train.preferences import Pairs, Preference
from tests.conftest import tiny_model

LEARNED = ([7, 8, 9], [False, True, True])


def packed(document=(7, 8, 9), **changes):
    return Packed([document] * 9, **{"context": 8, "batch_rows": 2, "seed": 1} | changes)


def pairs(side=LEARNED, **changes):
    return Pairs([Preference(LEARNED, side)], **{"batch_pairs": 1, "seed": 1} | changes)


WRONG = {
    "shapes that broadcast": (
        lambda: dpo_loss(*[torch.zeros(4)] * 3, torch.zeros(4, 1)),
        r"shapes \(4,\), \(4,\), \(4,\), \(4, 1\), expected \(B,\) of each",
    ),
    "numbers": (lambda: dpo_loss(-1.0, -2.0, -1.0, -2.0), "are tensors"),
    "a text as ids": (lambda: packed("abc"), "document 0 has the form"),
    "floats as ids": (lambda: packed([1.5, 2.5]), "document 0 .* float64, expected ids"),
    "rows as ids": (lambda: packed(np.ones((2, 3), int)), r"document 0 has the form \(2, 3\)"),
    "few masks": (lambda: packed(masks=[[True] * 3] * 2), "2 masks for 9 documents"),
    "a short mask": (lambda: packed(masks=[[True] * 2] * 9), "mask of document 0 has the length 2"),
    "no context": (lambda: packed(context=0), "context is 0"),
    "no rows": (lambda: packed(batch_rows=-1), "batch_rows is -1"),
    "a step before 0": (lambda: packed().batch_at(-1), "a step is a whole number of at least 0"),
    "half a step": (lambda: pairs().batch_at(1.5), "a step is a whole number of at least 0"),
    "ids without a mask": (lambda: pairs([7, 8, 9]), "pair 0: rejected is of type list, expected"),
    "a short mask of a pair": (lambda: pairs(([7, 8], [True])), "has 2 ids and a mask of 1"),
    "no pairs": (lambda: pairs(batch_pairs=0), "batch_pairs is 0"),
    "no rate": (lambda: build_optimizers(tiny_model(), "muon", float("nan"), 0.1), "lr is NaN"),
    "a rate of letters": (lambda: build_optimizers(tiny_model(), "adamw", "1", 0.1), 'lr is "1"'),
    "a step behind the end": (lambda: schedule("wsd", 10, steps=10, warmup=1), "step is 10"),
    "no share": (lambda: schedule("wsd", 1, 10, 1, decay=float("nan")), "decay is NaN"),
    "a model without a path": (lambda: nanophi.load(None), "the directory of a model is null"),
    "a text of bytes": (lambda: nanophi.clean(b"x"), "expected a string"),
}


@pytest.mark.parametrize(("call", "message"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_argument_is_one_line(call, message):
    """(B,) and (B, 1) gave B * B losses, 1.5 became the id 1, and the rest ended in tracebacks."""
    with pytest.raises(UserError, match=message):
        call()


@pytest.mark.parametrize("form", [list, tuple, np.array, torch.tensor])
def test_ids_in_any_form_are_packed_alike(form):
    batch = packed(form([7, 8, 9])).batch_at(np.int64(3))
    assert torch.equal(batch.ids, packed().batch_at(3).ids)
