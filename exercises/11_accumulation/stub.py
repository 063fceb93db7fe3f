"""Exercise 11: the gradient of a batch that is computed a part at a time."""

from torch import nn

from nanophi import Batch
from nanophi.train.losses import LossFn


def accumulate(model: nn.Module, loss_fn: LossFn, batch: Batch, micro_batch: int) -> float:
    """The mean loss of a batch; its gradient is in `p.grad` of each parameter afterwards.

    The mean is over all tokens that count in the batch. At most `micro_batch` samples are computed
    at once: backward of one micro-batch comes before forward of the next one. Gradients of an
    earlier step do not count.

    len(batch)                 how many samples there are
    batch.cut(start, stop)     some of them, as a batch
    loss_fn(model, part)       (sum of the losses, how many tokens count, metrics: ignore them)
    """
    raise NotImplementedError("write accumulate")
