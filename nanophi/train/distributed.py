"""Several processes that train as one: torchrun starts them, and they sum their gradients.

    torchrun --nproc-per-node 4 pretrain.py ...

torchrun's own flags are for more machines and for restarts.

Every rank builds the same model and reads its part of the samples of `batch_at(step)`. While the
last backward of a step still runs, the gradients that are complete are summed over the ranks
(`GradientSums`); losses and counts follow, and all ranks take the same optimizer step. The model
has no wrapper: the chunked loss reads hidden states and head separately and never calls `forward`,
so the hooks of a wrapper would not fire. All ranks must see `--out`, because they resume from it;
only rank 0 writes there.

For a model that does not fit on one device, `--shard` distributes weights, gradients and optimizer
states over the ranks (torch's FSDP2; Zhao et al. 2023). A distributed tensor (torch's DTensor)
holds the rows of this rank: `whole` and `part_like` lead from one to the other. Models are written
whole, and of the state each rank writes its rows, see split_state.py.
"""

import atexit
import contextlib
import gc
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from nanophi.cli import UserError
from nanophi.expect import Expected, check, shown
from nanophi.model.phi import Phi

BUCKET = 25_000_000  # gradients summed in one message: 100 MB of fp32
JOINING = timedelta(minutes=10)  # how long to wait until all ranks have come
PATIENCE = timedelta(minutes=30)  # how long to wait for a rank, such as rank 0 while it saves


