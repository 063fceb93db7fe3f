"""Which files are a run's, and whether a run may begin in a directory.

`claim` comes first: it refuses a directory in which a run would destroy something, and locks it.

    <out>/                the newest state: a checkpoint directory, train_state.pt, metrics.jsonl,
                          run.json
    <out>/train_state-000600/   the tensors of the newest state, where the model is split
    <out>/step-000500/    an older state, complete
    <out>/best/           the model with the lowest validation loss
    <out>/tensorboard/    curves for TensorBoard, where that is installed
    <out>-early/          the model of --keep-at, whose answers DPO may reject

What else lies in the directory is the user's: it is never deleted, and never taken for a
checkpoint.
"""

import contextlib
import os
import re
from collections.abc import Iterable
from pathlib import Path

from nanophi.claims import Lock, Output, refuse
from nanophi.cli import UserError, is_first_rank
from nanophi.files import OWN_NAMES, READY, TEMPORARY, finish, remove_leftovers
from nanophi.model import checkpoint
from nanophi.train.config import TrainConfig
from nanophi.train.faults import BAD_BATCH
from nanophi.train.mixture import parse_mixture

STATE = "train_state.pt"
METRICS = "metrics.jsonl"
BOARD = "tensorboard"
CONFIG = "config.json"
TOKENIZER = "tokenizer.json"
MODEL_FILES = (checkpoint.WEIGHTS, checkpoint.WEIGHTS_INDEX, CONFIG)


# ---- may the directory be written?


def claim(cfg: TrainConfig, starts_from: str | None = None) -> contextlib.ExitStack:
    """Refuse an --out that must not be written, or lock it; returns the locks, to be closed.

    It must not hold a run, unless that run is resumed or overwritten; and it must be no input, such
    as `starts_from`, the checkpoint to start from, nor a parent of that. The same goes for
    <out>-early, which --keep-at writes.
    """
    if not is_first_rank() or cfg.show_batch or cfg.overfit_one_batch:
        # What rank 0 has begun to write would look like another run; the self-tests write nothing.
        return contextlib.ExitStack()
    out = Path(cfg.out)
    early = None if cfg.keep_at is None else early_of(out)
    inputs = inputs_of(cfg, starts_from)
    read = {os.path.realpath(path) for _, path in inputs}
    names = tuple(OWN_NAMES)
    written = [
        Output("--out", cfg.out, folder=True, files=names),
        Output("--keep-at", early, folder=True, files=names),
    ]
    with contextlib.ExitStack() as locks:
        for output in written:
            if output.path is not None:
                refuse(output, read)
                refuse_inputs(output, inputs)
        for output in written:
            if output.path is not None:
                locks.callback(Lock(Path(output.path), folder=True).release)
                tidy(Path(output.path))
        refuse_what_is_there(cfg, out)
        if early is not None:
            refuse_what_is_early(cfg, early)
        return locks.pop_all()


def early_of(out: Path) -> Path:
    """Where --keep-at keeps its model.

    >>> early_of(Path("out/sft/")).as_posix()
    'out/sft-early'
    """
    return Path(f"{out}-early")


MIXTURES = {"data", "pretrain_data"}  # flags that name several directories in one text


def inputs_of(cfg: TrainConfig, starts_from: str | None) -> list[tuple[str, str]]:
    """The files and directories that a run reads, each behind its flag."""
    found = [] if starts_from is None else [("--init-from", starts_from)]
    for name in ("tokenizer", "data", "val_data", "pretrain_data"):
        value = getattr(cfg, name, None) or []
        if isinstance(value, str):
            value = parse_mixture(value) if name in MIXTURES else [value]
        found += [(f"--{name.replace('_', '-')}", path) for path in value]
    return found


def refuse_inputs(output: Output, inputs: Iterable[tuple[str, str]]) -> None:
    """Refuse a directory that is an input, or in whose parts an input lies."""
    directory = Path(os.path.realpath(str(output.path)))
    for flag_name, path in inputs:
        real = Path(os.path.realpath(path))
        if not real.is_relative_to(directory):
            continue
        below = real.relative_to(directory).parts
        # Data may lie beside the files of a run, but not in a part that a run deletes.
        if flag_name == "--init-from" or not below or is_part_of_a_run(below[0]):
            raise UserError(
                f"{output.flag} {output.path} is or holds {flag_name} {path}: training would "
                "overwrite what it starts from"
            )


def is_part_of_a_run(name: str) -> bool:
    """Whether a run writes a directory of this name.

    >>> is_part_of_a_run("step-000500"), is_part_of_a_run("rows")
    (True, False)
    """
    return name in ("best", BOARD) or bool(STEP.fullmatch(name) or SPLIT.fullmatch(name))


def refuse_what_is_there(cfg: TrainConfig, out: Path) -> None:
    """Refuse an --out that holds a run, unless it is resumed or overwritten."""
    refuse_a_tokenizer("--out", out)
    present = [path.name for path in files_of_a_run(out)]
    models = [name for name in present if name in MODEL_FILES or STEP.fullmatch(name)]
    if cfg.resume == "yes" and STATE not in present:
        raise UserError(f"nothing to resume in {out}: no {STATE}; --resume auto would start afresh")
    if cfg.resume == "auto" and models and STATE not in present and not cfg.overwrite:
        raise UserError(
            f"{out} holds {models[0]} without a {STATE}: there is nothing to resume, "
            "name another --out"
        )
    if cfg.resume is None and present and not cfg.overwrite:
        raise UserError(
            f"{out} holds a run ({', '.join(present)}): --resume goes on with it, "
            "--overwrite deletes it"
        )


