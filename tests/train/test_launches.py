"""What a training step asks of a GPU: operators, launches, bytes, graphs of the compiler. No GPU is
needed, see tests/launches.py. How often it waits for one is counted in tests/test_devices.py.
"""

from functools import cache

import pytest
import torch

from nanophi.model import backends, speed
from nanophi.train import losses
from nanophi.train.distributed import World
from nanophi.train.losses import next_token_loss, validate
from nanophi.train.optim import NS_COEFFICIENTS, NS_STEPS, Muon
from nanophi.train.packing import Packed
from nanophi.train.step import training_step
from tests.conftest import tiny_model
from tests.launches import PHASES, Counter, counted
from tests.train.test_loop import random_documents

ALONE = World(0, 1, "cpu")

# torch's compiler warns of torch's own code.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning"),
]


@pytest.mark.parametrize(
    ("preset", "most"),
    [("phi2-chinese-0.2b", (2060, 120, 150)), ("phi2-chinese-0.35b-fast", (2850, 170, 220))],
)
def test_few_operators_a_step(preset, most):
    """Clipping alone was four operators a tensor, while the GPU waited for the CPU; Muon did one
    matrix after the other. In all three phases, 0.2 B: 2,060, 792 and 652 operators; 0.35 B-fast:
    2,853, 1,176 and 976.
    """
    for phase, limit, counter in zip(PHASES, most, counted(preset).values(), strict=True):
        assert counter.operators.total() <= limit, phase
        assert counter.launches.total() <= limit * 1.2, phase


def test_the_loss_moves_few_bytes(monkeypatch):
    """A bf16 logit went through memory as fp32 eight times. Inductor counts what its kernels read
    and write.
    """
    from torch._inductor import compile_fx, metrics

    logits = torch.randn(256, 8192).bfloat16()
    targets = torch.zeros(256, dtype=torch.int64)
    eager = bytes_of(losses.softmax_loss, logits.clone(), targets) / logits.numel()
    monkeypatch.setattr(compile_fx.inductor_metrics_log, "isEnabledFor", lambda level: True)
    torch._dynamo.reset()
    metrics.reset()
    with (
        torch._inductor.config.patch(fx_graph_cache=False),
        torch._functorch.config.patch(enable_autograd_cache=False),
    ):
        torch.compile(speed.softmax_loss, dynamic=False)(logits, targets)
    fused = metrics.num_bytes_accessed / logits.numel()
    assert eager > 40
    assert 0 < fused < 13


def bytes_of(function, *inputs):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode:
        inputs = [mode.from_tensor(x) for x in inputs]
        with Counter() as counter:
            function(*inputs)
    return counter.bytes


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-2)],
)
def test_the_fused_loss_is_the_readable_one(dtype, tolerance, monkeypatch):
    monkeypatch.setattr(speed, "_compiled_softmax_loss", without_inductor(speed.softmax_loss))
    torch.manual_seed(0)
    for tokens in (1, 7, 300):
        logits = (3 * torch.randn(tokens, 500, dtype=torch.float64)).to(dtype)
        targets = torch.randint(500, (tokens,))
        expected = losses.softmax_loss(logits.clone(), targets)
        found = speed.fused_softmax_loss(logits, targets)
        assert [x.dtype for x in found] == [x.dtype for x in expected]
        for a, b in zip(found, expected, strict=True):
            assert (a - b).abs().max() <= tolerance * b.abs().max()
        without, *empty = speed.fused_softmax_loss(logits, targets, needs_gradient=False)
        assert without.item() == pytest.approx(expected[0].item(), rel=max(tolerance, 1e-6))
        assert not any(x.numel() for x in empty)