T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """Who this process is among those that train together."""

    rank: int
    size: int
    device: str
    reduce_dtype: torch.dtype | None = None  # of gradients on their way, where it is not theirs

    @property
    def first(self) -> bool:
        return self.rank == 0

    def part(self, samples: int) -> tuple[int, int]:
        """[start, stop): the samples of a step that are this rank's.

        >>> [World(rank, 3, "cpu").part(8) for rank in range(3)]
        [(0, 2), (2, 5), (5, 8)]
        """
        return samples * self.rank // self.size, samples * (self.rank + 1) // self.size

    def turns(self, items: Iterable[T]) -> Iterator[tuple[T, bool]]:
        """Deal items to the ranks in turn: this rank's, and whether each of them counts.

        All ranks have as many turns, because each has a part of a distributed model and takes part
        in every pass through it. Where the items run out, a rank takes the last one once more:

        >>> [list(World(rank, 2, "cpu").turns("abc")) for rank in range(2)]
        [[('a', True), ('c', True)], [('b', True), ('c', False)]]
        """
        turn: list[T] = []
        for item in items:
            turn.append(item)
            if len(turn) == self.size:
                yield turn[self.rank], True
                turn = []
        if turn:
            yield turn[min(self.rank, len(turn) - 1)], self.rank < len(turn)

    @contextlib.contextmanager
    def adding_gradients(self, model: Any, parameters: list[Any], last: bool) -> Iterator[None]:
        """Backward runs in this context. After the last micro-batch of a step, every gradient is
        its sum over the ranks.

        parameters: those that are trained
        """
        if self.size == 1:
            yield
        elif is_distributed(parameters[0]):
            model.set_requires_gradient_sync(last)
            yield
            if last:  # FSDP has taken the mean
                torch._foreach_mul_([local(p.grad) for p in parameters], self.size)
        elif last:
            with summed_over_ranks(parameters, self.reduce_dtype):
                yield
        else:
            yield

    def square_norm(self, gradients: list[Any]) -> Tensor:
        """The sum of the squares of all gradients: () in fp64.

        The squares of each row are summed in fp32, and those of all rows in fp64. Ranks hold whole
        rows of a distributed model, so the norm is that of one process: a difference in the last
        bit makes two runs diverge within 20 steps.
        """
        own = [local(gradient) for gradient in gradients]
        rows = [g if g.dim() == 1 else torch.linalg.vector_norm(g, dim=-1) for g in own]
        squares = torch.cat(rows).double().square().sum()
        return self.add(squares) if is_distributed(gradients[0]) else squares

    def add(self, numbers: Tensor) -> Tensor:
        """The sums over the ranks."""
        if self.size > 1:
            dist.all_reduce(numbers)
        return numbers

    def gather(self, value: Any) -> list:
        """The value of every rank, in order, on every rank."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    @contextlib.contextmanager
    def failing_together(self) -> Iterator[None]:
        """What the user or the disk does to one rank in this block ends it on all of them.

        All ranks call it. Inside of it they must not wait for each other.
        """
        problem = None
        try:
            yield
        except (UserError, OSError) as error:
            problem = error
        problems = [each for each in self.gather(problem) if each is not None]
        if problems:
            raise problem or problems[0]


ALONE = World(0, 1, "cpu")


class GradientSums:
    """Sums gradients over the ranks in the order in which backward completes them: from the head
    down to the embedding.

    Gradients are sent in buckets, one flat message for each. A bucket leaves as soon as all of its
    gradients are there, and the buckets before it have left, so that all ranks send the same:

        bucket 0    head            complete: sent     | backward goes on
        bucket 1    layers 15, 14   complete: sent     v
        bucket 2    layers 13, 12   13 is there, 12 is being computed
    """

    def __init__(self, parameters: list[Tensor], dtype: torch.dtype | None = None):
        """dtype: that of the messages, where it is not that of the gradients"""
        self.dtype = dtype
        self.buckets = in_buckets(parameters[::-1])
        self.bucket_of = {p: number for number, b in enumerate(self.buckets) for p in b}
        self.missing = [len(bucket) for bucket in self.buckets]  # gradients
        self.sent: list[tuple[Tensor, Any]] = []  # of each bucket: the message, and its transport

    def take(self, p: Tensor) -> None:
        """The gradient of p is complete."""
        self.missing[self.bucket_of[p]] -= 1
        while len(self.sent) < len(self.buckets) and not self.missing[len(self.sent)]:
            self._send()

    def _send(self) -> None:
        bucket = self.buckets[len(self.sent)]
        for p in bucket:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        flat = torch.cat([p.grad.flatten() for p in bucket if p.grad is not None])
        message = flat.to(self.dtype or flat.dtype)
        self.sent.append((message, dist.all_reduce(message, async_op=True)))

    def finish(self) -> None:
        """Send what is left, and put the sums in the place of the gradients."""
        while len(self.sent) < len(self.buckets):
            self._send()
        for bucket, (message, transport) in zip(self.buckets, self.sent, strict=True):
            transport.wait()
            gradients = [p.grad for p in bucket if p.grad is not None]  # none is missing
            sums = message.split([gradient.numel() for gradient in gradients])
            shaped = [part.view_as(g) for part, g in zip(sums, gradients, strict=True)]
            torch._foreach_copy_(gradients, shaped)


@contextlib.contextmanager
def summed_over_ranks(parameters: list[Tensor], dtype: torch.dtype | None = None) -> Iterator[None]:
    """The backward pass inside ends with gradients that are summed over the ranks."""
    sums = GradientSums(parameters, dtype)
    hooks = [p.register_post_accumulate_grad_hook(sums.take) for p in parameters]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    sums.finish()


def in_buckets(tensors: list[Tensor]) -> list[list[Tensor]]:
    """Cut a list into parts of at least BUCKET elements; only the last may have fewer."""
    buckets: list[list[Tensor]] = []
    room = 0
    for tensor in tensors:
        if room <= 0:
            buckets.append([])
            room = BUCKET
        buckets[-1].append(tensor)
        room -= tensor.numel()
    return buckets


def by_all_ranks(work: Callable[[Tensor], Tensor], stack: Tensor) -> Tensor:
    """work(stack), where each rank does its share of the first dimension and all get the whole.

    Five matrices and two ranks: rank 0 does three of them, and rank 1 two and one of zeros.
    """
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    if min(ranks, len(stack)) == 1:
        return work(stack)
    each = -(-len(stack) // ranks)
    mine = stack[dist.get_rank() * each :][:each]
    if len(mine) < each:
        mine = torch.cat([mine, mine.new_zeros(each - len(mine), *stack.shape[1:])])
    done = work(mine).contiguous()
    whole_stack = done.new_empty(ranks * each, *done.shape[1:])
    dist.all_gather_into_tensor(whole_stack, done)
    return whole_stack[: len(stack)]


def by_ranks_of_rows(work: Callable[[Tensor], Tensor], rows: Tensor, length: int) -> Tensor:
    """This rank's rows of work(stack), where each rank has some rows of every matrix.

    rows:   (n, a, B), the a rows that this rank has of n matrices
    length: the rows of a matrix on all ranks, which have them as `chunk_sizes` says

    A rank does whole matrices. Three matrices of five rows, and two ranks:

        rank 0    has rows 0 1 2    gets rows 3 4   of matrices 0 and 1, does them, sends these back
        rank 1    has rows 3 4      gets rows 0 1 2 of matrix 2, does it, sends these back
    """
    n, a, width = rows.shape
    ranks = dist.get_world_size()
    rows_of = chunk_sizes(length, ranks)
    matrices_of = chunk_sizes(n, ranks)
    mine = matrices_of[dist.get_rank()]
    pieces = exchange(rows.split(matrices_of), [(mine, count, width) for count in rows_of])
    done = work(torch.cat(pieces, 1))  # (mine, A, B)
    pieces = exchange(done.split(rows_of, 1), [(count, a, width) for count in matrices_of])
    return torch.cat(pieces)


def chunk_sizes(length: int, parts: int) -> list[int]:
    """How torch.chunk, and so FSDP2, cuts a dimension.

    >>> chunk_sizes(5, 4)
    [2, 2, 1, 0]
    """
    each = -(-length // parts)
    return [min(each, max(length - each * part, 0)) for part in range(parts)]


def exchange(parts: Sequence[Tensor], shapes: list[tuple[int, ...]]) -> list[Tensor]:
    """Send part r to rank r. What rank r has sent to this one comes back, in shapes[r]."""
    sent = torch.cat([part.flatten() for part in parts])
    sizes = [math.prod(shape) for shape in shapes]
    received = sent.new_empty(sum(sizes))
    dist.all_to_all_single(received, sent, sizes, [part.numel() for part in parts])
    return [part.view(shape) for part, shape in zip(received.split(sizes), shapes, strict=True)]


# ---- one model over several ranks: --shard


def distribute(model: Phi, world: World) -> None:
    """Distribute the model over the ranks, in place.

    A block is whole only while it computes. Embedding, final norm and head are whole from `hidden`
    until the end of backward, because the loss reads the head. In half precision, backward needs
    the copies that autocast makes of all blocks; with --recompute they are made again. The first
    call of `hidden` must not be under inference_mode: FSDP2 (torch 2.13) cannot train afterwards.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import (
        MixedPrecisionPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )

    mesh = init_device_mesh(world.device.split(":")[0], (world.size,))
    # DTensor's caches keep the mesh for good, and the mesh keeps the process group: see _leave.
    atexit.register(getattr(mesh, "_pg_registry", {}).clear)
    policy = MixedPrecisionPolicy(reduce_dtype=world.reduce_dtype)
    for part in (*model.model.layers, model):
        fully_shard(part, mesh=mesh, mp_policy=policy)
    register_fsdp_forward_method(model, "hidden")


