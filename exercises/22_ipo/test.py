import torch

import nanophi
from nanophi.train.losses import (
    PREFERENCE_LOSSES,
    PreferenceLoss,
    PreferenceOptions,
    ipo_loss,
    make_dpo_loss_fn,
)

BETAS = (0.05, 0.1, 1.0)


def gains(count=32):
    generator = torch.Generator().manual_seed(0)
    return tuple(
        10 * torch.randn(count, generator=generator, dtype=torch.float64) for _ in range(2)
    )


def descend(mine, margin, beta, rate=0.05, steps=300, right=4, wrong=0):
    """The margin of one pair after some steps down your gradient.

    right of the judges prefer the chosen answer, and `wrong` of them the other one.
    """
    chosen = torch.tensor([margin / 2], dtype=torch.float64)
    rejected = -chosen
    judges = right + wrong
    with torch.inference_mode():
        for _ in range(steps):
            by_chosen, by_rejected = mine.ipo_gradients(chosen, rejected, beta)
            # Whoever prefers the other answer sees the pair the other way round.
            other_rejected, other_chosen = mine.ipo_gradients(rejected, chosen, beta)
            chosen = chosen - rate * (right * by_chosen + wrong * other_chosen) / judges
            rejected = rejected - rate * (right * by_rejected + wrong * other_rejected) / judges
    return (chosen - rejected).item()


def test_the_example_of_the_text(mine):
    for margin, loss, by_chosen in ((0.0, 25.0, -10.0), (5.0, 0.0, 0.0), (8.0, 9.0, 6.0)):
        chosen = torch.tensor([margin - 1.0])
        rejected = torch.tensor([-1.0])
        found = mine.ipo_loss(chosen, rejected, 0.1)
        assert found.shape == (1,), f"one pair has one loss, yours is {tuple(found.shape)}"
        assert abs(found.item() - loss) < 1e-4, f"margin {margin}: loss {loss}, not {found.item()}"
        with torch.inference_mode():
            slopes = [slope.item() for slope in mine.ipo_gradients(chosen, rejected, 0.1)]
        for name, slope, expected in zip(
            ("chosen", "rejected"), slopes, (by_chosen, -by_chosen), strict=True
        ):
            assert abs(slope - expected) < 1e-4, (
                f"margin {margin}: the derivative by {name} is {expected}, not {slope}"
            )


def test_the_loss_is_that_of_the_library(mine):
    for beta in BETAS:
        found = mine.ipo_loss(*gains(), beta)
        expected = ipo_loss(*gains(), PreferenceOptions(beta))
        assert found.shape == expected.shape, f"32 pairs, losses {tuple(found.shape)}"
        apart = (found - expected).abs().max()
        assert apart < 1e-9, f"beta {beta}: {apart:.2g} away from the library's"


def test_the_gradient_is_that_of_autograd(mine):
    for beta in BETAS:
        sides = tuple(side.requires_grad_() for side in gains())
        expected = torch.autograd.grad(ipo_loss(*sides, PreferenceOptions(beta)).sum(), sides)
        with torch.inference_mode():
            found = mine.ipo_gradients(*gains(), beta)
        for name, one, correct in zip(("chosen", "rejected"), found, expected, strict=True):
            assert one.shape == correct.shape, f"by {name}: {tuple(one.shape)}, one for each pair"
            apart = (one - correct).abs().max()
            assert apart < 1e-9, f"beta {beta}, by {name}: {apart:.2g} away from autograd"


def test_your_own_loss_has_your_gradient(mine):
    """Autograd goes through what you wrote, as training does."""
    sides = tuple(side.requires_grad_() for side in gains())
    by_autograd = torch.autograd.grad(mine.ipo_loss(*sides).sum(), sides, allow_unused=True)
    with torch.inference_mode():
        found = mine.ipo_gradients(*gains())
    for name, one, other in zip(("chosen", "rejected"), found, by_autograd, strict=True):
        assert other is not None, f"your loss gives {name} no gradient"
        apart = (one - other).abs().max()
        assert apart < 1e-9, f"by {name}: your loss and your gradient differ by {apart:.2g}"


def test_the_margin_goes_to_one_over_two_beta(mine):
    for beta in BETAS:
        for start in (0.0, 40.0):  # from below and from above
            found = descend(mine, start, beta)
            expected = 1 / (2 * beta)
            assert abs(found - expected) < 1e-3, (
                f"beta {beta}, from a margin of {start}: it should become {expected}, "
                f"and became {found:.3f}"
            )


def test_judges_who_disagree_make_the_margin_smaller(mine):
    found = descend(mine, 0.0, 0.1, right=3, wrong=1)
    assert abs(found - 2.5) < 1e-3, f"three of four judges: half of 5, yours is {found:.3f}"


def test_your_loss_is_a_row_of_the_table(mine):
    """What dpo.py --loss mine would do, in small: a model learns one pair."""
    row = PreferenceLoss(lambda c, r, how: mine.ipo_loss(c, r, how.beta), per_token=True)
    PREFERENCE_LOSSES["mine"] = row
    try:
        loss_fn = make_dpo_loss_fn(beta=1.0, loss="mine")
    finally:
        del PREFERENCE_LOSSES["mine"]
    model, batch = tiny_model_and_pair()
    loss, _, _ = loss_fn(model, batch)
    expected, _, _ = make_dpo_loss_fn(beta=1.0, loss="ipo")(model, batch)
    apart = (loss - expected).abs().item()
    assert apart < 1e-6, f"a batch costs {expected.item():.4f} by the library, {apart:.2g} apart"

    optimizer = torch.optim.Adam(model.parameters(), lr=0.003)
    for _ in range(80):
        loss, _, measured = loss_fn(model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    margin = measured["margin"].item()
    assert abs(margin - 0.5) < 0.02, f"the model's margin should become 0.5, it is {margin:.3f}"


def tiny_model_and_pair():
    torch.manual_seed(0)
    model = nanophi.Phi(
        nanophi.PhiConfig(
            vocab_size=64,
            hidden_size=16,
            num_attention_heads=2,
            num_hidden_layers=1,
            intermediate_size=32,
            max_position_embeddings=16,
        )
    ).double()
    learned = [False, False, True, True, True]
    pair = nanophi.Preference(([5, 6, 7, 8, 1], learned), ([5, 6, 9, 1], learned[1:]))
    data = nanophi.Pairs([pair], batch_pairs=1, seed=0)
    with torch.no_grad():
        data.reference = nanophi.answer_logps(model, data.batch_at(0)).view(1, 2)
    return model, data.batch_at(0)
