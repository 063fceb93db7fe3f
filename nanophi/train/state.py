"""train_state.pt: how a file of a run's state is sealed, read and checked.

Nothing of a state reaches a model before all of it is known to be what a run has written: a state
may be damaged, and anybody may have made it.

Read in this order: `seal`, `read_state`, then the checks of weights, optimizers and random states.
"""

import copy
import math
import zlib
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from nanophi.cli import SHOWN, UserError
from nanophi.expect import Expected, check, check_fields, shown
from nanophi.train.distributed import is_distributed, local

# ---- the seal
#
# A state ends in a checksum of all bytes before it. torch.load begins at the end that a zip file
# has, and does not mind what follows:
#
#     | zip file of torch.save ... PK 5 6 ... | checksum=1c291ca3 |

SEAL = b"checksum="  # and eight hexadecimal digits
SEAL_BYTES = len(SEAL) + 8
ZIP_END = b"PK\x05\x06"  # how the last ZIP_END_BYTES of a zip file begin
ZIP_END_BYTES = 22


def seal(path: Path) -> None:
    """Append the checksum of a file to it."""
    ending = seal_of(path, path.stat().st_size)
    with open(path, "ab") as file:
        file.write(ending)


def seal_of(path: Path, size: int) -> bytes:
    """The seal of the first `size` bytes of a file."""
    checksum = 0
    with open(path, "rb") as file:
        while size > 0 and (part := file.read(min(size, 2**20))):
            checksum = zlib.crc32(part, checksum)
            size -= len(part)
    return SEAL + b"%08x" % checksum


