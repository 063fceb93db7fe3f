"""Several processes that train as one: torchrun starts them, and once a step their gradients are added.

    torchrun --nproc-per-node 4 pretrain.py ...          (more machines, restarts: torchrun's own flags)

Every rank builds the same model and reads the same `batch_at(step)`, takes its part of the samples, and after the last
micro-step adds up gradient sums, losses and counts with the others; then all take the same optimizer step. There is no
wrapper around the model: the chunked loss reads hidden states and head apart, past any hook a wrapper would have put on
`forward`. `--out` has to be seen by all ranks (they resume from it), and rank 0 alone writes there.

For a model that does not fit on one device, `--shard` splits weights, gradients and optimizer states over the ranks
(torch's FSDP2; Zhao et al. 2023). A sharded tensor is a DTensor, which holds this rank's rows: `whole` and `part_like`
lead from one to the other, and checkpoints are written whole.
"""

import atexit
import gc
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from nanophi.cli import UserError
from nanophi.model.checkpoint import pick_device
from nanophi.model.phi import Phi

BUCKET = 25_000_000  # elements added at once: 100 MB of fp32
JOINING = timedelta(minutes=10)  # until all ranks have come
PATIENCE = timedelta(
    minutes=30
)  # for a rank that does not answer, such as rank 0 while it evaluates


@dataclass(frozen=True)
class World:
    """Who this process is among those that train together."""

    rank: int
    size: int
    device: str

    @property
    def first(self) -> bool:
        return self.rank == 0

    def part(self, samples: int) -> tuple[int, int]:
        """[start, stop) of the samples of a step that are this rank's."""
        return samples * self.rank // self.size, samples * (self.rank + 1) // self.size

    def add_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Replace every gradient by its sum over the ranks; of a sharded model it is their mean, taken in backward."""
        if self.size == 1:
            return
        waiting: list[Tensor] = []
        for p in parameters:
            if is_sharded(p):
                p.grad.mul_(self.size)
                continue
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            waiting.append(p.grad)
            if sum(map(torch.Tensor.numel, waiting)) >= BUCKET:
                waiting = _add(waiting)
        _add(waiting)

    def clip(self, parameters: Iterable[Tensor], largest: float) -> float:
        """Scale the gradients so that their norm is at most `largest` (Pascanu et al. 2013); return what it was.

        The norm of each row is taken in fp32 and that of all rows in fp64: ranks hold whole rows of a sharded model,
        so its factor is that of one process to the bit. One rounded otherwise would be another run 20 steps later.
        """
        gradients = [p.grad for p in parameters if p.grad is not None]
        parts = [grad.to_local() if is_sharded(grad) else grad for grad in gradients]
        rows = [
            part if part.dim() == 1 else torch.linalg.vector_norm(part, dim=-1) for part in parts
        ]
        squares = torch.stack([row.double().square().sum() for row in rows]).sum().item()
        norm = math.sqrt(self.add([squares])[0] if is_sharded(gradients[0]) else squares)
        if (factor := largest / (norm + 1e-6)) < 1:
            torch._foreach_mul_(parts, factor)
        return norm

    def add(self, numbers: list[float]) -> list[float]:
        """The sums over the ranks, in double precision."""
        return self._reduced(numbers, dist.ReduceOp.SUM)

    def largest(self, numbers: list[float]) -> list[float]:
        return self._reduced(numbers, dist.ReduceOp.MAX)

    def _reduced(self, numbers: list[float], operation) -> list[float]:
        if self.size == 1:
            return numbers
        together = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        dist.all_reduce(together, operation)
        return together.tolist()

    def gather(self, value) -> list:
        """The value of every rank, in order, on every rank."""
        found = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(found, value)
        return found


def _add(tensors: list[Tensor]) -> list[Tensor]:
    """Sum over the ranks, in place, as one flat message; returns a new empty list."""
    if tensors:
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        for tensor, part in zip(
            tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True
        ):
            tensor.copy_(part.view_as(tensor))
    return []


def shard(model: Phi, world: World) -> None:
    """Split the model over the ranks, in place. A block is whole only while it computes; embedding, final norm and head
    are whole from `hidden` until the end of backward, as the loss reads the head. In half precision backward needs the
    copies that autocast makes of all blocks; with --recompute they are made again. The first `hidden` after it must not
    be under inference_mode: FSDP2 (torch 2.13) cannot train then."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(world.device.split(":")[0], (world.size,))
    # DTensor's caches keep the mesh for good, and with it the group: see _leave.
    atexit.register(getattr(mesh, "_pg_registry", {}).clear)
    for part in (*model.model.layers, model):
        fully_shard(part, mesh=mesh)
    register_fsdp_forward_method(model, "hidden")


