"""Exercise 12: the learning rate of a step: warm-up, stable, decay."""


def wsd(step: int, steps: int, warmup: int, decay: float) -> float:
    """The learning rate of `step` (0 ... steps - 1) as a share of its peak.

    In the first `warmup` steps it rises in a line, from 1 / warmup to 1; only the warm-up counts
    there. In the last round(steps * decay) steps, at least one, it falls in a line from 1: so that
    it would be 0 at the step `steps`, which is never run. Between the two it is 1.

        [wsd(step, 10, 2, 0.3) for step in range(10)]  ->  0.5 1 1 1 1 1 1 1 0.67 0.33
    """
    raise NotImplementedError("write wsd")
