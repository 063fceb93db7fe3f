"""Exercise 22: IPO, a preference loss that knows when to stop."""

from torch import Tensor


def ipo_loss(chosen: Tensor, rejected: Tensor, beta: float = 0.1) -> Tensor:
    """(margin - 1 / (2 beta))^2 of each pair (Azar et al. 2023, eq. 17).

    chosen, rejected (B,): what each answer has gained on the reference, log policy(y) - log
    reference(y), per token, in nats. The margin is chosen - rejected. Returns the losses (B,).
    """
    raise NotImplementedError("write ipo_loss")


def ipo_gradients(chosen: Tensor, rejected: Tensor, beta: float = 0.1) -> tuple[Tensor, Tensor]:
    """The derivative of each pair's loss by chosen and by rejected, two tensors (B,).

    Derive them on paper: autograd is switched off in the test.
    """
    raise NotImplementedError("write ipo_gradients")
