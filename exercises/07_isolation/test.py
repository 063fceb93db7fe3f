from unittest import mock

import torch
import torch.nn.functional as F

import nanophi
from nanophi.model.attention import same_document

# Two rows of 6 tokens with documents of 2, 4, 3, 2 and 1 tokens.
BOUNDARIES = torch.tensor([0, 2, 6, 9, 11, 12], dtype=torch.int32)
ROWS, TIME = 2, 6


def test_who_sees_whom(mine):
    found = mine.same_document(BOUNDARIES, ROWS, TIME)
    expected = same_document(BOUNDARIES, ROWS, TIME)
    shape = tuple(found.shape)
    assert found.dtype == torch.bool, f"the mask is of the type {found.dtype}, expected torch.bool"
    assert shape == (ROWS, 1, TIME, TIME), f"the mask is {shape}, expected (2, 1, 6, 6)"
    for row, _, query, key in (found != expected).nonzero().tolist():
        may = "may" if expected[row, 0, query, key] else "must not"
        raise AssertionError(f"boundaries [0, 2, 6, ...], row {row}: token {query} {may} see {key}")


def test_attention_is_that_of_torch(mine):
    q, k, v = random_heads()
    visible = same_document(BOUNDARIES, ROWS, TIME)
    found = mine.attention(q, k, v, visible)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
    assert found.shape == expected.shape, f"{tuple(found.shape)} came, not {tuple(expected.shape)}"
    difference = (found - expected).abs().max().item()
    assert difference < 1e-12, f"the result is up to {difference:.1e} away from torch's in fp64"


def test_another_document_changes_not_a_bit(mine):
    """The first document of row 0 is made huge: one would see the smallest leak."""
    q, k, v = random_heads()
    visible = same_document(BOUNDARIES, ROWS, TIME)
    before = mine.attention(q, k, v, visible)
    for x in (q, k, v):
        x[0, :, :2] *= 1e4
    after = mine.attention(q, k, v, visible)
    changes = (after - before).abs().amax((1, 3))  # (B, T)
    for row, token, name in ((0, slice(2, 6), "the other document of the row"), (1, ..., "row 1")):
        change = changes[row, token].max().item()
        assert change == 0, f"{name} has changed by up to {change:.1e}, expected by 0"
    assert (changes[0, :2] > 0).all(), "the document that was changed has the same result as before"


def test_a_token_that_sees_only_itself_gets_its_own_value(mine):
    """The visible scores are far below any number that could be filled in for the hidden ones."""
    q, _, v = random_heads()
    visible = same_document(BOUNDARIES, ROWS, TIME)
    found = mine.attention(q, -1e12 * q, v, visible)
    for start in BOUNDARIES[:-1].tolist():
        row, token = divmod(start, TIME)
        difference = (found[row, :, token] - v[row, :, token]).abs().max().item()
        assert difference < 1e-12, (
            f"row {row}: token {token} begins a document and sees only itself, but its result is "
            f"up to {difference:.1e} away from its own v. Its score is below -1e9: only -inf hides "
            "the other keys from it"
        )


def test_in_a_model_the_logits_of_a_document_are_those_it_has_alone(mine):
    torch.manual_seed(0)
    cfg = nanophi.PhiConfig(
        vocab_size=64,
        hidden_size=16,
        num_attention_heads=2,
        num_hidden_layers=2,
        intermediate_size=32,
        initializer_range=0.3,
    )
    model = nanophi.Phi(cfg, attention="manual").double().eval()
    ids = torch.randint(64, (ROWS, TIME))
    changed = ids.clone()
    changed[0, :2] = (changed[0, :2] + 1) % 64
    with (
        torch.no_grad(),
        mock.patch("nanophi.model.attention.same_document", mine.same_document),
        mock.patch("nanophi.model.attention.manual", lambda *args: mine.attention(*args[:4])),
    ):
        before = model(ids, BOUNDARIES)
        after = model(changed, BOUNDARIES)
        alone = model(ids[:1, 2:], torch.tensor([0, 4], dtype=torch.int32))
    difference = (before[0, 2:] - after[0, 2:]).abs().max().item()
    assert difference == 0, f"another document changes the logits by up to {difference:.1e}"
    difference = (before[0, 2:] - alone[0]).abs().max().item()
    assert difference < 1e-12, f"alone the document has other logits, up to {difference:.1e} away"


def random_heads():
    """q, k, v (2, 3, 6, 4) in fp64."""
    generator = torch.Generator().manual_seed(0)
    shape = (ROWS, 3, TIME, 4)
    return [torch.randn(shape, dtype=torch.float64, generator=generator) for _ in range(3)]
