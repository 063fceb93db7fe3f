"""Beam search: transformers' tokens."""

import pytest
import torch

from nanophi.cli import UserError
from nanophi.infer.beams import beam_search
from nanophi.infer.generate import generate
from tests.conftest import tiny_model
from tests.model.test_phi import hf_twin

PROMPT = [7, 50, 200, 33, 50, 200]
SETTINGS = [
    {},
    {"length_penalty": 2.0},
    {"length_penalty": -1.0},
    {"length_penalty": 0.0},
    {"early_stopping": True},
    {"repetition_penalty": 1.3},
    {"no_repeat_ngram_size": 2},
    {"no_repeat_ngram_size": 2, "early_stopping": True, "length_penalty": 0.5},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("beams", [2, 4])
@pytest.mark.parametrize("eos", ["often", "seldom"])
def test_beams_are_those_of_transformers(settings, beams, eos):
    """With an end that is likely, so that answers of many lengths compete."""
    for seed in range(3):
        model = tiny_model(seed=seed, spread=0.3, vocab_size=128)
        with torch.no_grad():
            model.lm_head.bias[1] += 3.0 if eos == "often" else 0.0
        theirs = hf_twin(model).generate(
            torch.tensor([[i % 128 for i in PROMPT]]), attention_mask=torch.ones(1, 6),
            max_new_tokens=12, do_sample=False, num_beams=beams, num_return_sequences=beams,
            eos_token_id=1, pad_token_id=0, return_dict_in_generate=True, output_scores=True,
            **settings,
        )  # fmt: skip
        found = beam_search(model, [i % 128 for i in PROMPT], beams, 12, **settings)
        expected = []
        for row in theirs.sequences[:, 6:].tolist():
            end = row.index(1) + 1 if 1 in row else len(row)
            expected.append(row[:end])
        assert [beam.ids for beam in found] == expected[: len(found)]
        scores = theirs.sequences_scores.tolist()[: len(found)]
        assert [beam.score for beam in found] == pytest.approx(scores, abs=1e-4)
        assert found


def test_one_beam_is_greedy():
    model = tiny_model(spread=0.3)
    (beam,) = beam_search(model, PROMPT, 1, 10)
    assert beam.ids == generate(model, PROMPT, 10)


def test_what_beam_search_cannot_do():
    model = tiny_model()
    with pytest.raises(UserError, match="does not sample"):
        beam_search(model, PROMPT, temperature=1.0)
    with pytest.raises(UserError, match="answers one prompt"):
        beam_search(model, [[7], [8]])
    with pytest.raises(UserError, match="beams is 0"):
        beam_search(model, PROMPT, 0)
