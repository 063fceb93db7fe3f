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
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.optim import Optimizer

from nanophi.expect import Expected, check
from nanophi.model.phi import Phi
from nanophi.train.distributed import World, local
from nanophi.train.losses import LossFn
from nanophi.train.packing import Batch


@dataclass
class StepResult:
    """The numbers that a step gives."""

    means: dict[str, float]  # the loss, and what else the loss function measures
    grad_norm: float  # before clipping
    finite: bool  # loss and gradient are finite; otherwise the weights were not changed
    sums: list[float] = field(default_factory=list, repr=False)  # of `along`, over the ranks


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
    along: Sequence[float] = (),
    meanwhile: Callable[[], object] = lambda: None,
) -> StepResult:
    """Change the weights once, by the mean loss over the samples of all ranks together.

    batch:       the samples of this rank
    micro_batch: samples that this device computes at once. It changes the memory use, not the
                 result (only its rounding)
    clip:        the largest norm of the gradient
    autocast:    the context of the forward passes, for half precision
    scale:       the loss is multiplied by it before backward, so that small fp16 gradients do not
                 become 0
    along:       numbers to be summed over the ranks, which travel with those of the step
    meanwhile:   is called once, when all work up to the clipping is given to the device and none
                 of it has been waited for

    The CPU waits for a GPU in one place, where the numbers of the step are read.
    """
    check(micro_batch, Expected(int, at_least=1), "micro_batch")
    parameters = [p for p in model.parameters() if p.requires_grad]
    for p in parameters:
        p.grad = None

    # 1. Forward and backward, a micro-batch at a time. Each loss is a sum over tokens (or pairs),
    # so the gradients add up to the gradient of the sum over the whole step. During the last
    # backward, those that are complete are already being summed over the ranks.
    sums: dict[str, Tensor] = {}
    count = 0
    for start in range(0, len(batch), micro_batch):
        part = batch.cut(start, min(start + micro_batch, len(batch))).to(world.device)
        with autocast():
            loss, part_count, metrics = loss_fn(model, part)
        with world.adding_gradients(model, parameters, last=start + micro_batch >= len(batch)):
            (loss * scale).backward()
        count += part_count
        for name, value in ({"loss": loss.detach()} | metrics).items():
            sums[name] = sums[name] + value if name in sums else value

    # 2. Sum the losses, the metrics and the count over the ranks.
    numbers = world.add(side_by_side(sums.values(), [count, *along]))
    counted = numbers[len(sums)].clamp(min=1)

    # 3. Divide once, by the count of the whole step: every token weighs the same, however the step
    # was cut.
    gradients = [p.grad for p in parameters if p.grad is not None]
    own = [local(gradient) for gradient in gradients]
    torch._foreach_div_(own, (counted * scale).to(own[0].dtype))

    # 4. Clip, so that the norm is at most `clip` (Pascanu et al. 2013). Here the CPU reads all
    # numbers of the step: it waits until the device has computed them.
    square_norm = world.square_norm(gradients)
    meanwhile()
    *read, square = torch.cat([numbers, square_norm[None]]).tolist()
    grad_norm = math.sqrt(square)
    factor = clip / (grad_norm + 1e-6)
    if factor < 1:
        torch._foreach_mul_(own, factor)

    # 5. Update, unless a number has become infinite or nan.
    totals, (total_count, *along_sums) = read[: len(sums)], read[len(sums) :]
    means = {name: total / max(total_count, 1) for name, total in zip(sums, totals, strict=True)}
    finite = math.isfinite(means["loss"]) and math.isfinite(grad_norm)
    if finite:
        for optimizer in optimizers:
            optimizer.step()
    return StepResult(means, grad_norm, finite, along_sums)


def side_by_side(of_the_device: Iterable[Tensor], of_the_cpu: Iterable[float]) -> Tensor:
    """Numbers as one fp64 tensor of the device, without a wait.

    >>> side_by_side([torch.tensor(1.5)], [3, 4])
    tensor([1.5000, 3.0000, 4.0000], dtype=torch.float64)
    """
    computed = torch.stack(list(of_the_device)).double()
    return torch.cat([computed, *(computed.new_full((1,), number) for number in of_the_cpu)])
