import weakref

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

N, D, V, CHUNK = 150, 2, 40, 8  # 8 does not divide 150
MOST = 10 * CHUNK * V  # numbers that may exist at once; all logits are 19 chunks, their inputs one
NAMES = ("the loss", "the gradient by hidden", "the gradient by weight", "the gradient by bias")


def test_a_row_by_hand(mine):
    weight = torch.zeros(3, 2, dtype=torch.float64)
    hidden = torch.ones(1, 2, dtype=torch.float64)
    loss, *_, d_bias = mine.loss_and_gradients(hidden, weight, weight[:, 0], torch.tensor([1]), 8)
    assert abs(float(loss) - 1.0986) < 1e-4, (
        f"of 3 equal logits the loss is ln 3, {float(loss):.4f} came"
    )
    found = [round(x, 4) for x in d_bias.tolist()]
    assert found == [0.3333, -0.6667, 0.3333], (
        f"logits 0 0 0, target 1: the gradient is 1/3 -2/3 1/3, {found} came"
    )


def test_loss_and_gradients_are_those_of_torch(mine):
    for chunk in (CHUNK, 1, N):
        agrees(mine, inputs(), chunk)


def test_large_logits_do_not_overflow(mine):
    """exp(1000) is infinite, even in fp64."""
    hidden, weight, bias, targets = inputs()
    agrees(mine, (hidden * 400, weight, bias, targets), CHUNK)


def test_the_logits_of_one_chunk_exist_at_a_time(mine):
    given = inputs()
    with Watch() as watch:
        mine.loss_and_gradients(*given, CHUNK)
    assert watch.largest <= CHUNK * V, (
        f"{watch.name} makes a tensor {watch.shape}: {watch.largest:,} numbers, expected at most "
        f"chunk * V = {CHUNK} * {V} = {CHUNK * V}"
    )
    assert watch.peak <= MOST, (
        f"up to {watch.peak:,} numbers exist at once, expected at most {MOST:,}: the logits of "
        "earlier chunks are still there (in a list, or kept by autograd)"
    )


def agrees(mine, given, chunk):
    leaves = [x.clone().requires_grad_() for x in given[:3]]
    loss = F.cross_entropy(F.linear(*leaves), given[3], reduction="sum")
    expected = (loss.detach(), *torch.autograd.grad(loss, leaves))
    results = mine.loss_and_gradients(*given, chunk)
    for name, found, wanted in zip(NAMES, results, expected, strict=True):
        where = f"{name}, N = {N}, chunk = {chunk}"
        shape = tuple(found.shape)
        assert shape == tuple(wanted.shape), f"{where}: the shape is {shape}, not {wanted.shape}"
        difference = ((found - wanted).abs().max() / wanted.abs().max()).item()
        assert difference < 1e-10, f"{where}: up to {difference:.1e} (relative) away from torch's"


def inputs():
    """hidden, weight, bias in fp64, targets."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((N, D), (V, D), (V,))
    tensors = [torch.randn(s, dtype=torch.float64, generator=generator) for s in shapes]
    return *tensors, torch.randint(V, (N,), generator=generator)


class Watch(TorchDispatchMode):
    """Sees what each operation of torch returns, those of autograd too."""

    def __init__(self):
        super().__init__()
        self.largest = self.peak = 0
        self.name = self.shape = None
        self.seen = []  # weak references to all tensors that came

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else (result,):
            if isinstance(x, torch.Tensor):
                self.look(str(func), x)
        return result

    def look(self, name, x):
        if x.numel() > self.largest:
            self.largest, self.name, self.shape = x.numel(), name, tuple(x.shape)
        self.seen.append(weakref.ref(x))
        alive = [x for x in (reference() for reference in self.seen) if x is not None]
        self.seen = [weakref.ref(x) for x in alive]
        memory = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in alive}
        self.peak = max(self.peak, sum(memory.values()) // torch.float64.itemsize)
