"""The decoder is the network once more: the same states, whatever is prepared and however rows come
and go.
"""

import copy

import pytest
import torch
from torch import nn

import nanophi
from nanophi.cli import UserError
from nanophi.infer import decoder, generate
from nanophi.infer.decoder import Decoder, decoder_of
from nanophi.infer.products import PRODUCTS, why_not
from nanophi.model.phi import KVCache, Phi
from tests.conftest import tiny_model
from tests.model.test_phi import SHAPES, tokens

ROOM = 24


def able(precision: str):
    reason = why_not(precision)
    mark = pytest.mark.skipif(reason is not None, reason=str(reason))
    return pytest.param(precision, marks=mark)


ABLE = [able(name) for name in PRODUCTS]


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@torch.no_grad()
def test_states_are_those_of_the_network(shape):
    """Prompts, single tokens and several at once, with rows of unequal lengths."""
    model = tiny_model(**shape)
    fast = Decoder(model)
    caches = [KVCache(model.cfg, 3, ROOM, model.lm_head.weight) for _ in range(2)]
    ids = tokens(3, ROOM)
    for lengths, time in (([0, 0, 0], 7), ([2, 7, 4], 1), ([3, 8, 5], 3), ([6, 6, 6], 1)):
        for cache in caches:
            cache.lengths[:] = torch.tensor(lengths)
        expected = model.hidden(ids[:, :time], cache=caches[0])
        found = fast.hidden(ids[:, :time], cache=caches[1])
        assert (found - expected).abs().max() < 2e-5
        assert (fast.lm_head(found) - model.lm_head(expected)).abs().max() < 2e-5


@pytest.mark.parametrize("precision", ABLE)
@torch.no_grad()
def test_a_product_is_close_and_other_rows_do_not_change_it(precision):
    torch.manual_seed(0)
    weight, bias = torch.randn(96, 64), torch.randn(96)
    product = PRODUCTS[precision](weight, bias)
    x = torch.randn(9, 64) * torch.logspace(-3, 2, 9)[:, None]
    expected = nn.functional.linear(x, weight, bias)
    error = ((product(x) - expected).norm(dim=1) / expected.norm(dim=1)).max()
    assert error < {"fp32": 1e-6, "fp16": 1e-3, "int8": 3e-2}[precision]
    assert product(x.view(3, 3, 64)).shape == (3, 3, 96)
    if precision != "fp32":
        alone = torch.cat([product(row[None]) for row in x])
        assert torch.equal(product(x), alone)
    nothing = torch.zeros(1, 64)
    assert torch.allclose(product(nothing), bias)
    assert torch.equal(product(nothing.expand(2, -1)), product(nothing).expand(2, -1))
    assert not product(nothing + torch.nan).isfinite().any()  # damage is not hidden


@pytest.mark.parametrize("precision", ABLE)
def test_answers_hardly_depend_on_the_precision(precision):
    model = tiny_model(spread=0.3, max_position_embeddings=128)
    model.decoding_weights = precision
    prompts = [[7, 50, 200], [9, 8, 33, 50, 200, 201, 202]]
    together = generate.generate(model, prompts, 20, eos_token_id=None)
    assert together == [generate.generate(model, p, 20, eos_token_id=None) for p in prompts]
    if precision == "fp16":
        model.decoding_weights = "fp32"
        assert together == generate.generate(model, prompts, 20, eos_token_id=None)


def test_weights_that_change_are_prepared_again():
    model = tiny_model()
    first = decoder_of(model)
    assert isinstance(first, Decoder)
    assert decoder_of(model) is first
    changes = [
        lambda: torch.optim.SGD(model.parameters(), lr=0.1).step(),
        lambda: model.model.layers[0].mlp.fc1.weight.data.mul_(1.5),  # no version counts it
        lambda: model.load_state_dict(tiny_model(seed=3).state_dict()),
    ]
    model.lm_head.bias.grad = torch.ones_like(model.lm_head.bias)
    known = {id(first)}
    kept = [first]
    for change in changes:
        change()
        again = decoder_of(model)
        assert id(again) not in known
        known.add(id(again))
        kept.append(again)
        answer = generate.generate(model, [7, 8, 9], 4, eos_token_id=None)
        with torch.no_grad():
            expected = [7, 8, 9]
            for _ in range(4):
                expected.append(int(model(torch.tensor([expected]))[0, -1].argmax()))
        assert answer == expected[3:]