def is_sharded(tensor: Tensor) -> bool:
    """Whether this rank holds a part of the tensor (a DTensor) and not all of it."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor put together, on every rank (all must ask at once); any other one as it is."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def part_like(full: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a whole tensor, where `like` is sharded."""
    if not is_sharded(like):
        return full
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(
        full.to(like.device), like.device_mesh, like.placements, src_data_rank=None
    )


def put_together(tree, keep: bool):
    """A nested dict or list whose sharded tensors are whole and on the CPU. All ranks call it; those that do not `keep`
    the result have None in place of such tensors."""
    if isinstance(tree, dict):
        return {name: put_together(value, keep) for name, value in tree.items()}
    if isinstance(tree, list):
        return [put_together(value, keep) for value in tree]
    if not isinstance(tree, Tensor) or not is_sharded(tree):
        return tree
    full = tree.full_tensor()
    return full.cpu() if keep else None


def join(device: str) -> World:
    """The world that torchrun has made (its environment variables say so), or a world of one."""
    size, device = int(os.environ.get("WORLD_SIZE", "1")), pick_device(device)
    if device.startswith("cuda:"):
        if size > 1:
            raise UserError(
                f"--device {device}: of {size} ranks each has a GPU of its own, so say cuda or nothing"
            )
        torch.cuda.set_device(device)  # random state and memory are asked of the current one
    if size == 1:
        return World(0, 1, device)
    if device == "cuda":
        local, there = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= there:
            raise UserError(
                f"rank {local} has no GPU of its own: this machine has {there}; start as many ranks"
            )
        device = f"cuda:{local}"
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        from torch.distributed.nn import functional  # noqa: F401  its defaults would keep a group made before it

        try:
            store, rank, size = next(dist.rendezvous("env://", timeout=JOINING))
        except (
            dist.DistError,
            ValueError,
        ) as error:  # some never came, or there is no address to come to
            raise UserError(
                f"{size} ranks should train together and did not all come: {error}; use torchrun"
            ) from None
        if os.environ.get("GROUP_WORLD_SIZE", "1") == "1":
            # On one machine torchrun keeps its store when it restarts the ranks (torch 2.13), and they would look for
            # each other where the dead ones were.
            store = dist.PrefixStore(
                f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store
            )
        backend = "nccl" if device.startswith("cuda") else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)
        if backend == "gloo":  # with nccl, a rank that fails alone would wait here for the others
            atexit.register(_leave)
    return World(dist.get_rank(), dist.get_world_size(), device)


def _leave() -> None:
    """End gloo's threads before the interpreter ends. A thread that lets go of a tensor after that needs a lock that it
    can no longer have, and the process aborts with all its work done. The threads end with the last reference to the
    group, which a model in reference cycles may hold too."""
    gc.collect()
    if dist.is_initialized():
        dist.destroy_process_group()


def computes_in(cfg, device: str) -> str:
    """The dtype in which a run computes: --dtype, or what suits the device. cfg: a TrainConfig (loop.py)."""
    if cfg.dtype != "auto":
        return cfg.dtype
    if not device.startswith("cuda"):
        return "float32"
    return (
        "bfloat16" if torch.cuda.get_device_capability(device)[0] >= 8 else "float16"
    )  # older cards have no bf16


def is_first() -> bool:
    """Whether this process is rank 0, before or without `join`."""
    return os.environ.get("RANK", "0") == "0"
