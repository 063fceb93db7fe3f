"""What follows from the flags of a run. `begin` derives it once.

    setup = begin(cfg)     checks the flags, checks --out, waits for the other ranks
    setup.world            the rank, the number of ranks, the device
    setup.dtype            the dtype of the computation

The scripts begin with it and pass the setup on.
"""

from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch

from nanophi.cli import UserError
from nanophi.expect import check_settings, shown
from nanophi.model.checkpoint import pick_device
from nanophi.train import precision
from nanophi.train.config import TrainConfig
from nanophi.train.distributed import World, join, launch
from nanophi.train.run_files import claim


@dataclass(frozen=True)
class Setup:
    """A run that may begin. Only `begin` makes one."""

    cfg: TrainConfig
    world: World  # rank, number of ranks, device
    dtype: str  # "float32", "bfloat16" or "float16"
    locks: ExitStack = field(default_factory=ExitStack, compare=False, repr=False)  # of --out

    @property
    def writes(self) -> bool:
        """Whether the run keeps anything: the self-tests do not."""
        return not (self.cfg.show_batch or self.cfg.overfit_one_batch)

    @property
    def micro_batch(self) -> int:
        """Samples that a device computes at once."""
        assert self.cfg.micro_batch is not None, "on a GPU preflight.fit finds it"
        return self.cfg.micro_batch

    @property
    def ranks_of_model(self) -> int:
        """Over how many ranks the model is split."""
        return self.world.size if self.cfg.shard else 1

    def changed(self, **values: Any) -> "Setup":
        """The same with other values of the config."""
        return replace(self, cfg=replace(self.cfg, **values))

    def autocast(self, cache: bool = False) -> AbstractContextManager:
        """The context of forward passes; see precision.autocast."""
        return precision.autocast(self.dtype, self.world.device, cache)


def begin(cfg: TrainConfig, resume: str | None = None, starts_from: str | None = None) -> Setup:
    """Check the flags and --out, and meet the other ranks.

    resume:      overrides cfg.resume
    starts_from: the checkpoint to start from. --out must be another directory, and not a parent of
                 it

    Raises one UserError that names all flags which contradict each other.
    """
    if not isinstance(cfg, TrainConfig):
        raise UserError(f"the settings are {shown(cfg)}, expected a TrainConfig")
    if resume is not None:
        cfg = replace(cfg, resume=resume)
    check_settings(cfg)
    device = pick_device(cfg.device)
    problems = contradictions(cfg, device)
    if problems:
        raise UserError("; ".join(problems))
    locks = claim(cfg, starts_from)
    reduce_dtype = torch.bfloat16 if cfg.reduce_dtype == "bfloat16" else None
    world = replace(join(device), reduce_dtype=reduce_dtype)
    on_cuda = world.device.startswith("cuda")
    if cfg.compile is None:
        cfg = replace(cfg, compile=on_cuda)
    if cfg.micro_batch is None and not on_cuda:
        cfg = replace(cfg, micro_batch=MICRO_BATCH)  # on a GPU `preflight.fit` finds one
    return Setup(cfg, world, precision.compute_dtype(cfg.dtype, world.device), locks)


MICRO_BATCH = 8  # of a CPU


def contradictions(cfg: TrainConfig, device: str) -> list[str]:
    """What no run can do: flags that exclude each other, or the device."""
    on_cuda = device.startswith("cuda")
    varlen = cfg.attention == "varlen"
    in_fp32 = varlen and on_cuda and precision.compute_dtype(cfg.dtype, device) == "float32"
    alone = launch().size == 1
    texts = {each.name: getattr(cfg, each.name) for each in fields(cfg)}
    empty = [name for name, text in texts.items() if isinstance(text, str) and not text.strip()]
    rules = [
        *((True, f"--{name.replace('_', '-')} is empty") for name in empty),
        (
            cfg.steps is not None and cfg.epochs is not None,
            "give --steps or --epochs, not both",
        ),
        (
            cfg.resume not in (None, "yes", "auto"),
            f"--resume {cfg.resume}: it stands alone, or is `--resume auto`",
        ),
        (
            cfg.resume == "yes" and cfg.overwrite,
            "--resume goes on with what --overwrite would delete",
        ),
        (
            cfg.show_batch and cfg.overfit_one_batch,
            "--show-batch does not train, --overfit-one-batch does",
        ),
        (
            cfg.shard and alone,
            "--shard splits the model over ranks: start them with torchrun --nproc-per-node N",
        ),
        (
            varlen and not on_cuda,
            f"--attention varlen needs a GPU, and this is {device}",
        ),
        (
            cfg.attention == "documents" and on_cuda,
            "--attention documents waits for the GPU in each layer: leave it out there",
        ),
        (in_fp32, "--attention varlen computes in bfloat16 or float16"),
        (varlen and bool(cfg.dropout), "--attention varlen has no dropout"),
    ]
    return [message for broken, message in rules if broken]
