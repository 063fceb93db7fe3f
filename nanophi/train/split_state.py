"""The tensors of a split model's state (--shard): each rank writes its rows, and reads its rows.

    <out>/train_state.pt                  all else; None stands in the place of such a tensor
    <out>/train_state-000500/             named by the step
        rows-00001-of-00002.safetensors   the rows that rank 0 had
        rows-00002-of-00002.safetensors   those of rank 1

Nobody gathers the moments of all ranks, and any number of ranks can read them. train_state.pt lists
the checksums of the files and is renamed after all of them are written, so a kill at any moment
leaves the state before.

The form is that of torch.distributed.checkpoint's HuggingFaceStorageWriter, and torch reads it (a
test does). It is read here and not by torch, which leaves rows that are in no file as they were,
without a word (torch 2.13). Nothing is pickled.
"""

import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.optim import Optimizer

from nanophi.cli import SHOWN, UserError
from nanophi.expect import Expected, check, check_fields, parse_json
from nanophi.files import replacing
from nanophi.model.checkpoint import FLOATS
from nanophi.train.distributed import World, first_row, is_distributed, local, of_rows
from nanophi.train.state import seal_of

OFFSETS = "DCP_SHARDING_INFO"  # in the header of a file: name -> saved_offsets, of its first number


def parts_in(folder: Path, ranks: int) -> list[Path]:
    """The files of a state that so many ranks have written.

    >>> [path.name for path in parts_in(Path("train_state-000500"), ranks=2)]
    ['rows-00001-of-00002.safetensors', 'rows-00002-of-00002.safetensors']
    """
    return [folder / f"rows-{rank + 1:05}-of-{ranks:05}.safetensors" for rank in range(ranks)]


def places(state: dict) -> Iterator[tuple[str, dict, Any]]:
    """Where a state holds tensors: a name, and the dict and the key under which the tensor lies.

    >>> state = {"model": {"head": 1}, "optimizers": [{"state": {3: {"momentum": 2}}}]}
    >>> for name, holder, key in places(state):
    ...     print(name, holder, key)
    model.head {'head': 1} head
    optimizers.0.3.momentum {'momentum': 2} momentum
    """
    holders = {"model": state["model"]}
    for index, optimizer in enumerate(state["optimizers"]):
        kept = optimizer.get("state")
        for number, entry in kept.items() if isinstance(kept, dict) else ():
            holders[f"optimizers.{index}.{number}"] = entry
    for name, holder in holders.items():
        for key in holder if isinstance(holder, dict) else ():
            yield f"{name}.{key}", holder, key


# ---- write


def take_out(state: dict) -> dict[str, Tensor]:
    """The distributed tensors of a state, by name. None takes their places."""
    taken = {}
    for name, holder, key in places(state):
        if is_distributed(holder[key]):
            taken[name] = holder[key]
            holder[key] = None
    return taken


def write_rows(folder: Path, tensors: dict[str, Any], world: World) -> str:
    """Write this rank's rows of distributed tensors; returns the checksum of the file."""
    path = parts_in(folder, world.size)[world.rank]
    rows = {}
    offsets = {}
    for name, tensor in tensors.items():
        own = local(tensor)
        if len(own):  # a bias of 3 numbers leaves the last of four ranks without any
            rows[name] = own.cpu().contiguous()
            offsets[name] = {"saved_offsets": [first_row(tensor)] + [0] * (own.dim() - 1)}
    with replacing(path) as beside:
        try:
            save_file(rows, beside, metadata={OFFSETS: json.dumps(offsets)})
        except SafetensorError as error:  # such as a full disk
            raise UserError(f"cannot write {path}: {error}") from None
        return checksum(beside)


def checksum(path: Path) -> str:
    return seal_of(path, path.stat().st_size).decode()


# ---- read


