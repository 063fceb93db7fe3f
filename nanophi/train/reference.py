"""What the frozen reference of DPO thinks of all answers: computed once, and kept beside the run.

    <out>/reference.pt    log-probabilities, and of which weights, data and dtype they are

A run that is resumed or repeated reads them. Those of another model, of other pairs or of another
dtype are not taken: a note says which of the three differs, and they are computed again.
"""

from pathlib import Path

import torch
from torch import Tensor

from nanophi.cli import Progress, UserError
from nanophi.expect import Expected, check_fields
from nanophi.files import replacing
from nanophi.model.phi import Phi
from nanophi.train.distributed import ALONE, World
from nanophi.train.losses import answer_logps
from nanophi.train.packing import digest
from nanophi.train.preferences import Pairs
from nanophi.train.setup import Setup
from nanophi.train.state import check_tensor, is_whole, seal

REFERENCE = "reference.pt"


def add_reference(model: Phi, parts: list[Pairs], setup: Setup, weights: str) -> None:
    """Fill `reference` of each part of the data, from the file in --out or by the model.

    weights: what `digest_of_weights` gives. All ranks take what rank 0 has read, or each computes
    its share.
    """
    path = Path(setup.cfg.out) / REFERENCE
    of = {
        "weights": weights,
        "data": " ".join(part.data_id for part in parts),
        "dtype": setup.dtype,
    }
    reads = setup.world.first and setup.writes
    kept = read_reference(path, of, [len(part) for part in parts]) if reads else None
    kept = setup.world.gather(kept)[0]
    if kept is None:
        with setup.autocast(cache=True):
            kept = [reference_logps(model, part, setup.micro_batch, setup.world) for part in parts]
        if reads:
            write_reference(path, of, kept)
    for part, logps in zip(parts, kept, strict=True):
        part.reference = logps


def digest_of_weights(model: Phi) -> str:
    """Names the reference: a run can be resumed only with the same one."""
    return digest(*(p.detach().flatten().cpu().view(torch.int32) for p in model.parameters()))


@torch.no_grad()
def reference_logps(model: Phi, data: Pairs, micro_batch: int, world: World = ALONE) -> Tensor:
    """log p(answer | prompt) of both answers of every pair under the frozen reference: (pairs, 2),
    on the CPU.

    world: its ranks take whole micro-batches in turn, and all get the whole. Two ranks and the
    micro-batches 0, 1 and 2: rank 0 computes 0 and 2, rank 1 computes 1
    """
    starts = range(0, len(data), micro_batch)
    own = []
    with Progress("reference", len(data)) as bar:
        for first in starts[world.rank :: world.size]:
            batch = data.batch(range(first, min(first + micro_batch, len(data))))
            own.append(answer_logps(model, batch.to(model.device)).view(-1, 2).cpu())
            bar.update(len(batch) * world.size)
    of_ranks = world.gather(own)
    return torch.cat([of_ranks[n % world.size][n // world.size] for n in range(len(starts))])


# ---- the file


def write_reference(path: Path, of: dict[str, str], logps: list[Tensor]) -> None:
    """Keep log-probabilities. of: the names of weights, data and dtype"""
    with replacing(path) as beside:
        with open(beside, "wb") as file:  # given a path, torch.save would write its name inside
            torch.save({"of": of, "logps": logps}, file)
        seal(beside)


def read_reference(path: Path, of: dict[str, str], sizes: list[int]) -> list[Tensor] | None:
    """The log-probabilities that a file keeps; None where they cannot be taken, and a note says
    why.

    sizes: how many pairs each part of the data has
    """
    if not path.exists():
        return None
    try:
        if not is_whole(path):
            raise UserError(f"{path} is damaged")
        kept = torch.load(path, weights_only=True, map_location="cpu")
        check_fields(kept, {"of": Expected(dict), "logps": Expected(list)}, path)
        different = [name for name, value in of.items() if kept["of"].get(name) != value]
        if different:
            raise UserError(f"{path} is that of other {' and '.join(different)}")
        if len(kept["logps"]) != len(sizes):
            raise UserError(f"{path} has {len(kept['logps'])} parts, expected {len(sizes)}")
        for logps, size in zip(kept["logps"], sizes, strict=True):
            check_tensor(logps, (size, 2), torch.float32, f"{path}: logps")
    except Exception as error:  # foreign bytes raise almost anything
        reason = " ".join(str(error).split())[:200]
        print(f"note: {reason}: what the reference thinks is computed again")
        return None
    print(f"dpo: what the reference thinks of all answers is read from {path}")
    return kept["logps"]
