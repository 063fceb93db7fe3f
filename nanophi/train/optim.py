"""Optimizers, their parameter groups, and learning-rate schedules as functions of the step.

The default is Muon for the matrices inside the blocks and AdamW for the rest (embedding, head, biases, norms).
"""

import math

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from nanophi.train.distributed import part_like, whole

NS_COEFFICIENTS = (
    3.4445,
    -4.7750,
    2.0315,
)  # Jordan et al. 2024: steepest at 0, so small singular values rise fast
NS_STEPS = 5
NS_NUMBERS = 2**25  # of the matrices iterated together, which takes some 36 bytes for each
FIRST_MOMENTUM = 0.85


def orthogonalize(matrices: Tensor) -> Tensor:
    """Replace the singular values of each matrix (n, A, B) by about 1 (0.7 to 1.2), by Newton-Schulz iteration.

    In bf16 on GPUs that have it; in fp32 on a CPU, many of which compute bf16 several times slower.
    """
    a, b, c = NS_COEFFICIENTS
    half = matrices.is_cuda and torch.cuda.get_device_capability(matrices.device)[0] >= 8
    x = matrices.bfloat16() if half else matrices.float()
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(NS_STEPS):
        gram = x @ x.mT  # (n, A, A)
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(matrices.dtype)


class Muon(Optimizer):
    """Momentum whose update is orthogonalized (Jordan et al. 2024), scaled to AdamW's size: 0.2 sqrt(max(A, B)) lr
    (Liu et al. 2025, "Muon is scalable", eq. 4). 2-D parameters only; those of one shape are iterated together.
    Momentum grows from FIRST_MOMENTUM in `rising` steps, as gradients change quickly at first. An update needs its
    whole matrix: where it is sharded, every rank gathers it and does the same work."""

    def __init__(
        self, params, lr: float, momentum: float = 0.95, weight_decay: float = 0.1, rising: int = 0
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
        for group in self.param_groups:  # states saved before momentum rose
            group["rising"], group["steps"] = group.get("rising", 0), group.get("steps", 0)

    @torch.no_grad()
    def step(self, closure=None) -> None:
        assert closure is None
        for group in self.param_groups:
            risen = min(group["steps"] / group["rising"], 1) if group["rising"] else 1
            momentum = FIRST_MOMENTUM + (group["momentum"] - FIRST_MOMENTUM) * risen
            group["steps"] += 1
            shapes: dict[torch.Size, list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault(p.shape, []).append(p)
            for shape, params in shapes.items():
                at_once = max(NS_NUMBERS // shape.numel(), 1)
                for first in range(0, len(params), at_once):
                    self._update(params[first : first + at_once], group, momentum)

    def _update(self, params: list[Tensor], group: dict, momentum: float) -> None:
        updates = []
        for p in params:
            state = self.state[p]
            if not state:
                state["momentum"] = torch.zeros_like(p)
            state["momentum"].lerp_(p.grad, 1 - momentum)
            updates.append(p.grad.lerp(state["momentum"], momentum))  # Nesterov
        scale = group["lr"] * 0.2 * max(params[0].shape) ** 0.5
        for p, update in zip(
            params, orthogonalize(torch.stack([*map(whole, updates)])), strict=True
        ):
            p.mul_(1 - group["lr"] * group["weight_decay"]).add_(part_like(update, p), alpha=-scale)


class Adafactor(Optimizer):
    """Adafactor (Shazeer & Stern 2018) as HF's Trainer sets it, the original's optimizer: an external learning rate,
    no scaling by the parameter's size, no momentum. A matrix keeps one mean square per row and per column."""

    def __init__(
        self,
        params,
        lr: float,
        weight_decay: float = 0.1,
        decay_rate: float = -0.8,
        clip: float = 1.0,
    ):
        super().__init__(
            params, {"lr": lr, "weight_decay": weight_decay, "decay_rate": decay_rate, "clip": clip}
        )

    @torch.no_grad()
    def step(self, closure=None) -> None:
        assert closure is None
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, self.state[p], group)

    @staticmethod
    def _update(p: Tensor, state: dict, group: dict) -> None:
        grad = whole(p.grad)
        square = grad.square().add_(1e-30)
        if not state:
            state["step"] = torch.zeros(())
            names = (
                {"rows": square.mean(-1), "columns": square.mean(-2)}
                if p.dim() > 1
                else {"square": p}
            )
            state.update({name: torch.zeros_like(value) for name, value in names.items()})
        state["step"] += 1
        keep = (
            1 - state["step"].item() ** group["decay_rate"]
        )  # beta_2 grows towards 1, section 7.2
        if (
            p.dim() > 1
        ):  # section 3: the outer product of row and column means stands for the matrix
            state["rows"].lerp_(square.mean(-1), 1 - keep)
            state["columns"].lerp_(square.mean(-2), 1 - keep)
            rows = state["rows"] / state["rows"].mean(-1, keepdim=True)
            update = rows.rsqrt()[..., :, None] * state["columns"].rsqrt()[..., None, :] * grad
        else:
            state["square"].lerp_(part_like(square, p), 1 - keep)
            update = whole(state["square"]).rsqrt() * grad
        update /= (update.square().mean().sqrt() / group["clip"]).clamp(
            min=1.0
        )  # section 6: clip its RMS
        p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(
            part_like(update, p), alpha=group["lr"]
        )


def build_optimizers(
    model: nn.Module, name: str, lr: float, weight_decay: float
) -> list[Optimizer]:
    """The optimizers of one name: "muon" (two of them), "adamw" or "adafactor". Biases and norms are not decayed.

    With Muon, `lr` is that of the matrices; embedding, head, biases and norms train with AdamW at half of it.
    """
    in_blocks = {id(p) for n, p in model.named_parameters() if p.dim() == 2 and ".layers." in n}
    params = [p for p in model.parameters() if p.requires_grad]
    if name == "muon":
        matrices = [p for p in params if id(p) in in_blocks]
        return [
            Muon(matrices, lr=lr, weight_decay=weight_decay, rising=300),
            _adamw([p for p in params if id(p) not in in_blocks], lr / 2, weight_decay),
        ]
    if name == "adamw":
        return [_adamw(params, lr, weight_decay)]
    assert name == "adafactor", name
    return [Adafactor(_groups(params, weight_decay), lr=lr)]


def _groups(params: list[Tensor], weight_decay: float) -> list[dict]:
    return [
        {"params": [p for p in params if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in params if p.dim() <= 1], "weight_decay": 0.0},
    ]


def _adamw(params: list[Tensor], lr: float, weight_decay: float) -> Optimizer:
    return torch.optim.AdamW(_groups(params, weight_decay), lr=lr, betas=(0.9, 0.95), fused=True)


def schedule(name: str, step: int, steps: int, warmup: int, decay: float = 0.3) -> float:
    """The learning rate of `step` (from 0) as a share of its peak, never 0 within the run.

    wsd: warm-up, stable, then linear decay over the last share `decay` of the steps (Hu et al. 2024, MiniCPM);
    cosine: warm-up, then half a cosine; constant: warm-up only.
    """
    if step < warmup:
        return (step + 1) / warmup
    if name == "constant":
        return 1.0
    if name == "cosine":
        phase = (step - warmup) / max(steps - warmup, 1)
        return 0.5 + 0.5 * math.cos(math.pi * phase)
    assert name == "wsd", name
    decay_steps = max(round(steps * decay), 1)
    return min(1.0, (steps - step) / decay_steps)
