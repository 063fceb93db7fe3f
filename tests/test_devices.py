"""Tensors of the CPU and of a GPU never meet, and a GPU is waited for only where that is meant.

No GPU is needed. The model lies on torch's device "meta", whose tensors have shapes and no numbers,
and batches are born on the CPU as in real training. `Watch` sees each operation before torch does.
"""

from contextlib import contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nanophi.infer.generate import generate
from nanophi.model import backends
from nanophi.model.phi import Phi
from nanophi.model.speed import speed_up
from nanophi.train.distributed import World
from nanophi.train.losses import make_dpo_loss_fn, next_token_loss, validate, validation_loss
from nanophi.train.optim import build_optimizers
from nanophi.train.packing import Packed
from nanophi.train.preferences import Pairs, Preference
from nanophi.train.reference import reference_logps
from nanophi.train.step import training_step
from tests.conftest import tiny_config
from tests.train.test_loop import random_documents

GPU = "meta"
READ_A_NUMBER = torch.ops.aten._local_scalar_dense.default  # .item(), float(), bool()
COPIES = (torch.ops.aten._to_copy, torch.ops.aten.copy_, torch.ops.aten.to)


class Watch(TorchDispatchMode):
    """Refuses operations on tensors of two devices, and counts where the CPU waits for the GPU.

    As on a real GPU, a single number of the CPU may meet a tensor of the GPU.
    """

    def __init__(self):
        super().__init__()
        self.waits = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        on_gpu = any(tensor.device.type == GPU for tensor in tensors)
        if on_gpu and function is READ_A_NUMBER:
            self.waits += 1
            return 1.0 if tensors[0].is_floating_point() else 1
        if function.overloadpacket not in COPIES:
            arrays = [t for t in tensors if t.device.type == GPU or t.dim() > 0]
            devices = {tensor.device.type for tensor in arrays}
            assert len(devices) < 2, f"{function} mixes tensors of two devices"
        elif on_gpu and "cpu" in str(kwargs.get("device")):
            self.waits += 1
            return torch.ones(tensors[0].shape, dtype=kwargs.get("dtype") or tensors[0].dtype)
        return function(*args, **kwargs)


@contextmanager
def gpu():
    with Watch() as watch:
        yield watch


@pytest.fixture(autouse=True)
def without_autocast(monkeypatch):
    """Autocast, which is off here, does not know the device "meta" and fails where it is asked."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)


def model_on_gpu(attention="auto"):
    with torch.device(GPU):
        model = Phi(tiny_config(), attention)
    speed_up(model)
    return model


def batches():
    return Packed(random_documents(), 32, 8, seed=1)


def pairs(share=False):
    sides = [(ids.tolist(), [place >= 2 for place in range(len(ids))]) for ids in documents()]
    both = [Preference(a, b) for a, b in zip(sides[::2], sides[1::2], strict=True)]
    both.append(Preference(sides[0], (sides[0][0][:4], sides[0][1][:4])))  # with a prompt in common
    return Pairs(both, 7, seed=0, share=share)


def documents():
    return random_documents(n=12)


def flash(q, k, v, cu_seqlens, longest, scale):
    """A stand-in for the kernel of "varlen", which has the shapes and devices of one."""
    assert cu_seqlens.device == q.device
    return q + k + v


def waits_of_a_step(micro_batch, attention="auto", loss_fn=next_token_loss, data=None):
    model = model_on_gpu(attention)
    batch = (data or batches()).batch_at(0)
    with gpu() as watch:
        training_step(model, [], loss_fn, batch, micro_batch, World(0, 1, GPU), clip=1.0)
    assert all(p.grad is not None and p.grad.device.type == GPU for p in model.parameters())
    return watch.waits


@pytest.mark.parametrize("attention", ["auto", "manual", "causal", "varlen"])
def test_a_step_waits_once_however_many_micro_batches_it_has(attention, monkeypatch):
    """For all of its numbers together: a wait in a micro-batch would leave a GPU idle."""
    monkeypatch.setattr(backends, "flash_kernel", lambda: flash)
    assert waits_of_a_step(8, attention) == waits_of_a_step(2, attention) == 1


@pytest.mark.parametrize("optimizer", ["muon", "adafactor"])
def test_optimizers_stay_on_the_device(optimizer):
    model = model_on_gpu()
    optimizers = build_optimizers(model, optimizer, 1e-3, 0.1)
    if optimizer == "muon":
        optimizers = optimizers[:1]  # torch's own AdamW has no fused kernel for "meta"
    with gpu():
        for _ in range(2):
            training_step(
                model, optimizers, next_token_loss, batches().batch_at(0), 8, World(0, 1, GPU)
            )
    assert all(p.device.type == GPU for p in model.parameters())


def test_validation_reads_a_batch_and_its_numbers():
    model = model_on_gpu()
    with gpu():
        assert validate(model, next_token_loss, batches().in_order())
        assert validation_loss(model, batches().in_order(), [1] * 448).keys() == {
            "val_loss",
            "val_bits_per_byte",
        }


@pytest.mark.parametrize("share", [False, True])
def test_preferences_the_reference_and_the_loss(share):
    data = pairs(share)
    with gpu():
        data.reference = reference_logps(model_on_gpu(), data, micro_batch=2)
    assert data.reference.device.type == "cpu"
    assert data.reference.shape == (len(data), 2)
    loss_fn = make_dpo_loss_fn(0.1)
    few = waits_of_a_step(7, loss_fn=loss_fn, data=data)
    assert few == waits_of_a_step(2, loss_fn=loss_fn, data=data) == 1


@pytest.mark.parametrize("prompts", [[[7, 8, 9]], [[7, 8, 9], [5]]], ids=["one", "padded"])
@pytest.mark.parametrize(
    "how",
    [{}, {"temperature": 0.8, "top_k": 5, "top_p": 0.9, "repetition_penalty": 1.2}],
    ids=["greedy", "sampled"],
)
def test_decoding_stays_on_the_device(prompts, how):
    with gpu():
        answers = generate(model_on_gpu(), prompts, max_new_tokens=4, eos_token_id=None, **how)
    assert [len(answer) for answer in answers] == [4] * len(prompts)


def test_mistakes_are_seen():
    """A mask that stayed on the CPU, a number that is read in a loss: both pass on a CPU."""

    def reading(model, batch):
        loss, count, metrics = next_token_loss(model, batch)
        assert loss.item() > 0
        return loss, count, metrics

    assert waits_of_a_step(2, loss_fn=reading) == 1 + 4

    def mixing(model, batch):
        loss, count, metrics = next_token_loss(model, batch)
        return (loss * torch.ones(3)).sum(), count, metrics

    with pytest.raises(AssertionError, match="mixes tensors of two devices"):
        waits_of_a_step(8, loss_fn=mixing)
    model = model_on_gpu()
    with gpu(), pytest.raises(AssertionError, match="mixes tensors of two devices"):
        model(torch.tensor([[7, 8, 9]]))
