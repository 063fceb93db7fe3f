import math

import torch

import nanophi

NAMES = ("policy_chosen", "policy_rejected", "ref_chosen", "ref_rejected")


def pairs(count=32):
    """Four tensors of log-probabilities: margins between about -60 and 60."""
    generator = torch.Generator().manual_seed(0)
    return tuple(
        -50 + 15 * torch.randn(count, generator=generator, dtype=torch.float64) for _ in NAMES
    )


def numbers(*values):
    return tuple(torch.tensor([value], dtype=torch.float64) for value in values)


def test_the_loss_of_a_model_that_has_learned_nothing_is_ln_2(mine):
    policy, other, *_ = pairs()
    for beta in (0.05, 0.5):
        found = mine.dpo_loss(policy, other, policy, other, beta)
        assert found.shape == policy.shape, f"{len(policy)} pairs, losses {tuple(found.shape)}"
        away = (found - math.log(2)).abs().max()
        assert away < 1e-9, f"policy and reference agree: the loss is ln 2, yours {found[0]:.4f}"


def test_the_example_of_the_text(mine):
    logps = numbers(-8.0, -13.0, -10.0, -10.0)
    loss = mine.dpo_loss(*logps)
    assert abs(loss.item() - 0.4741) < 1e-4, f"margin 5: 0.4741, your loss is {loss.item():.4f}"
    with torch.inference_mode():
        found = mine.dpo_gradients(*logps)
    for name, one, expected in zip(NAMES, found, (-1, 1, 1, -1), strict=True):
        expected = expected * 0.03775
        assert abs(one.item() - expected) < 1e-5, f"by {name}: {expected}, yours {one.item():.5f}"


def test_the_loss_is_that_of_the_library(mine):
    for beta in (0.05, 0.1, 1.0):
        found = mine.dpo_loss(*pairs(), beta)
        expected = nanophi.dpo_loss(*pairs(), beta)
        apart = (found - expected).abs().max()
        assert apart < 1e-9, f"beta {beta}: {apart:.2g} away from nanophi.dpo_loss"


def test_the_gradient_is_that_of_autograd(mine):
    for beta in (0.05, 0.1, 1.0):
        logps = tuple(values.requires_grad_() for values in pairs())
        expected = torch.autograd.grad(nanophi.dpo_loss(*logps, beta).sum(), logps)
        with torch.inference_mode():
            found = mine.dpo_gradients(*(values.detach() for values in logps), beta)
        for name, one, correct in zip(NAMES, found, expected, strict=True):
            assert one.shape == correct.shape, f"by {name}: {tuple(one.shape)}, one for each pair"
            apart = (one - correct).abs().max()
            assert apart < 1e-9, f"beta {beta}, by {name}: {apart:.2g} away from autograd"


def test_your_own_loss_has_your_gradient(mine):
    """Autograd goes through what you wrote, as training does."""
    logps = tuple(values.requires_grad_() for values in pairs())
    by_autograd = torch.autograd.grad(mine.dpo_loss(*logps).sum(), logps, allow_unused=True)
    with torch.inference_mode():
        found = mine.dpo_gradients(*(values.detach() for values in logps))
    for name, one, other in zip(NAMES, found, by_autograd, strict=True):
        assert other is not None, f"your loss gives {name} no gradient"
        apart = (one - other).abs().max()
        assert apart < 1e-9, f"by {name}: your loss and your gradient differ by {apart:.2g}"


def test_far_margins_overflow_nowhere(mine):
    """In fp32 exp(89) is inf, and sigmoid(-104) is 0, whose logarithm is -inf."""
    for margin, loss, weight in ((5000.0, 0.0, 0.0), (-5000.0, 500.0, 0.1)):
        logps = [torch.tensor([value]) for value in (margin, 0.0, 0.0, 0.0)]
        found = mine.dpo_loss(*logps).item()
        assert abs(found - loss) < 1e-3, f"margin {margin:.0f}: the loss is {loss}, not {found}"
        by_chosen = mine.dpo_gradients(*logps)[0].item()
        assert abs(by_chosen + weight) < 1e-6, (
            f"margin {margin:.0f}: by policy_chosen {-weight}, not {by_chosen:.4f}"
        )
