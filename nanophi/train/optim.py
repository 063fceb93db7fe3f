"""Optimizers, and learning-rate schedules as functions of the step. OPTIMIZERS and SCHEDULES have
them by name.

The default is Muon for the matrices inside the blocks and AdamW for the rest (embedding, head,
biases, norms).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from nanophi.cli import UserError, row_named
from nanophi.expect import Expected, check
from nanophi.model.backends import has_bf16
from nanophi.train.distributed import (
    by_all_ranks,
    by_ranks_of_rows,
    is_distributed,
    local,
    part_like,
    ranks_of,
    whole,
)

# ---- Muon

# Jordan et al. 2024. The polynomial is steep at 0, so small singular values rise fast.
NS_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
NS_STEPS = 5
NS_NUMBERS = 2**25  # elements that a rank iterates together; one takes about 36 bytes
FIRST_MOMENTUM = 0.85


def orthogonalize(matrices: Tensor) -> Tensor:
    """Bring the singular values of each matrix (n, A, B) near 1, by Newton-Schulz iteration.

    The matrix is divided by its norm, so that no singular value exceeds 1. Then each step applies
    x -> a x + b x^3 + c x^5 to all of them:

        1     -> 0.70  -> 1.11  -> 0.72  -> 1.09 -> 0.70
        0.1   -> 0.34  -> 0.99  -> 0.71  -> 1.11 -> 0.71
        0.001 -> 0.003 -> 0.012 -> 0.041 -> 0.14 -> 0.47

    Values above about 0.0015 end between 0.68 and 1.2, smaller ones stay smaller. A matrix formula
    does this, because x = U S V^T gives x x^T x = U S^3 V^T: only S changes.

    It runs in bf16 on GPUs that have it, and in fp32 on a CPU (fp64 stays fp64): many CPUs compute
    bf16 several times slower.

    >>> x = torch.diag(torch.tensor([0.1, 1.0, 3.0]))
    >>> near_one = orthogonalize(x[None])[0].diagonal()
    >>> bool(((near_one > 0.68) & (near_one < 1.2)).all())
    True
    """
    a, b, c = NS_COEFFICIENTS
    dtype = (
        torch.bfloat16
        if has_bf16(matrices.device)
        else torch.promote_types(matrices.dtype, torch.float32)
    )
    x = matrices.to(dtype)
    tall = x.shape[1] > x.shape[2]
    if tall:  # then x x^T below is the smaller product
        x = x.mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(NS_STEPS):
        gram = x @ x.mT  # (n, A, A)
        # x = a x + (b gram + c gram gram) x. baddbmm(y, p, q) is beta y + alpha p q in one pass.
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    if tall:
        x = x.mT
    return x.to(matrices.dtype)


class Muon(Optimizer):
    """Momentum whose update is orthogonalized (Jordan et al. 2024).

    The update is scaled to the size of AdamW's: 0.2 sqrt(max(A, B)) lr (Liu et al. 2025, "Muon is
    scalable", eq. 4). Parameters must be matrices; those of one shape are iterated together.
    Momentum grows from FIRST_MOMENTUM during the first `rising` steps, as gradients change quickly
    then. An update needs its whole matrix, and where there are several ranks, each iterates some of
    them: all must step together, with the same gradients.
    """

    def __init__(
        self,
        params,
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.1,
        rising: int = 0,
    ):
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "rising": rising,
            "steps": 0,
        }
        super().__init__(params, defaults)

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        for group in self.param_groups:  # states that an older version saved have neither key
            group.setdefault("rising", 0)
            group.setdefault("steps", 0)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            momentum = self._momentum_of(group)
            group["steps"] += 1
            same_shape: dict[torch.Size, list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    same_shape.setdefault(p.shape, []).append(p)
            for shape, params in same_shape.items():
                of_a_rank = max(NS_NUMBERS // shape.numel(), 1)
                for part in in_equal_parts(params, at_most=of_a_rank * ranks_of(params[0])):
                    self._update(part, group, momentum)

    @staticmethod
    def _momentum_of(group: dict) -> float:
        risen = min(group["steps"] / group["rising"], 1) if group["rising"] else 1
        return FIRST_MOMENTUM + (group["momentum"] - FIRST_MOMENTUM) * risen

    def _update(self, params: list[Tensor], group: dict, momentum: float) -> None:
        for p in params:
            if not self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
        # Each line is one operation for all matrices; a GPU takes them in few launches.
        own = [local(p) for p in params]
        gradients = [local(p.grad) for p in params]
        momenta = [local(self.state[p]["momentum"]) for p in params]
        torch._foreach_lerp_(momenta, gradients, 1 - momentum)
        updates = torch._foreach_lerp(gradients, momenta, momentum)  # Nesterov: ahead of it

        together = torch.stack(updates)
        if is_distributed(params[0]):
            orthogonal = by_ranks_of_rows(orthogonalize, together, len(params[0]))
        else:
            orthogonal = by_all_ranks(orthogonalize, together)
        size = group["lr"] * 0.2 * max(params[0].shape) ** 0.5
        torch._foreach_mul_(own, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(own, list(orthogonal), alpha=-size)


def in_equal_parts(items: list, at_most: int) -> list[list]:
    """A list in as few parts as possible of at most so many items, all of nearly one length.

    A GPU takes few large parts best, and ranks divide parts of one length best.

    >>> [len(part) for part in in_equal_parts(list(range(16)), at_most=10)]
    [8, 8]
    """
    parts = -(-len(items) // at_most)
    each = -(-len(items) // parts)
    return [items[start : start + each] for start in range(0, len(items), each)]


# ---- Adafactor


class Adafactor(Optimizer):
    """Adafactor (Shazeer & Stern 2018) as HF's Trainer sets it, the original's optimizer.

    The learning rate comes from outside; there is no scaling by the parameter's size and no
    momentum. A matrix keeps one mean square per row and one per column, instead of one per weight.
    Their outer product, divided by the mean of all, stands for the squares:

        squares  1  2  3    rows 2, 4    columns 1.5, 3, 4.5    mean 3
                 2  4  6    row 0, column 1:  2 * 3 / 3 = 2
    """

    def __init__(
        self,
        params,
        lr: float,
        weight_decay: float = 0.1,
        decay_rate: float = -0.8,
        clip: float = 1.0,
    ):
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "decay_rate": decay_rate,
            "clip": clip,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, self.state[p], group)

    def _update(self, p: Tensor, state: dict, group: dict) -> None:
        assert p.grad is not None
        grad = whole(p.grad)
        square = grad.square().add_(1e-30)
        if not state:
            self._begin(p, square, state)
        state["step"] += 1
        keep = 1 - state["step"].item() ** group["decay_rate"]  # beta_2 grows to 1, section 7.2
        if p.dim() > 1:
            # Section 3: the outer product of the means of rows and columns stands for the matrix.
            state["rows"].lerp_(square.mean(-1), 1 - keep)
            state["columns"].lerp_(square.mean(-2), 1 - keep)
            rows = state["rows"] / state["rows"].mean(-1, keepdim=True)
            columns = state["columns"]
            update = rows.rsqrt()[..., :, None] * columns.rsqrt()[..., None, :] * grad
        else:
            state["square"].lerp_(part_like(square, p), 1 - keep)
            update = whole(state["square"]).rsqrt() * grad
        root_mean_square = update.square().mean().sqrt()
        update /= (root_mean_square / group["clip"]).clamp(min=1.0)  # section 6
        p.mul_(1 - group["lr"] * group["weight_decay"])
        p.sub_(part_like(update, p), alpha=group["lr"])

    @staticmethod
    def _begin(p: Tensor, square: Tensor, state: dict) -> None:
        state["step"] = torch.zeros(())
        if p.dim() > 1:
            state["rows"] = torch.zeros_like(square.mean(-1))
            state["columns"] = torch.zeros_like(square.mean(-2))
        else:
            state["square"] = torch.zeros_like(p)


# ---- the table of optimizers


def muon(model: nn.Module, lr: float, weight_decay: float) -> list[Optimizer]:
    """Muon for the matrices of the blocks; AdamW at half the rate for all the rest."""
    matrices: list[Tensor] = []
    others: list[Tensor] = []
    for name, p in model.named_parameters():
        if p.requires_grad:
            is_matrix = p.dim() == 2 and ".layers." in name
            (matrices if is_matrix else others).append(p)
    if not matrices:
        raise UserError("muon trains the matrices of blocks, whose names hold `.layers.`: none has")
    return [
        Muon(matrices, lr=lr, weight_decay=weight_decay, rising=300),
        _adamw(others, lr / 2, weight_decay),
    ]


def adamw(model: nn.Module, lr: float, weight_decay: float) -> list[Optimizer]:
    return [_adamw(_trained(model), lr, weight_decay)]


def adafactor(model: nn.Module, lr: float, weight_decay: float) -> list[Optimizer]:
    return [Adafactor(decay_groups(_trained(model), weight_decay), lr=lr)]


def _adamw(params: list[Tensor], lr: float, weight_decay: float) -> Optimizer:
    groups = decay_groups(params, weight_decay)
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)


def _trained(model: nn.Module) -> list[Tensor]:
    return [p for p in model.parameters() if p.requires_grad]


def decay_groups(params: list[Tensor], weight_decay: float) -> list[dict]:
    """Two parameter groups: matrices decay, biases and norms do not."""
    return [
        {"params": [p for p in params if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in params if p.dim() <= 1], "weight_decay": 0.0},
    ]


@dataclass(frozen=True)
class OptimizerChoice:
    """A row of OPTIMIZERS. The estimate of memory asks for the numbers of bytes."""

    build: Callable[[nn.Module, float, float], list[Optimizer]]  # (model, lr, weight_decay)
    state_bytes: float  # of the states, for each parameter
    iteration_bytes: float = 0  # for each element of the matrices that are iterated together


OPTIMIZERS = {
    # Muon keeps one momentum for matrices, AdamW two moments for the rest.
    "muon": OptimizerChoice(muon, state_bytes=4.6, iteration_bytes=36),
    "adamw": OptimizerChoice(adamw, state_bytes=8),
    "adafactor": OptimizerChoice(adafactor, state_bytes=0.1),  # a number per row and column
}


def build_optimizers(
    model: nn.Module, name: str, lr: float, weight_decay: float
) -> list[Optimizer]:
    """The optimizers of one name of OPTIMIZERS, which together train every parameter once.

    lr: the peak learning rate, see the function of that name. weight_decay: decoupled; biases and
    norms have none. Raises a UserError for an unknown name.
    """
    check(lr, Expected(float, above=0), "lr")
    check(weight_decay, Expected(float, at_least=0), "weight_decay")
    return row_named(OPTIMIZERS, name, "optimizer").build(model, lr, weight_decay)


# ---- learning rates


def peak_rates(optimizers: list[Optimizer]) -> list[list[float]]:
    """The learning rates of all groups as they were built: the peaks of the schedule."""
    return [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]


def set_rates(optimizers: list[Optimizer], peaks: list[list[float]], factor: float) -> float:
    """Set every learning rate to `factor` times its peak; returns the first, to be logged."""
    for optimizer, optimizer_peaks in zip(optimizers, peaks, strict=True):
        for group, peak in zip(optimizer.param_groups, optimizer_peaks, strict=True):
            group["lr"] = peak * factor
    return optimizers[0].param_groups[0]["lr"]


def wsd(step: int, steps: int, warmup: int, decay: float) -> float:
    """Stable, then a linear decay over the last steps (Hu et al. 2024, MiniCPM)."""
    decay_steps = max(round(steps * decay), 1)
    return min(1.0, (steps - step) / decay_steps)


def cosine(step: int, steps: int, warmup: int, decay: float) -> float:
    """Half a cosine from the end of the warm-up to the end of training."""
    phase = (step - warmup) / max(steps - warmup, 1)
    return 0.5 + 0.5 * math.cos(math.pi * phase)


def constant(step: int, steps: int, warmup: int, decay: float) -> float:
    return 1.0


# What follows the warm-up: (step, steps, warmup, decay) -> share of the peak.
# To add a schedule, add a row.
SCHEDULES = {"wsd": wsd, "cosine": cosine, "constant": constant}


def schedule(name: str, step: int, steps: int, warmup: int, decay: float = 0.3) -> float:
    """The learning rate of `step` (from 0) as a share of its peak, never 0 within the run.

    It rises in a line during the warm-up, then follows a schedule of SCHEDULES.

    >>> [round(schedule("wsd", step, steps=10, warmup=2), 2) for step in range(10)]
    [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.67, 0.33]
    """
    after_warmup = row_named(SCHEDULES, name, "schedule")
    check(step, Expected(int, at_least=0, at_most=steps - 1), "step")
    check(warmup, Expected(int, at_least=0), "warmup")
    check(decay, Expected(float, at_least=0, at_most=1), "decay")
    if step < warmup:
        return (step + 1) / warmup
    return after_warmup(step, steps, warmup, decay)
