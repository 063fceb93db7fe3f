"""A training loop of some 25 lines, made of the library's parts.

    model = nanophi.Phi(cfg)
    losses = train(model, data, steps=100, lr=6e-3)

nanophi/train/loop.py does the same. What it adds is around the loop and not in it: several devices,
micro-batches, half precision, validation, a log, checkpoints, exact resume, and what happens when
a loss is nan. Read this file first, then nanophi/train/step.py, then loop.py.
"""

import torch

import nanophi
from nanophi.train.losses import LossFn
from nanophi.train.optim import peak_rates, set_rates


def train(
    model: nanophi.Phi,
    data,
    steps: int,
    lr: float,
    loss_fn: LossFn = nanophi.next_token_loss,
    optimizer: str = "muon",
) -> list[float]:
    """Train the model in place; returns the loss of each step, in nats per learned token.

    data: has `batch_at(step)`, as nanophi.Packed and nanophi.Pairs
    """
    optimizers = nanophi.build_optimizers(model, optimizer, lr=lr, weight_decay=0.1)
    peaks = peak_rates(optimizers)
    losses = []
    model.train()
    for step in range(steps):
        # 1. The learning rate is a function of the step, and so is the batch.
        set_rates(optimizers, peaks, nanophi.schedule("wsd", step, steps, warmup=10))
        batch = data.batch_at(step)

        # 2. Forward: the sum of the losses, and of how many tokens (or pairs).
        loss, count, _ = loss_fn(model, batch)
        mean = loss / count

        # 3. Backward: the gradient of each weight, of a length of at most 1.
        mean.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)

        # 4. Update, and forget the gradients.
        for each in optimizers:
            each.step()
            each.zero_grad()
        losses.append(mean.item())
    model.eval()
    return losses
