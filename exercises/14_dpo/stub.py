"""Exercise 14: the loss of DPO, and its gradient without autograd."""

from torch import Tensor


def dpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    beta: float = 0.1,
) -> Tensor:
    """-log sigmoid(beta * margin) of each pair (Rafailov et al. 2023, eq. 7).

    Each argument (B,): log-probabilities of an answer, summed over its tokens, in nats. The margin
    is what the chosen answer has gained on the reference, minus what the rejected one has gained.
    Returns the losses (B,), not their mean.
    """
    raise NotImplementedError("write dpo_loss")


def dpo_gradients(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    beta: float = 0.1,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The derivative of each pair's loss by each of the four log-probabilities, four tensors (B,)
    in the order of the arguments. Derive them on paper: autograd is switched off in the test.
    """
    raise NotImplementedError("write dpo_gradients")
