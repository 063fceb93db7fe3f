import torch

from nanophi.model import phi

ROTARY, WIDTH, THETA = 8, 12, 10000.0  # 8 of 12 dimensions are rotated


def test_the_angles_are_those_of_the_paper(mine):
    positions = torch.tensor([[0, 1, 5, 30], [7, 8, 9, 2]])
    tables = mine.rotary_tables(positions, ROTARY, THETA)
    expected = phi.rotary_tables(positions, ROTARY, THETA)
    for name, found, wanted in zip(("cos", "sin"), tables, expected, strict=True):
        shape = tuple(found.shape)
        assert shape == (2, 4, 1, 4), f"{name} has the shape {shape}, expected (2, 4, 1, 4)"
        for i in range(ROTARY // 2):
            angle = f"{name} of position * theta^({-2 * i}/{ROTARY}), i = {i}, at position 5"
            now, then = found[0, 2, 0, i].item(), wanted[0, 2, 0, i].item()
            assert abs(now - then) < 1e-5, f"{angle}: expected {then:.4f}, {now:.4f} came"
        assert (found - wanted).abs().max() < 1e-5, f"{name} differs at other positions than 5"


def test_the_points_are_the_dimensions_i_and_i_plus_half(mine):
    quarter_turn = torch.tensor(torch.pi / 2).expand(1, 1, 1, 2)  # R = 4
    for dimension, expected in ((0, 2), (1, 3)):
        x = torch.zeros(1, 1, 1, 5)
        x[..., dimension] = 1.0
        found = mine.rotate(x, quarter_turn.cos(), quarter_turn.sin()).flatten()
        place = int(found.abs().argmax())
        assert place == expected, (
            f"R = 4: a quarter turn takes dimension {dimension} to {expected}, yours to {place}"
        )
        value = found[place].item()
        assert value > 0.99, f"a quarter turn takes (1, 0) to (0, 1), yours to (0, {value:.0f})"


def test_the_rest_passes_through_and_the_type_stays(mine):
    tables = phi.rotary_tables(torch.arange(6)[None], ROTARY, THETA)
    for dtype in (torch.float64, torch.bfloat16):
        found = mine.rotate(random_heads().to(dtype), *tables).dtype
        assert found == dtype, f"x is {dtype}, the result is {found}; expected the same"
    x = random_heads()
    found = mine.rotate(x, *tables)
    assert found.shape == x.shape, f"{tuple(x.shape)} came in, {tuple(found.shape)} came out"
    assert torch.equal(found[..., ROTARY:], x[..., ROTARY:]), (
        f"the dimensions from {ROTARY} on must stay as they are"
    )
    assert torch.allclose(found[:, 0], x[:, 0]), "at position 0 nothing turns"


def test_q_k_depends_on_the_distance_alone(mine):
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, WIDTH, dtype=torch.float64)

    def product(query_at, key_at):
        at = [
            mine.rotate(x, *mine.rotary_tables(torch.tensor([[place]]), ROTARY, THETA))
            for x, place in ((q, query_at), (k, key_at))
        ]
        return (at[0] * at[1]).sum().item()

    for distance in (0, 1, 7):
        near, far = product(distance, 0), product(distance + 40, 40)
        assert abs(near - far) < 1e-4, (
            f"distance {distance}: q·k is {near:.4f} at the positions ({distance}, 0), and "
            f"{far:.4f} at ({distance + 40}, 40); expected the same"
        )
    first, second = product(1, 0), product(7, 0)
    assert abs(first - second) > 1e-3, f"q·k is {first:.4f} at the distances 1 and 7: nothing turns"


def test_it_is_what_the_library_computes(mine):
    x = random_heads()
    tables = phi.rotary_tables(torch.arange(6)[None], ROTARY, THETA)
    difference = (mine.rotate(x, *tables) - phi.rotate(x, *tables)).abs().max().item()
    assert difference < 1e-12, f"it is up to {difference:.1e} away from nanophi's"


def random_heads():
    """x (2, 6, 3, 12) in fp64."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 6, 3, WIDTH, dtype=torch.float64, generator=generator)
