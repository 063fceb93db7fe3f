import random

import nanophi

# (steps, warmup, decay)
RUNS = [
    (10, 2, 0.3),
    (10, 0, 0.3),  # no warm-up
    (1, 0, 0.3),  # one step
    (10, 3, 0.0),  # no decay
    (7, 1, 0.5),
    (20, 5, 1.0),  # nothing stable
    (10, 8, 0.5),  # the warm-up reaches into the decay
    (300, 10, 0.3),
]


def test_ten_steps_by_hand(mine):
    found = [round(mine.wsd(step, 10, 2, 0.3), 2) for step in range(10)]
    expected = [0.5, 1, 1, 1, 1, 1, 1, 1, 0.67, 0.33]
    assert found == expected, (
        f"10 steps, 2 of warm-up, decay 0.3: expected {expected}, {found} came"
    )


def test_it_is_never_0_and_never_above_1(mine):
    for steps, warmup, decay in RUNS:
        for step in range(steps):
            found = mine.wsd(step, steps, warmup, decay)
            assert 0 < found <= 1, f"{run(step, steps, warmup, decay)}: {found} came"


def test_it_is_pure(mine):
    """A run that is resumed at step 7 asks for step 7 first."""
    for steps, warmup, decay in RUNS:
        in_order = [mine.wsd(step, steps, warmup, decay) for step in range(steps)]
        order = list(range(steps)) * 2
        random.Random(0).shuffle(order)
        for step in order:
            found = mine.wsd(step, steps, warmup, decay)
            assert found == in_order[step], (
                f"{run(step, steps, warmup, decay)}: {in_order[step]:.4f} when all steps are asked "
                f"for in order, {found:.4f} in another order"
            )


def test_it_is_the_schedule_of_the_library(mine):
    for steps, warmup, decay in RUNS:
        for step in range(steps):
            found = mine.wsd(step, steps, warmup, decay)
            expected = nanophi.schedule("wsd", step, steps, warmup, decay)
            assert abs(found - expected) < 1e-12, (
                f"{run(step, steps, warmup, decay)}: expected {expected:.4f}, {found:.4f} came"
            )


def run(step, steps, warmup, decay):
    return f"step {step} of {steps}, {warmup} of warm-up, decay {decay}"
