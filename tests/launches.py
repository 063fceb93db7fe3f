"""Counts what a training step asks of a GPU, without one.

The step runs on fake tensors, which have shapes and no numbers. `Counter` sees each operation:

    operators   those that compute something; views and shapes are free
    launches    the kernels they start. A "foreach" operation on many tensors is one operator, and
                starts a kernel for each CHUNKS pieces of CHUNK numbers
    gigabytes   what they read and write, were each read and written once by each operator

    python -m tests.launches phi2-chinese-0.2b phi2-chinese-0.35b-fast
"""

import copy
import sys
from collections import Counter as Tally
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nanophi.model.config import PhiConfig
from nanophi.model.phi import Phi
from nanophi.model.speed import speed_up
from nanophi.train import losses
from nanophi.train.distributed import World
from nanophi.train.optim import build_optimizers
from nanophi.train.packing import Batch, Packed
from nanophi.train.step import training_step

CHUNK, CHUNKS = 65_536, 320  # of torch's multi_tensor_apply

READ_A_NUMBER = torch.ops.aten._local_scalar_dense.default  # .item(), float(), bool()

FREE = {
    "view", "_unsafe_view", "t", "transpose", "permute", "expand", "slice", "select", "unsqueeze",
    "squeeze", "detach", "alias", "split", "split_with_sizes", "unbind", "as_strided", "empty",
    "empty_like", "new_empty", "device", "promote_types", "_record_function_enter_new",
    "_record_function_exit", "lift_fresh", "dtype", "empty_strided",
}  # fmt: skip


class Counter(TorchDispatchMode):
    """Counts what happens inside, on fake tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: Tally[str] = Tally()
        self.launches: Tally[str] = Tally()
        self.bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        if tensors and not any(isinstance(x, FakeTensor) for x in tensors):
            with unset_fake_temporarily():  # the batch, which the CPU cuts up
                return function(*args, **kwargs)
        if function is READ_A_NUMBER:
            return 1.0  # tests/test_devices.py counts these waits
        out = function(*args, **kwargs)
        name = function._schema.name.split("::")[1]
        if name not in FREE:
            self.operators[name] += 1
            self.launches[name] += launches_of(name, args)
            results = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
            self.bytes += sum(x.numel() * x.element_size() for x in tensors + results)
        return out

    def less(self, other: "Counter") -> "Counter":
        """What is counted here beyond another count."""
        rest = Counter()
        rest.operators = self.operators - other.operators
        rest.launches = self.launches - other.launches
        rest.bytes = self.bytes - other.bytes
        return rest


def launches_of(name: str, args: Any) -> int:
    if not name.startswith(("_foreach", "_fused")):
        return 1
    first = args[0]
    pieces = sum(-(-x.numel() // CHUNK) for x in first)
    return -(-pieces // CHUNKS)


def fake_batch(batch: Batch, mode: FakeTensorMode) -> Batch:
    moved = copy.copy(batch)
    for name, value in vars(batch).items():
        if isinstance(value, torch.Tensor):
            setattr(moved, name, mode.from_tensor(value))
    return moved


PHASES = ("forward and backward", "sums, division, clipping", "optimizers")


def counted(preset: str, rows: int = 128, context: int = 512) -> dict[str, Counter]:
    """A step of `rows` rows, all at once, in bf16 with flash attention and Muon: its PHASES."""
    shape = PhiConfig.preset(preset, max_position_embeddings=context)
    rng = np.random.default_rng(0)
    documents = [rng.integers(7, shape.vocab_size, n) for n in rng.integers(50, 600, 3 * rows)]
    batch = Packed(documents, context, rows, 0).batch_at(0)
    autocast = partial(torch.autocast, "cpu", torch.bfloat16, cache_enabled=False)
    world = World(0, 1, "cpu")
    with (
        FakeTensorMode(allow_non_fake_inputs=True) as mode,
        mock.patch.object(Batch, "to", lambda batch, device: fake_batch(batch, mode)),
        mock.patch.object(torch.Tensor, "tolist", read_numbers),
        mock.patch.object(losses, "chunk_size", lambda V, *_: losses.LOGITS_ON_GPU // V),
    ):
        model = Phi(shape, "varlen")
        speed_up(model)
        optimizers = build_optimizers(model, "muon", 1e-3, 0.1)
        with Counter() as model_alone:
            with autocast():
                loss, _, _ = losses.next_token_loss(model, batch.to("cpu"))
            loss.backward()
        with Counter() as without_optimizers:
            training_step(model, [], losses.next_token_loss, batch, rows, world, 1.0, autocast)
        for _ in range(2):  # the first step also makes the states
            with Counter() as optimizers_alone:
                for optimizer in optimizers:
                    optimizer.step()
    between = without_optimizers.less(model_alone)
    return dict(zip(PHASES, (model_alone, between, optimizers_alone), strict=True))


def read_numbers(x: torch.Tensor) -> list[float]:
    return [x[i].item() for i in range(len(x))] if isinstance(x, FakeTensor) else x.numpy().tolist()


def main(presets: list[str]) -> None:
    for preset in presets:
        for phase, counter in counted(preset).items():
            print(
                f"{preset}, {phase}: {counter.operators.total():,} operators, "
                f"{counter.launches.total():,} launches, {counter.bytes / 1e9:.1f} GB"
            )
            most = counter.operators.most_common(8)
            print("   ", ", ".join(f"{n} {name}" for name, n in most))


if __name__ == "__main__":
    main(sys.argv[1:])