class Squared(nn.Module):
    """An MLP that somebody has changed."""

    def __init__(self, mlp):
        super().__init__()
        self.fc1, self.fc2 = mlp.fc1, mlp.fc2

    def forward(self, x):
        return self.fc2(self.fc1(x).relu() ** 2)


class Renamed(nn.Module):
    def __init__(self, mlp):
        super().__init__()
        self.up, self.down = mlp.fc1, mlp.fc2

    def forward(self, x):
        return self.down(self.up(x).relu())


@pytest.mark.parametrize("changed", [Squared, Renamed])
def test_a_changed_network_decodes_by_itself(changed):
    """Prepared weights would compute the old network, without a word."""
    model = tiny_model()
    for block in model.model.layers:
        block.mlp = changed(block.mlp)
    assert decoder_of(model) is model
    answer = generate.generate(model, [7, 8, 9], 1, eos_token_id=None)
    assert answer == [int(model(torch.tensor([[7, 8, 9]]))[0, -1].argmax())]
    model.decoding_weights = "auto"
    assert decoder_of(model) is model
    if why_not("fp16") is None:
        model.decoding_weights = "fp16"
        with pytest.raises(UserError, match="this one computes something else"):
            generate.generate(model, [7, 8, 9], 1)


def test_precisions_that_cannot_be_are_refused(monkeypatch):
    with pytest.raises(UserError, match="no precision of weights is called 'fp8'"):
        decoder_of(tiny_model(), "fp8")
    with pytest.raises(UserError, match="cannot be used: it is for models in fp32 on a CPU"):
        decoder_of(tiny_model().bfloat16(), "fp16")
    monkeypatch.setattr(decoder, "why_not", lambda precision: "its kernels are missing")
    with pytest.raises(UserError, match="--weights int8 cannot be used: its kernels are missing"):
        decoder_of(tiny_model(), "int8")


def test_rows_that_have_ended_are_computed_no_more(monkeypatch):
    """All rows went on to the longest answer."""
    model = tiny_model(spread=0.3, max_position_embeddings=128)
    prompts = [[7, 50, 200], [9, 8], [33, 44, 55, 66]]
    alone = [generate.generate(model, prompt, 12, eos_token_id=None) for prompt in prompts]
    ends = set(alone[0][2:3] + alone[1][6:7])
    expected = []
    for answer in alone:
        stop = next((i + 1 for i, token in enumerate(answer) if token in ends), 12)
        expected.append(answer[:stop])
    rows = []
    hidden = Decoder.hidden

    def counted(self, ids, cache):
        rows.append(len(ids))
        return hidden(self, ids, cache)

    decoder_of(model)
    monkeypatch.setattr(Decoder, "hidden", counted)
    assert generate.generate(model, prompts, 12, eos_token_id=list(ends)) == expected
    longest = max(map(len, expected))
    going_on = [sum(len(answer) > step for answer in expected) for step in range(1, longest)]
    assert rows == [3, *going_on]


def test_training_prepares_nothing():
    model = tiny_model().train()
    assert decoder_of(model) is model
    assert isinstance(model, Phi)


def test_auto_is_fp16_where_that_can_be(monkeypatch):
    model = tiny_model()
    model.decoding_weights = "auto"
    if why_not("fp16") is None:
        assert decoder_of(model).weights == "fp16"
        with torch.no_grad():
            model.lm_head.weight[3, 3] = 1e6  # more than fp16 holds
        assert decoder_of(model).weights == "fp32"
    monkeypatch.setattr(decoder, "why_not", lambda name: None if name == "fp32" else "no kernels")
    assert decoder_of(tiny_model(), "auto").weights == "fp32"
    assert decoder_of(tiny_model().bfloat16(), "auto").lm_head.weight.dtype == torch.bfloat16


def test_a_copy_of_a_model_holds_nothing_prepared(tmp_path):
    """Packed weights cannot be copied."""
    model = tiny_model()
    model.decoding_weights = "auto"
    first = decoder_of(model)
    assert decoder_of(copy.deepcopy(model)) is not first
    torch.save(model, tmp_path / "model.pt")
    nanophi.save(tmp_path, model)
    again, _ = nanophi.load(tmp_path, weights="auto")
    assert again.decoding_weights == "auto"
    with pytest.raises(UserError, match='weights is "fp8"'):
        nanophi.load(tmp_path, weights="fp8")