def refuse_what_is_early(cfg: TrainConfig, early: Path) -> None:
    """Refuse an <out>-early that holds a run of its own, or a model that is not this run's."""
    refuse_a_tokenizer("--keep-at", early)
    present = [path.name for path in files_of_a_run(early)]
    of_a_run = [name for name in present if name not in (*MODEL_FILES, TOKENIZER)]
    if of_a_run:
        raise UserError(
            f"--keep-at would write its model into {early}, which holds a run of its own "
            f"({', '.join(of_a_run)}): name another --out"
        )
    is_resumed = cfg.resume is not None and (Path(cfg.out) / STATE).exists()
    if present and not cfg.overwrite and not is_resumed:
        raise UserError(
            f"--keep-at would write its model into {early}, which holds one: --overwrite replaces "
            "it, or name another --out"
        )


def refuse_a_tokenizer(flag_name: str, directory: Path) -> None:
    """Refuse a directory that holds a tokenizer alone: the model's would replace it."""
    beside = [(directory / name).exists() for name in (*MODEL_FILES, STATE)]
    if (directory / TOKENIZER).exists() and not any(beside):
        raise UserError(
            f"{flag_name} {directory} holds a tokenizer ({TOKENIZER}), which that of the model "
            "would replace: name another --out"
        )


# ---- what belongs to a run, and what is the user's

STEP = re.compile(r"step-[0-9]+")
SPLIT = re.compile(r"train_state-[0-9]{6,}")
ROWS = re.compile(r"rows-[0-9]{5,}-of-[0-9]{5,}\.safetensors")
BEING_LINKED = re.compile(r"step-[0-9]+(\.[0-9]+-[0-9]+)?\.tmp")  # an older state, half made
EVENTS = "events.out.tfevents"  # how the names of TensorBoard's files begin


def files_of_a_run(out: Path) -> list[Path]:
    """The files and directories of a run that are there. The state comes last, so that a deletion
    that is interrupted is still seen.
    """
    found = older_states(out) + split_folders(out)
    if is_checkpoint(out / "best"):
        found.append(out / "best")
    if is_folder(out / BOARD) and any((out / BOARD).glob(f"{EVENTS}*")):
        found.append(out / BOARD)
    names = (METRICS, BAD_BATCH, TOKENIZER, *MODEL_FILES, STATE)
    return found + [out / name for name in names if (out / name).is_file()]


def older_states(out: Path) -> list[Path]:
    """The directories step-... of a run, oldest first. step-backup is a user's, and so is a file
    step-5, or a directory step-5 without a model.
    """
    found = [path for path in out.glob("step-*") if STEP.fullmatch(path.name)]
    return sorted(filter(is_checkpoint, found), key=lambda path: int(path.name[len("step-") :]))


def split_folder(out: Path, step: int) -> Path:
    """Where the tensors of a split model's state lie.

    >>> split_folder(Path("out"), 500).as_posix()
    'out/train_state-000500'
    """
    return out / f"train_state-{step:06d}"


def split_folders(out: Path) -> list[Path]:
    """The directories train_state-... of a run. An empty one is what a kill has left."""
    found = [path for path in out.glob("train_state-*") if SPLIT.fullmatch(path.name)]
    return [path for path in found if is_folder(path) and all(map(is_part, path.iterdir()))]


def is_part(path: Path) -> bool:
    return bool(ROWS.fullmatch(TEMPORARY.sub("", path.name)))


def delete_parts(out: Path, keep: list[Path]) -> None:
    """Delete the files of split states but those of one.

    Where a set of renames is not done yet, the train_state.pt among them may need the others.
    """
    if (out / READY).exists():
        return
    for folder in split_folders(out):
        for path in list(folder.iterdir()):
            if path not in keep:
                path.unlink()
        with contextlib.suppress(OSError):  # it is not empty
            folder.rmdir()


def is_checkpoint(path: Path) -> bool:
    return is_folder(path) and ((path / CONFIG).exists() or (path / STATE).exists())


def is_folder(path: Path) -> bool:
    """Whether a path is a directory and no link to one: what a link points to is not deleted."""
    return path.is_dir() and not path.is_symlink()


def is_own(name: str) -> bool:
    """Whether a file of this name is one that runs write.

    >>> is_own("config.json"), is_own("config.json.4711-1.tmp"), is_own("notes.txt")
    (True, True, False)
    """
    name = TEMPORARY.sub("", name)
    is_known = name in OWN_NAMES or name in (READY, BAD_BATCH) or name.startswith(EVENTS)
    return is_known or bool(ROWS.fullmatch(name))


def delete_run(out: Path) -> None:
    """Delete what `files_of_a_run` names."""
    for path in files_of_a_run(out):
        if path.is_dir():
            delete_folder(path)
        else:
            path.unlink()


def delete_folder(folder: Path) -> None:
    """Delete the files of a run in a folder; and the folder, unless it holds files of the user."""
    for inner in split_folders(folder):
        delete_folder(inner)
    own = [path for path in folder.iterdir() if is_own(path.name) and path.is_file()]
    # What shows that it is a checkpoint goes last: a deletion that is interrupted is done again.
    for path in sorted(own, key=lambda path: path.name in (CONFIG, STATE)):
        path.unlink()
    with contextlib.suppress(OSError):  # it is not empty
        folder.rmdir()


def tidy(directory: Path) -> None:
    """Complete, or remove, what a killed run has left half done."""
    for folder in (directory, directory / "best"):
        finish(folder)
        for name in (*OWN_NAMES, READY, BAD_BATCH):
            remove_leftovers(folder / name)
    for path in directory.glob("step-*.tmp"):
        is_ours = BEING_LINKED.fullmatch(path.name) and is_folder(path)
        if is_ours and all(is_own(p.name) or SPLIT.fullmatch(p.name) for p in path.iterdir()):
            delete_folder(path)
