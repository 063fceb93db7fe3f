import torch
from torch.overrides import TorchFunctionMode

from nanophi.train import optim


def with_singular_values(values, rows, columns):
    """A matrix U S V^T whose singular values are known, with U and V."""
    generator = torch.Generator().manual_seed(rows + columns)
    count = len(values)
    u, v = (
        torch.linalg.qr(torch.randn(size, count, generator=generator, dtype=torch.float64)).Q
        for size in (rows, columns)
    )
    return u @ torch.diag(values) @ v.T, u, v


# From 4 down to 0.04: of the norm of the matrix, the smallest is more than 0.0015.
VALUES = torch.logspace(0.6, -1.4, 12, dtype=torch.float64)


def test_the_example_of_the_text(mine):
    x = torch.tensor([[3.0, 0.0], [0.0, 0.004]], dtype=torch.float64)
    found = mine.orthogonalize(x).flatten().tolist()
    for number, expected in zip(found, (0.696, 0, 0, 0.613), strict=True):
        assert abs(number - expected) < 1e-3, (
            f"diag(3, 0.004) becomes diag(0.696, 0.613), not {found}"
        )


def test_singular_values_come_near_one(mine):
    for scale in (1e-3, 1.0, 1e3):
        x, _, _ = with_singular_values(VALUES * scale, 12, 20)
        found = torch.linalg.svdvals(mine.orthogonalize(x))
        seen = f"times {scale:g}: from {found.min():.3f} to {found.max():.3f}"
        assert found.min() > 0.675, f"{seen}, the smallest should be 0.68 or more"
        assert found.max() < 1.205, f"{seen}, the largest should be 1.2 or less"


def test_the_directions_stay(mine):
    x, u, v = with_singular_values(VALUES, 12, 20)
    seen = u.T @ mine.orthogonalize(x) @ v  # diagonal, if U and V have stayed
    away = (seen - torch.diag(seen.diagonal())).abs().max()
    assert away < 1e-9, f"U^T y V is not diagonal, {away:.2g} stands beside the diagonal"
    assert seen.diagonal().min() > 0, "a direction has been turned round"


def test_it_is_what_muon_does(mine):
    for rows, columns in ((8, 8), (5, 12), (12, 5), (1, 6)):
        x, _, _ = with_singular_values(VALUES[: min(rows, columns)], rows, columns)
        for dtype, close in ((torch.float64, 1e-6), (torch.float32, 1e-3)):
            given = x.to(dtype)
            found = mine.orthogonalize(given)
            expected = optim.orthogonalize(given[None])[0]
            assert found.dtype == dtype, f"{dtype} came in, {found.dtype} came out"
            assert found.shape == given.shape, f"{(rows, columns)} became {tuple(found.shape)}"
            apart = (found - expected).abs().max()
            assert apart < close, (
                f"{(rows, columns)}: {apart:.2g} away from Muon's, which divides by the root of "
                "the sum of all squares and takes five steps"
            )


def test_zeros_stay_zeros(mine):
    found = mine.orthogonalize(torch.zeros(3, 4))
    assert found.isfinite().all(), "a parameter whose gradient is 0 gets nan: 0 / 0"
    assert not found.any(), "zeros have no direction, so they stay zeros"


def test_the_argument_stays_as_it_is(mine):
    given = torch.ones(2, 3)
    mine.orthogonalize(given)
    assert torch.equal(given, torch.ones(2, 3)), "orthogonalize has changed the gradient itself"


class Largest(TorchFunctionMode):
    """Notes how many numbers the largest tensor has that is made."""

    numbers = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.numbers = max(self.numbers, out.numel())
        return out


def test_a_tall_matrix_costs_no_more_than_a_wide_one(mine):
    x, _, _ = with_singular_values(VALUES[:4], 200, 4)
    with Largest() as largest:
        mine.orthogonalize(x)
    assert largest.numbers <= x.numel(), (
        f"for a matrix (200, 4) a tensor of {largest.numbers:,} numbers was made: x x^T should be "
        "(4, 4), so take the transpose"
    )
