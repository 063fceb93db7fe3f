import torch
from torch import nn

import nanophi

IGNORE = -100


class Sums(list):
    """A batch of made-up losses: each sample is (sum, count)."""

    def cut(self, start, stop):
        return Sums(self[start:stop])

    def to(self, device):
        return self


def test_two_micro_batches_by_hand(mine):
    model = nn.Linear(1, 1, bias=False).double()  # the loss is its weight times a number

    def loss_fn(model, part):
        return model.weight.sum() * sum(s for s, _ in part), sum(n for _, n in part), {}

    mine.accumulate(model, loss_fn, Sums([(2.0, 4), (3.0, 1)]), micro_batch=1)
    found = model.weight.grad.item()
    known = {1.75: ", the mean of the means", 2.5: ", the sum by the number of micro-batches"}
    assert abs(found - 1) < 1e-12, (
        f"sums 2 and 3 of 4 and 1 tokens: the gradient is (2 + 3) / 5 = 1; yours is {found:g}"
        f"{known.get(found, '')}"
    )


def test_uneven_micro_batches_give_what_one_batch_gives(mine):
    model, batch = tiny_model(), uneven_batch()
    expected_loss, expected = at_once(model, batch)
    for micro_batch in (5, 2, 1, 3, 8):
        for p in model.parameters():
            p.grad = None
        loss = mine.accumulate(model, nanophi.next_token_loss, batch, micro_batch)
        name = f"{len(batch)} samples, {micro_batch} at once"
        assert loss is not None, "accumulate returned None, expected the mean loss"
        assert abs(loss - expected_loss) < 1e-9, (
            f"{name}: the mean loss is {expected_loss:.6f}, {loss:.6f} came"
        )
        agrees(name, model, expected)


def test_gradients_of_an_earlier_step_do_not_count(mine):
    model, batch = tiny_model(), uneven_batch()
    _, expected = at_once(model, batch)  # and p.grad is what it has left
    mine.accumulate(model, nanophi.next_token_loss, batch, micro_batch=2)
    agrees("with gradients of an earlier step", model, expected)


def test_backward_comes_before_the_next_forward(mine):
    waiting = []

    def loss_fn(model, part):
        assert not waiting, (
            "the forward pass of a micro-batch begins before backward of the one before: all their "
            "activations are in memory together"
        )
        assert len(part) <= 2, f"{len(part)} samples at once, expected at most 2"
        loss, count, metrics = nanophi.next_token_loss(model, part)
        waiting.append(loss.item())
        loss.register_hook(lambda _: waiting.clear())
        return loss, count, metrics

    mine.accumulate(tiny_model(), loss_fn, uneven_batch(), micro_batch=2)
    assert not waiting, "backward of the last micro-batch has not run"


def at_once(model, batch):
    """(mean loss, gradients) of the whole batch."""
    loss, count, _ = nanophi.next_token_loss(model, batch)
    (loss / count).backward()
    return (loss / count).item(), [p.grad.clone() for p in model.parameters()]


def agrees(name, model, expected):
    for (parameter, p), wanted in zip(model.named_parameters(), expected, strict=True):
        assert p.grad is not None, f"{name}: {parameter} has no gradient"
        largest = wanted.abs().max()
        if largest < 1e-12:  # k_proj.bias shifts all scores alike, and has none but by rounding
            continue
        at = (p.grad - wanted).abs().max()
        factor = (p.grad.norm() / wanted.norm()).item()
        assert at < 1e-9 * largest, (
            f"{name}: the gradient of {parameter} is another one than that of the whole batch; its "
            f"length is {factor:.3f} times as large"
        )


def tiny_model():
    torch.manual_seed(0)
    cfg = nanophi.PhiConfig(
        vocab_size=64,
        hidden_size=16,
        num_attention_heads=2,
        num_hidden_layers=1,
        intermediate_size=32,
    )
    return nanophi.Phi(cfg).double()


def uneven_batch():
    """5 rows of 8 tokens, of which 8, 1, 0, 5 and 2 are learned."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 64, (5, 8), generator=generator)
    targets = torch.randint(1, 64, (5, 8), generator=generator)
    for row, count in enumerate([8, 1, 0, 5, 2]):
        targets[row, count:] = IGNORE
    return nanophi.Batch(ids, targets, torch.arange(0, 41, 8, dtype=torch.int32))
