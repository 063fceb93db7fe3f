"""Exercise 10: cross entropy with its gradients, in little memory.

N tokens, D width, V vocabulary
"""

from torch import Tensor


def loss_and_gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, chunk: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The summed cross entropy of the logits hidden @ weight.T + bias, and its gradients.

    hidden (N, D), weight (V, D), bias (V,), targets (N,)
    -> loss (), a tensor without dimensions, and its gradients by hidden (N, D), by weight (V, D),
    by bias (V,)

    The logits of `chunk` tokens exist at a time: no tensor but the inputs and their gradients may
    be larger than chunk * V numbers, and those of one chunk are no longer needed when the next one
    begins. N need not be a multiple of chunk.

        logits 0 0 0, target 1    loss ln 3    gradient by the logits 1/3 -2/3 1/3
    """
    raise NotImplementedError("write loss_and_gradients")