def put_back(state: dict, folder: Path, likes: dict[str, Any], world: World) -> None:
    """Read the tensors of a split state into their places.

    likes: name -> a tensor of this run; a saved tensor of its shape is distributed as it is. The
           name of a parameter ("optimizers.0.3") stands for all that is kept for it.

    The ranks divide the checksums among them. So one of them may find the damage, and the caller
    sees to it that all of them fail.
    """
    advice = f"an older state may lie in {folder.parent}/step-*"
    checksums = state.get("parts") or []
    found: dict[str, list[tuple[int, Any]]] = defaultdict(list)
    for number, path in enumerate(parts_in(folder, len(checksums))):
        if not path.is_file():
            raise UserError(f"{path} is missing; {advice}")
        is_mine = number % world.size == world.rank
        if is_mine and checksum(path) != checksums[number]:
            raise UserError(
                f"{path} is damaged, its bytes are not those that were written; {advice}"
            )
        for name, first, rows in rows_of(path):
            found[name].append((first, rows))
    for name, holder, key in places(state):
        # weights_only lets a distributed tensor pass, and a run writes none into train_state.pt.
        if holder[key] is None or is_distributed(holder[key]):
            like = likes.get(name, likes.get(name.rpartition(".")[0]))
            pieces = found.pop(name, None)
            holder[key] = pieces and joined(pieces, like, f"{folder}: {name[:SHOWN]}")
    for name in found:
        raise UserError(f"{folder}: {name[:SHOWN]} has no place in the state beside it")


def rows_of(path: Path) -> Iterator[tuple[str, int, Any]]:
    """What a file holds: name, number of the first row, and the rows, which are not read yet."""
    try:
        file = safe_open(path, framework="pt")
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        offsets = parse_json((file.metadata() or {}).get(OFFSETS, "{}"))
    except (SafetensorError, ValueError) as error:
        raise UserError(f"{path} is damaged: {str(error)[:200]}") from None
    check_fields(offsets, dict.fromkeys(slices, Expected(dict)), path)
    for name, rows in slices.items():
        where = f"{path}: {name[:SHOWN]}"
        shape = rows.get_shape()
        if rows.get_dtype() not in FLOATS:
            raise UserError(f"{where} is of type {rows.get_dtype()}")
        offset = offsets[name].get("saved_offsets")
        check(offset, Expected(list, of=Expected(int, at_least=0)), f"{where}: saved_offsets")
        if not shape or len(offset) != len(shape) or any(offset[1:]):
            raise UserError(f"{where}: {shape} at {offset[:9]} are no whole rows")
        yield name, offset[0], rows


def joined(pieces: list[tuple[int, Any]], like: Any, where: str) -> Tensor:
    """The tensor of which several files hold rows. Where `like` is distributed, only the rows of
    this rank are read:

        saved by two ranks          rows 0 1 2 | 3 4
        read by the second of three          2 | 3         of 0 1 | 2 3 | 4
    """
    pieces.sort(key=lambda piece: piece[0])
    columns = pieces[0][1].get_shape()[1:]
    length = 0
    for first, rows in pieces:
        if first != length or rows.get_shape()[1:] != columns:
            raise UserError(f"{where}: its rows in the files do not follow each other")
        length += rows.get_shape()[0]
    is_part = is_distributed(like) and list(like.shape) == [length, *columns]
    begin, end = (first_row(like), first_row(like) + len(local(like))) if is_part else (0, length)
    read = [pieces[0][1][0:0]]  # no rows, of the right dtype
    for first, rows in pieces:
        start = max(begin - first, 0)
        stop = min(end - first, rows.get_shape()[0])
        if start < stop:
            read.append(rows[start:stop])
    return of_rows(torch.cat(read), like) if is_part else torch.cat(read)


def likes_of(weights: dict[str, Tensor], optimizers: list[Optimizer]) -> dict[str, Tensor]:
    """The tensors of a run, under the names of `places`."""
    likes = {f"model.{name}": tensor for name, tensor in weights.items()}
    for index, optimizer in enumerate(optimizers):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        likes |= {f"optimizers.{index}.{number}": p for number, p in enumerate(parameters)}
    return likes