def is_whole(path: Path) -> bool:
    """Whether the bytes of a state are those that were written.

    Of a state without a seal, which an older version has written, only the end can be looked at.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        file.seek(max(size - SEAL_BYTES - ZIP_END_BYTES, 0))
        ending = file.read()
    if ending[-SEAL_BYTES:].startswith(SEAL):
        return ending[-SEAL_BYTES:] == seal_of(path, size - SEAL_BYTES)
    return ending[-ZIP_END_BYTES:].startswith(ZIP_END)


# ---- reading

# What a state holds beside the tensors.
FIELDS = {
    "step": Expected(int, at_least=0),
    "tokens": Expected(int, at_least=0),
    "seconds": Expected(float, at_least=0),
    "skipped": Expected(int, at_least=0),
    "scale": Expected(list, of=Expected(float, at_least=0)),
    "settings": Expected(dict, of=Expected(str)),
    "micro_batch": Expected(int, at_least=1, optional=True),  # older states lack it
    "model": Expected(dict, of=Expected(str)),
    "optimizers": Expected(list, of=Expected(dict)),
    "rng": Expected(list),
    "parts": Expected(list, of=Expected(str), optional=True),  # of a split model: split_state.py
}


def read_state(path: Path) -> dict:
    """A state whose plain fields are checked. A UserError where it is damaged, or no state.

    Its tensors lie in the file, which is mapped into memory: the ranks of a machine share one copy,
    that of the operating system. Who keeps a tensor clones it.
    """
    advice = f"an older state may lie in {path.parent}/step-*"
    if not is_whole(path):
        raise UserError(f"{path} is damaged, its bytes are not those that were written; {advice}")
    try:
        state = torch.load(path, weights_only=True, map_location="cpu", mmap=True)
    except Exception as error:  # foreign bytes raise almost anything
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"[:100]
        raise UserError(f"{path} is damaged or no state of a run ({reason}); {advice}") from None
    check_fields(state, FIELDS, path, advice)
    for name, value in state["settings"].items():
        check(value, Expected(str), f"{path}: settings: {name[:SHOWN]}", advice)
    if state.get("best") != math.inf:  # no validation so far
        check(state.get("best"), Expected(float), f"{path}: best", advice)
    if len(state["scale"]) != 2:
        raise UserError(f"{path}: scale has {len(state['scale'])} entries, expected 2; {advice}")
    check(state["scale"][0], Expected(float, above=0), f"{path}: the first entry of scale", advice)
    check(state["scale"][1], Expected(int), f"{path}: the second entry of scale", advice)
    return state


# ---- checking the tensors


def check_weights(saved: dict, expected: dict[str, Tensor], where: str) -> None:
    """A UserError where saved tensors have not the names, shapes and dtypes of others."""
    for name in expected.keys() - saved.keys():
        raise UserError(f"{where}: {name} is missing")
    for name, value in saved.items():
        if name not in expected:
            raise UserError(f"{where}: {shown(name)} is not of this model")
        check_tensor(value, expected[name].shape, expected[name].dtype, f"{where}: {name}")
    owners: dict[int, str] = {}  # address -> name
    for name, value in saved.items():
        own = local(value)
        owner = owners.setdefault(own.data_ptr(), name)
        if owner != name and own.numel():  # whoever writes one of them would change the other
            raise UserError(f"{where}: {name} and {owner} are one tensor")


def check_tensor(value: Any, shape: Iterable[int], dtype: torch.dtype, where: str) -> None:
    """A UserError where a value is no tensor of this shape and dtype, or one that is not finite."""
    is_plain = isinstance(value, Tensor) and value.layout == torch.strided
    if not is_plain or (value.device.type != "cpu" and not is_distributed(value)):
        found = type(value).__name__
    else:
        found = f"{list(value.shape)} of {value.dtype}"
    expected = f"{list(shape)} of {dtype}"
    if found != expected:
        raise UserError(f"{where} is {found}, expected {expected}")
    if not local(value).isfinite().all():  # of a split state, each rank looks at its rows
        raise UserError(f"{where} holds numbers that are not finite")


def check_optimizers(state: dict, optimizers: list[Optimizer], path: Path) -> None:
    """A UserError where the saved states are not such as these optimizers have."""
    if len(state["optimizers"]) != len(optimizers):
        raise UserError(
            f"{path}: optimizers has {len(state['optimizers'])} entries, expected {len(optimizers)}"
        )
    has_learned = state["step"] > state["skipped"]
    for number, (optimizer, saved) in enumerate(zip(optimizers, state["optimizers"], strict=True)):
        where = f"{path}: optimizers: entry {number}"
        check_fields(saved, {"state": Expected(dict), "param_groups": Expected(list)}, where)
        check_groups(saved["param_groups"], optimizer, f"{where}: param_groups")
        if has_learned and not saved["state"]:
            raise UserError(f"{where}: state is empty, after {state['step']:,} steps")
        check_moments(saved["state"], optimizer, f"{where}: state")


# Options of Muon that its older states lack.
COUNTS = ("rising", "steps")


def check_groups(saved: list, optimizer: Optimizer, where: str) -> None:
    """Check the options of all parameter groups. Their values may differ, but not their kinds."""
    groups = optimizer.state_dict()["param_groups"]
    if len(saved) != len(groups):
        raise UserError(f"{where} has {len(saved)} entries, expected {len(groups)}")
    for number, (was, now) in enumerate(zip(saved, groups, strict=True)):
        check_fields(was, {}, f"{where}: entry {number}")
        for name, value in now.items():
            _check_option(was, name, value, f"{where}: entry {number}: {name}")


def _check_option(group: dict, name: str, now: Any, where: str) -> None:
    """Check one option of a saved group. now: its value in this run"""
    was = group.get(name)
    if name == "params":
        check(was, Expected(list, of=Expected(int)), where)
        if was != now:
            raise UserError(f"{where} is {shown(was)}, expected {shown(now)}")
    elif name in COUNTS:
        check(was, Expected(int, at_least=0, optional=name not in group), where)
    elif now is None or isinstance(now, bool):  # torch adds such options from time to time
        check(was, Expected(bool, optional=True), where)
    elif isinstance(now, tuple):
        numbers: Any = list(was) if isinstance(was, tuple) else was
        check(numbers, Expected(list, of=Expected(float)), where)
        if len(numbers) != len(now):
            raise UserError(f"{where} is {shown(numbers)}, expected {len(now)} numbers")
    else:
        check(was, Expected(float), where)


def check_moments(saved: dict, optimizer: Optimizer, where: str) -> None:
    """Check what an optimizer has kept for its parameters, which are numbered.

    A parameter that never had a gradient has no entry.
    """
    numbered = [(group, p) for group in optimizer.param_groups for p in group["params"]]
    for number, entry in saved.items():
        here = f"{where}: {shown(number)}"
        check(number, Expected(int, at_least=0, at_most=len(numbered) - 1), f"{where}: a key")
        check_fields(entry, {}, here)
        expected = kept_for(optimizer, *numbered[number])
        if entry.keys() != expected.keys():
            names = ", ".join(map(str, entry))[:SHOWN]
            raise UserError(f"{here} holds {names or 'nothing'}, expected {', '.join(expected)}")
        for name, (shape, dtype) in expected.items():
            check_tensor(entry[name], shape, dtype, f"{here}: {name}")


def kept_for(
    optimizer: Optimizer, group: dict, p: Tensor
) -> dict[str, tuple[list[int], torch.dtype]]:
    """Name -> shape and dtype of the tensors that an optimizer keeps for a parameter.

    It is asked: a twin of it takes a step with a tiny parameter, all of whose sizes differ, so that
    each size of what it keeps tells from which one it comes.

        tiny    (2, 3)        keeps rows (2,) and columns (3,)
        p       (448, 32)     keeps rows (448,) and columns (32,)
    """
    tiny = torch.zeros(*range(2, 2 + p.dim()), dtype=p.dtype, requires_grad=True)
    tiny.grad = torch.zeros_like(tiny)
    twin = object.__new__(type(optimizer))
    twin.__dict__ = copy.copy(optimizer.__dict__)
    twin.state = defaultdict(dict)
    twin.param_groups = [group | {"params": [tiny]}]
    twin.step()
    kept = twin.state[tiny].items()
    return {
        name: ([p.shape[size - 2] for size in value.shape], value.dtype) for name, value in kept
    }


def check_random_states(saved: list, on_cuda: bool, where: str) -> None:
    """A UserError where the saved random states are not pairs of one for the CPU and one for the
    GPU, which is None where there was none. There is a pair for each rank.
    """
    if not saved:
        raise UserError(f"{where} is empty, expected the random states of each rank")
    for rank, pair in enumerate(saved):
        try:
            cpu_state, cuda_state = pair
            torch.Generator().set_state(cpu_state)
            if cuda_state is not None and on_cuda:
                torch.Generator("cuda").set_state(cuda_state)
        except (RuntimeError, TypeError, ValueError):
            raise UserError(f"{where}: entry {rank} is no random state") from None
