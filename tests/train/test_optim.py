"""Optimizers against their oracles, and schedules that are never zero."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanophi.train import optim
from nanophi.train.optim import Adafactor, Muon, build_optimizers, orthogonalize, schedule
from tests.conftest import tiny_model


def test_orthogonalized_singular_values_are_about_one():
    torch.manual_seed(0)
    for shape in ((3, 16, 16), (2, 48, 16), (2, 16, 48)):
        values = torch.linalg.svdvals(orthogonalize(torch.randn(shape)))
        assert values.min() > 0.4
        assert values.max() < 1.3


@pytest.mark.parametrize("shape", [(24, 24), (64, 16), (16, 64)])
def test_muon_moves_as_torchs_does(shape):
    """torch.optim.Muon iterates in bf16, so updates agree to a few per cent of their norm."""
    torch.manual_seed(0)
    ours, theirs = (torch.nn.Parameter(torch.zeros(shape)) for _ in range(2))
    mine = Muon([ours], lr=0.1, momentum=0.95, weight_decay=0.0)
    oracle = torch.optim.Muon(
        [theirs], lr=0.1, momentum=0.95, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"
    )
    for _ in range(4):
        before = ours.detach().clone(), theirs.detach().clone()
        ours.grad = torch.randn(shape)
        theirs.grad = ours.grad.clone()
        mine.step()
        oracle.step()
        update, expected = ours.detach() - before[0], theirs.detach() - before[1]
        assert (update - expected).norm() / expected.norm() < 5e-2


def test_muon_decays_weights_as_torchs_does():
    ours, theirs = (torch.nn.Parameter(torch.ones(4, 8)) for _ in range(2))
    ours.grad, theirs.grad = torch.zeros(4, 8), torch.zeros(4, 8)
    Muon([ours], lr=0.1, weight_decay=0.5).step()
    torch.optim.Muon([theirs], lr=0.1, weight_decay=0.5).step()
    torch.testing.assert_close(ours, theirs)


def test_the_momentum_of_muon_rises():
    rising, oracle = (torch.nn.Parameter(torch.ones(4, 8)) for _ in range(2))
    mine, fixed = Muon([rising], lr=0.1, rising=2), Muon([oracle], lr=0.1)
    for momentum in (0.85, 0.90, 0.95, 0.95):
        rising.grad = oracle.grad = torch.randn(4, 8)
        fixed.param_groups[0]["momentum"] = momentum
        mine.step()
        fixed.step()
        torch.testing.assert_close(rising, oracle)


def test_a_state_saved_before_momentum_rose_goes_on_as_it_was():
    p = torch.nn.Parameter(torch.ones(4, 8))
    state = Muon([p], lr=0.1).state_dict()
    del state["param_groups"][0]["rising"], state["param_groups"][0]["steps"]
    resumed = Muon([p], lr=0.1, rising=300)
    resumed.load_state_dict(state)
    p.grad = torch.ones(4, 8)
    resumed.step()
    assert resumed.param_groups[0]["rising"] == 0


def test_muon_iterates_a_few_matrices_at_once(monkeypatch):
    """All of one shape at once took tens of bytes for each of their numbers: more than 13 GB for
    Phi-2.
    """
    found, together = [], []

    def counted(matrices, iterate=optim.orthogonalize):
        together[-1].append(len(matrices))
        return iterate(matrices)

    monkeypatch.setattr(optim, "orthogonalize", counted)
    for numbers in (optim.NS_NUMBERS, 2 * 4 * 8, 1):
        monkeypatch.setattr(optim, "NS_NUMBERS", numbers)
        together.append([])
        params = [torch.nn.Parameter(torch.ones(4, 8)) for _ in range(5)]
        for i, p in enumerate(params):
            p.grad = torch.randn(4, 8, generator=torch.Generator().manual_seed(i))
        Muon(params, lr=0.1).step()
        found.append(torch.stack([p.detach() for p in params]))
    assert together == [[5], [2, 2, 1], [1] * 5]
    assert (found[0][0] - found[0][1]).abs().max() > 1e-3
    for other in found[1:]:
        torch.testing.assert_close(other, found[0])


def test_adafactor_is_that_of_transformers():
    """torch.optim.Adafactor scales the rate by the parameter's size: it moves 50 times less."""
    from transformers.optimization import Adafactor as HFAdafactor

    torch.manual_seed(0)
    start = [torch.randn(12, 7), torch.randn(9), torch.randn(3, 4, 5)]
    ours, theirs = ([torch.nn.Parameter(x.clone()) for x in start] for _ in range(2))
    mine = Adafactor(ours, lr=0.01, weight_decay=0.1)
    oracle = HFAdafactor(
        theirs, lr=0.01, weight_decay=0.1, scale_parameter=False, relative_step=False
    )
    for _ in range(5):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a) * 3
            b.grad = a.grad.clone()
        mine.step()
        oracle.step()
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "count"), [("muon", 2), ("adamw", 1), ("adafactor", 1)])
def test_every_parameter_has_exactly_one_optimizer(name, count):
    model = tiny_model()
    optimizers = build_optimizers(model, name, lr=1e-3, weight_decay=0.1)
    assert len(optimizers) == count
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    held = [id(p) for group in groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters())
    for group in groups:
        if group["weight_decay"] == 0:
            assert all(p.dim() == 1 for p in group["params"])
    assert {group["lr"] for group in groups} == ({1e-3, 5e-4} if name == "muon" else {1e-3})
    if name == "muon":
        assert (
            len(groups[0]["params"]) == 2 * 6
        )  # q, k, v, dense, fc1, fc2 of both blocks; not embedding and head


@given(
    name=st.sampled_from(["wsd", "cosine", "constant"]),
    steps=st.integers(1, 300),
    warmup=st.integers(0, 40),
    decay=st.floats(0, 1),
)
def test_learning_rate_is_never_zero_and_never_above_its_peak(name, steps, warmup, decay):
    """nanoGPT trained its first step at a rate of zero for years, as nothing tested it."""
    factors = [schedule(name, step, steps, warmup, decay) for step in range(steps)]
    assert all(0 < factor <= 1 for factor in factors)


def test_schedule_shapes():
    wsd = [schedule("wsd", step, 100, 10, 0.3) for step in range(100)]
    assert wsd[0] == 0.1
    assert wsd[9:70] == [1.0] * 61
    assert wsd[85] == pytest.approx(0.5)
    assert wsd[99] == pytest.approx(1 / 30)
    cosine = [schedule("cosine", step, 110, 10) for step in range(110)]
    assert cosine[60] == pytest.approx(0.5)
    assert schedule("constant", 99, 100, 10) == 1.0
