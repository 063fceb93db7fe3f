"""One optimizer step, from top to bottom. loop.py repeats it; the other files serve the two.

batch
  | cut
micro-batches
  | loss_fn
sums of losses
  | backward
sums of gradients
  | + those of the other ranks, / count, clip
the gradient
  | optimizers
new weights
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

from nanophi.expect import Expected, check
from nanophi.model.phi import Phi
from nanophi.train.distributed import World
from nanophi.train.losses import LossFn
from nanophi.train.packing import Batch


@dataclass
class StepResult:
    """The numbers that a step gives."""

    means: dict[str, float]  # the loss, and what else the loss function measures
    grad_norm: float  # before clipping
    finite: bool  # loss and gradient are finite; otherwise the weights were not changed


def training_step(
    model: Phi,
    optimizers: list[Optimizer],
    loss_fn: LossFn,
    batch: Batch,
    micro_batch: int,
    world: World,
    clip: float = math.inf,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
    scale: float = 1.0,
) -> StepResult:
    """Change the weights once, by the mean loss over all samples of `batch`, on all ranks together.

    micro_batch: samples that this device computes at once. It changes the memory use, not the
                 result (only its rounding)
    clip:        the largest norm of the gradient
    autocast:    the context of the forward passes, for half precision
    scale:       the loss is multiplied by it before backward, so that small fp16 gradients do not
                 become 0
    """
    check(micro_batch, Expected(int, at_least=1), "micro_batch")
    parameters = list(model.parameters())
    for p in parameters:
        p.grad = None

    # 1. Forward and backward, a micro-batch at a time. Each loss is a sum over tokens (or pairs),
    # so the gradients add up to the gradient of the sum over the whole step.
    sums: dict[str, Tensor] = {}
    count = 0
    begin, end = world.part(len(batch))
    for start in range(begin, end, micro_batch):
        part = batch.cut(start, min(start + micro_batch, end)).to(world.device)
        with autocast():
            loss, part_count, metrics = loss_fn(model, part)
        (loss * scale).backward()
        count += part_count
        for name, value in ({"loss": loss.detach()} | metrics).items():
            sums[name] = sums[name] + value if name in sums else value

    # 2. Sum over the ranks: the gradients, then the losses, the metrics and the count.
    world.add_gradients(parameters)
    numbers = torch.stack(list(sums.values())).tolist()  # a GPU is waited for once
    *totals, counted = world.add([*numbers, count])

    # 3. Divide once, by the count of the whole step: every token weighs the same, however the step
    # was cut.
    counted = max(counted, 1)
    gradients = [p.grad for p in parameters if p.grad is not None]
    torch._foreach_div_(gradients, counted * scale)
    means = {name: total / counted for name, total in zip(sums, totals, strict=True)}

    # 4. Clip.
    grad_norm = world.clip(parameters, clip)

    # 5. Update, unless a number has become infinite or nan.
    finite = math.isfinite(means["loss"]) and math.isfinite(grad_norm)
    if finite:
        for optimizer in optimizers:
            optimizer.step()
    return StepResult(means, grad_norm, finite)