@pytest.mark.skipif(not hasattr(torch.nn.functional, "linear_cross_entropy"), reason="torch 2.13")
def test_the_loss_is_torchs_own():
    torch.manual_seed(0)
    hidden = torch.randn(40, 16, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(300, 16, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(300, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(300, (40,))
    inputs = (hidden, weight, bias)
    ours = losses.head_cross_entropy(*inputs, targets)
    oracle = torch.nn.functional.linear_cross_entropy(
        hidden, weight, targets, linear_bias=bias, reduction="sum"
    )
    assert ours.item() == pytest.approx(oracle.item(), rel=1e-12)
    gradients = (torch.autograd.grad(loss, inputs) for loss in (ours, oracle))
    for a, b in zip(*gradients, strict=True):
        assert (a - b).abs().max() <= 1e-12 * b.abs().max()


def without_inductor(function):
    """A stand-in for what compiles it: Dynamo traces, and no code is made."""
    return cache(lambda: torch.compile(function, backend="eager"))


def flash(q, k, v, cu_seqlens, longest, scale):
    return q + k + v


def test_nothing_is_compiled_after_the_first_steps(monkeypatch):
    """Batches differ in their documents and targets, and a validation comes between."""
    monkeypatch.setattr(backends, "flash_kernel", lambda: flash)
    monkeypatch.setattr(speed, "_compiled_softmax_loss", without_inductor(speed.softmax_loss))
    monkeypatch.setattr(
        torch.nn.Module, "compile", partial_method(torch.nn.Module.compile, backend="eager")
    )
    torch._dynamo.reset()
    made = torch._dynamo.utils.counters["stats"]
    model = tiny_model(num_hidden_layers=12)
    model.attention = "varlen"
    speed.speed_up(model, compile=True)
    data = Packed(random_documents(), 32, 8, seed=1)
    before = made["unique_graphs"]
    graphs = []
    for step in range(8):
        batch = data.batch_at(step)
        training_step(model, [], next_token_loss, batch, 4, ALONE)
        if step % 3 == 1:
            validate(model, next_token_loss, data.in_order())
        graphs.append(made["unique_graphs"] - before)
    assert graphs[0] > 0
    assert graphs[-1] == graphs[1] <= 6
    torch._dynamo.reset()


def partial_method(method, **named):
    """The method with some more arguments, for whichever instance it is called."""
    return lambda self, *args, **given: method(self, *args, **given | named)


def one_after_the_other(gradients, count, clip):
    """How it was done: a division by a number of the CPU, a norm a tensor, a sum of the norms."""
    for gradient in gradients:
        gradient.div_(count)
    rows = [g if g.dim() == 1 else torch.linalg.vector_norm(g, dim=-1) for g in gradients]
    norm = torch.stack([row.double().square().sum() for row in rows]).sum().sqrt().item()
    for gradient in gradients:
        gradient.mul_(min(clip / (norm + 1e-6), 1.0))
    return norm


@pytest.mark.parametrize("clip", [0.01, 1e9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_division_and_clipping_keep_their_bits(dtype, clip):
    batch = Packed(random_documents(), 32, 8, seed=1).batch_at(0)
    model = tiny_model().to(dtype)
    loss, count, _ = next_token_loss(model, batch)
    loss.backward()
    expected = [p.grad.clone() for p in model.parameters()]
    norm = one_after_the_other(expected, count, clip)
    result = training_step(model, [], next_token_loss, batch, 8, ALONE, clip=clip)
    assert result.grad_norm == pytest.approx(norm, rel=1e-15)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), expected, strict=True))


def test_muon_moves_as_its_formula_says():
    """Against one matrix after the other, as the formula stands in the docstring: in fp64 to
    1e-12.
    """
    model = tiny_model(num_hidden_layers=3).double()
    matrices = [p for p in model.model.layers.parameters() if p.dim() == 2]
    oracle = [p.detach().clone() for p in matrices]
    momenta = [torch.zeros_like(p) for p in matrices]
    muon = Muon(matrices, lr=0.01, momentum=0.9, weight_decay=0.1)
    for _ in range(3):
        for p, q, momentum in zip(matrices, oracle, momenta, strict=True):
            p.grad = torch.randn_like(p)
            momentum.lerp_(p.grad, 0.1)
            x = p.grad.lerp(momentum, 0.9)
            update = by_formula(x.mT).mT if x.shape[0] > x.shape[1] else by_formula(x)
            q.mul_(1 - 0.01 * 0.1).sub_(0.01 * 0.2 * max(p.shape) ** 0.5 * update)
        muon.step()
    for p, q in zip(matrices, oracle, strict=True):
        assert (p - q).abs().max() < 1e-12


def by_formula(x):
    a, b, c = NS_COEFFICIENTS
    x = x / x.norm()
    for _ in range(NS_STEPS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x
