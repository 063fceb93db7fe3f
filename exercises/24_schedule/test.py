import itertools
import math

import torch

import nanophi
from nanophi.cli import parser_for
from nanophi.train.config import TrainConfig
from nanophi.train.optim import SCHEDULES, peak_rates, set_rates

NAME = "wsd-sqrt"


def rates(steps, warmup, decay, name=NAME):
    assert name in SCHEDULES, f"SCHEDULES has no row {name!r}; there are {', '.join(SCHEDULES)}"
    return [nanophi.schedule(name, step, steps, warmup, decay) for step in range(steps)]


def test_the_example_of_the_text():
    found = [round(rate, 3) for rate in rates(steps=10, warmup=2, decay=0.4)]
    expected = [0.5, 1, 1, 1, 1, 1, 1, 0.5, 0.293, 0.134]
    assert found == expected, f"10 steps, the last 4 decay: {expected}, yours {found}"


def test_until_the_decay_it_is_wsd():
    for steps, warmup, decay in ((100, 10, 0.3), (58, 5, 0.2), (40, 0, 0.5)):
        ours = rates(steps, warmup, decay)
        plain = rates(steps, warmup, decay, "wsd")
        first = steps - round(steps * decay)
        for step in range(first + 1):
            assert ours[step] == plain[step], (
                f"step {step} of {steps}: {ours[step]:.3f}, wsd has {plain[step]}"
            )
        for step in range(first + 1, steps):
            assert ours[step] < plain[step], (
                f"step {step} of {steps}: 1 - sqrt is below the line, {ours[step]:.3f} is not"
            )


def test_it_is_one_minus_the_root_of_what_has_passed():
    steps, count = 200, 60
    found = rates(steps, 10, count / steps)
    for step in range(steps - count, steps):
        passed = (step - (steps - count)) / count
        expected = 1 - math.sqrt(passed)
        assert abs(found[step] - expected) < 1e-9, (
            f"step {step}: {expected:.4f}, yours {found[step]:.4f}"
        )


def test_it_is_never_zero_and_never_rises_after_the_warmup():
    for steps, warmup, decay in itertools.product(
        (1, 2, 3, 10, 1000), (0, 2), (0.0, 0.01, 0.3, 1.0)
    ):
        found = rates(steps, warmup, decay)
        name = f"steps {steps}, warmup {warmup}, decay {decay}"
        assert min(found) > 0, f"{name}: a rate of {min(found)}, in which nothing is learned"
        assert max(found) <= 1, f"{name}: a rate of {max(found)}, above the peak"
        after = found[warmup:]
        falls = all(late <= early for early, late in itertools.pairwise(after))
        assert falls, f"{name}: it rises after the warm-up, {after[:12]}"


def test_it_is_a_function_of_the_step():
    """A resumed run asks for step 70 first."""
    forward = rates(100, 10, 0.3)
    for step in (70, 99, 0, 85, 70):
        found = nanophi.schedule(NAME, step, 100, 10, 0.3)
        assert found == forward[step], f"asked for step {step} alone: {found}, not {forward[step]}"


def test_the_flag_knows_it():
    rates(10, 2, 0.3)
    cfg = parser_for(TrainConfig, "").parse_args(["--out", "out", "--schedule", NAME])
    assert cfg.schedule == NAME, f"--schedule {NAME} gives {cfg.schedule}"


def test_a_model_is_trained_with_it():
    rates(10, 2, 0.3)
    torch.manual_seed(0)
    model = nanophi.Phi(
        nanophi.PhiConfig(
            vocab_size=64,
            hidden_size=32,
            num_attention_heads=2,
            num_hidden_layers=1,
            intermediate_size=64,
            max_position_embeddings=64,
        )
    )
    documents = [[(5 * n + i) % 64 for i in range(40)] for n in range(8)]  # counting
    data = nanophi.Packed(documents, context=64, batch_rows=4, seed=0)
    optimizers = nanophi.build_optimizers(model, "muon", lr=0.02, weight_decay=0.1)
    peaks = peak_rates(optimizers)
    losses = []
    for step in range(20):
        set_rates(optimizers, peaks, nanophi.schedule(NAME, step, 20, warmup=4, decay=0.3))
        loss, count, _ = nanophi.next_token_loss(model, data.batch_at(step))
        (loss / count).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append((loss / count).item())
    fell = f"from {losses[0]:.2f} to {losses[-1]:.2f} in 20 steps"
    assert losses[-1] < losses[0] - 1, f"it learns to count: the loss should fall by 1, not {fell}"