def is_distributed(tensor: Any) -> bool:
    """Whether this rank holds a part of the tensor (a DTensor) and not all of it."""
    return hasattr(tensor, "full_tensor")


def ranks_of(tensor: Any) -> int:
    """Over how many ranks a tensor is distributed."""
    return tensor.device_mesh.size() if is_distributed(tensor) else 1


def local(tensor: Any) -> Tensor:
    """This rank's part of a distributed tensor; another one as it is."""
    return tensor.to_local() if is_distributed(tensor) else tensor


def whole(tensor: Any) -> Tensor:
    """A distributed tensor put together (all ranks must call it); another one as it is."""
    return tensor.full_tensor() if is_distributed(tensor) else tensor


def part_like(full: Tensor, like: Any) -> Tensor:
    """This rank's part of a whole tensor where `like` is distributed, otherwise all of it."""
    if is_distributed(full) or not is_distributed(like):
        return full
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(
        full.to(like.device), like.device_mesh, like.placements, src_data_rank=None
    )


def first_row(tensor: Any) -> int:
    """The number of the first row of a distributed tensor that this rank has."""
    rows_of_ranks = chunk_sizes(len(tensor), ranks_of(tensor))
    return sum(rows_of_ranks[: dist.get_rank()])


def of_rows(rows: Tensor, like: Any) -> Tensor:
    """The distributed tensor of the shape of `like` of which this rank has these rows."""
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        rows.to(like.device),
        like.device_mesh,
        like.placements,
        shape=like.shape,
        stride=like.stride(),
    )


def put_together(tree: Any, keep: bool) -> Any:
    """A nested dict or list whose distributed tensors are whole and on the CPU.

    All ranks call it; those that do not `keep` the result have None in place of such tensors.
    """
    if isinstance(tree, dict):
        return {name: put_together(value, keep) for name, value in tree.items()}
    if isinstance(tree, list):
        return [put_together(value, keep) for value in tree]
    if not isinstance(tree, Tensor) or not is_distributed(tree):
        return tree
    full = whole(tree)
    return full.cpu() if keep else None


# ---- joining and leaving


@dataclass(frozen=True)
class Launch:
    """What torchrun says to a process, in environment variables."""

    size: int = 1  # WORLD_SIZE: ranks on all machines
    rank: int = 0  # RANK
    local_rank: int | None = None  # LOCAL_RANK: the number on this machine, None where not given
    machines: int = 1  # GROUP_WORLD_SIZE
    attempt: int = 0  # TORCHELASTIC_RESTART_COUNT: how often the ranks were started anew


