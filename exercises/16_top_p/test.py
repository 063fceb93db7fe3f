import torch

from nanophi.infer import sampling

NEVER = float("-inf")


def kept(logits):
    """The ids that are left in each row."""
    return [(row > NEVER).nonzero()[:, 0].tolist() for row in logits]


def clear_rows(p, rows=40, vocabulary=50):
    """Random logits, of which no sum of probabilities is so close to p that rounding decides."""
    generator = torch.Generator().manual_seed(round(1000 * p))
    logits = 3 * torch.randn(rows, vocabulary, generator=generator)
    sums = logits.double().softmax(-1).sort(descending=True).values.cumsum(-1)
    return logits[((sums - p).abs() > 1e-4).all(-1)]


def test_the_example_of_the_text(mine):
    logits = torch.tensor([[0.15, 0.50, 0.05, 0.30]]).log()
    for p, expected in ((0.4, [1]), (0.6, [1, 3]), (0.7, [1, 3]), (0.9, [0, 1, 3])):
        found = mine.keep_top_p(logits.clone(), p)
        assert found.shape == (1, 4), f"logits (1, 4) became {tuple(found.shape)}"
        assert kept(found) == [expected], f"p {p}: ids {expected} stay, yours are {kept(found)[0]}"


def test_what_stays_stays_as_it_is(mine):
    logits = torch.tensor([[1.0, 5.0, 0.0, 4.0]])
    found = mine.keep_top_p(logits, 0.9)
    expected = torch.tensor([[NEVER, 5.0, NEVER, 4.0]])
    assert torch.equal(found, expected), f"expected {expected.tolist()}, {found.tolist()} came"
    assert logits[0].tolist() == [1, 5, 0, 4], "keep_top_p has changed the logits it was given"


def test_the_likeliest_id_stays_however_small_p_is(mine):
    logits = torch.tensor([[0.0, 2.0, 1.0], [0.0, 0.0, 9.0]])
    found = kept(mine.keep_top_p(logits, 1e-6))
    assert found == [[1], [2]], f"expected [[1], [2]], yours are {found}"


def test_all_stay_with_p_1(mine):
    logits = torch.linspace(-2, 2, 9)[None]
    found = kept(mine.keep_top_p(logits, 1.0))[0]
    assert len(found) == 9, f"nothing is left out with p = 1, yours keeps {len(found)} of 9"


def test_of_equal_ids_no_more_stay_than_are_needed(mine):
    for p, count in ((0.3, 3), (0.5, 4), (0.9, 8)):
        found = kept(mine.keep_top_p(torch.zeros(1, 8), p))[0]
        assert len(found) == count, f"8 equal ids, p {p}: {count} stay, yours keeps {len(found)}"
    logits = torch.tensor([[0.2, 0.4, 0.2, 0.2]]).log()
    found = kept(mine.keep_top_p(logits, 0.5))[0]
    assert len(found) == 2, f"0.4 and one 0.2 reach 0.5: two ids, yours keeps {found}"
    assert 1 in found, f"the likeliest id is 1, yours keeps {found}"


def test_each_row_has_a_set_of_its_own(mine):
    rows = torch.tensor([[0.9, 0.05, 0.05], [0.1, 0.4, 0.5]]).log()
    found = kept(mine.keep_top_p(rows, 0.8))
    assert found == [[0], [1, 2]], f"expected [[0], [1, 2]], yours are {found}"


def test_forbidden_ids_stay_forbidden(mine):
    """Filters before this one, such as top-k, have already set some logits to -inf."""
    logits = torch.tensor([[NEVER, 1.0, NEVER, 1.5, NEVER]])
    for p, expected in ((0.3, [3]), (0.99, [1, 3])):
        found = mine.keep_top_p(logits.clone(), p)
        assert not found.isnan().any(), f"p {p}: nan in {found.tolist()}"
        assert kept(found) == [expected], f"p {p}: ids {expected} stay, yours are {kept(found)[0]}"


def test_it_is_top_p_of_nanophi_and_of_transformers(mine):
    for p in (0.1, 0.5, 0.8, 0.95):
        logits = clear_rows(p)
        agrees(mine, logits, p, sampling.keep_top_p(logits, [], p), "nanophi")
    try:
        from transformers.generation.logits_process import TopPLogitsWarper
    except ModuleNotFoundError:
        return
    for p in (0.1, 0.5, 0.8, 0.95):
        logits = clear_rows(p)
        agrees(mine, logits, p, TopPLogitsWarper(p)(None, logits), "transformers")


def agrees(mine, logits, p, expected, library):
    found = mine.keep_top_p(logits.clone(), p)
    for row, (ours, theirs) in enumerate(zip(kept(found), kept(expected), strict=True)):
        assert ours == theirs, f"p {p}, row {row}: {library} keeps {theirs}, yours keeps {ours}"
    assert torch.equal(found, expected), f"p {p}: the same ids as {library}, but other logits"