def launch() -> Launch:
    """Read the environment variables that torchrun sets. A UserError where one makes no sense.

    Without WORLD_SIZE, or where it is 1, a process trains alone. Then the others do not count: a
    cluster may set RANK for reasons of its own.
    """
    size = _variable("WORLD_SIZE", default=1, at_least=1)
    if size == 1:
        return Launch()
    rank = _variable("RANK", at_most=size - 1)
    address = os.environ.get("MASTER_ADDR", "")
    if not re.fullmatch(r"\S+", address):
        raise UserError(
            f"the variable MASTER_ADDR is {shown(address)}, expected the name of the machine where "
            f"{size} ranks meet; {START}"
        )
    _variable("MASTER_PORT", at_least=1, at_most=2**16 - 1)
    return Launch(
        size,
        rank,
        _variable("LOCAL_RANK") if "LOCAL_RANK" in os.environ else None,
        _variable("GROUP_WORLD_SIZE", default=1, at_least=1),
        _variable("TORCHELASTIC_RESTART_COUNT", default=0),
    )


START = "start ranks with torchrun, or unset WORLD_SIZE to train alone"


def _variable(
    name: str, default: int | None = None, at_least: int = 0, at_most: int | None = None
) -> int:
    """A whole number from the environment; without a default the variable must be there."""
    text = os.environ.get(name)
    if text is None and default is not None:
        return default
    is_number = text is not None and re.fullmatch("0|-?[1-9][0-9]{0,17}", text)
    value: Any = int(text) if text is not None and is_number else text
    check(value, Expected(int, at_least=at_least, at_most=at_most), f"the variable {name}", START)
    return value


def join(device: str) -> World:
    """The world that torchrun has made (its environment variables say so), or a world of one.

    device: what pick_device gives. Under torchrun, "cuda" becomes the GPU of this rank.
    """
    launched = launch()
    size = launched.size
    if device.startswith("cuda:"):
        if size > 1:
            raise UserError(
                f"--device {device}: of {size} ranks each has a GPU of its own, so say cuda "
                "or nothing"
            )
        torch.cuda.set_device(device)  # random state and memory are asked of the current one
    if size == 1:
        return World(0, 1, device)
    if device == "cuda":
        device = _gpu_of_this_rank(launched.local_rank)
    if not dist.is_initialized():
        _meet(launched, device)
    return World(dist.get_rank(), dist.get_world_size(), device)


def _gpu_of_this_rank(number: int | None) -> str:
    if number is None:
        raise UserError(
            f"the variable LOCAL_RANK, which says whose GPU is whose, is missing; {START}"
        )
    gpus = torch.cuda.device_count()
    if number >= gpus:
        raise UserError(
            f"rank {number} has no GPU of its own: this machine has {gpus}; start as many ranks"
        )
    torch.cuda.set_device(number)
    return f"cuda:{number}"


def _meet(launched: Launch, device: str) -> None:
    """Wait until all ranks have come, and make the process group. device: that of this rank"""
    # Imported before there is a group: the defaults of its functions would keep a group alive.
    from torch.distributed.nn import functional  # noqa: F401

    try:
        store, rank, size = next(dist.rendezvous("env://", timeout=JOINING))
    except (dist.DistError, ValueError) as error:  # a rank never came, or there is no address
        raise UserError(
            f"{launched.size} ranks should train together and did not all come: {error}; "
            "use torchrun"
        ) from None
    if launched.machines == 1:
        # On one machine torchrun keeps its store when it restarts the ranks (torch 2.13). Without a
        # prefix of their own they would look for each other at the addresses of the dead ones.
        store = dist.PrefixStore(f"attempt {launched.attempt}", store)
    backend, device_id = "gloo", None
    if device.startswith("cuda"):
        backend, device_id = "nccl", torch.device(device)
    dist.init_process_group(
        backend,
        store=store,
        rank=rank,
        world_size=size,
        timeout=PATIENCE,
        device_id=device_id,
    )
    if backend == "gloo":
        atexit.register(_leave)


def leave_together() -> None:
    """Take the group down when Python ends. All ranks call it, once they have come to the same end.

    nccl's ranks wait for each other there. So a rank that fails alone, before or after this call,
    ends without.
    """
    if dist.is_initialized() and dist.get_backend() == "nccl":
        atexit.unregister(_leave_unless_failed)  # once is enough
        atexit.register(_leave_unless_failed)


def _leave_unless_failed() -> None:
    if getattr(sys, "last_value", None) is None:  # the exception that has ended the interpreter
        _leave()


def _leave() -> None:
    """Take the group down; for gloo, end its threads before the interpreter ends.

    A thread that releases a tensor after that needs a lock that it can no longer have, and the
    process aborts with all its work done. The threads end with the last reference to the group,
    which a model in reference cycles may hold too.
    """
    gc.collect()
    if dist.is_initialized():
        dist.destroy_process_group()
