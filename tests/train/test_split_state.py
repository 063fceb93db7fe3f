"""The state of a split model, as one process meets it: what it refuses, and what is deleted.

Ranks write such states in test_distributed.py; here one is made of a whole one, by hand.
"""

import json
import random
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from nanophi.cli import UserError
from nanophi.train.distributed import ALONE
from nanophi.train.run_files import STATE, split_folder
from nanophi.train.split_state import OFFSETS, checksum, parts_in, places, put_back
from nanophi.train.state import seal
from tests.test_fuzz import mutated_header
from tests.train.test_loop import pretraining, run, state, tensors


def split(out, count=3):
    """Make the state of a run one that so many ranks have written; returns its tensors."""
    saved = state(out)
    folder = split_folder(out, saved["step"])
    folder.mkdir()
    taken = {}
    for name, holder, key in places(saved):
        if holder[key].dim():
            taken[name] = holder[key]
            holder[key] = None
    saved["parts"] = []
    for rank in range(count):
        rows = {name: tensor.chunk(count)[rank:][:1] for name, tensor in taken.items()}
        first = {name: rank * -(-len(tensor) // count) for name, tensor in taken.items()}
        write_part(
            parts_in(folder, count)[rank],
            {name: pair[0].clone() for name, pair in rows.items() if pair},
            {name: [first[name]] + [0] * (taken[name].dim() - 1) for name in taken},
        )
        saved["parts"].append(checksum(parts_in(folder, count)[rank]))
    write_state(out, saved)
    return taken


def write_part(path, rows, offsets):
    places_of = {name: {"saved_offsets": offset} for name, offset in offsets.items()}
    save_file(rows, path, metadata={OFFSETS: json.dumps(places_of)})


def write_state(out, saved):
    torch.save(saved, out / STATE)
    seal(out / STATE)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    run(out, pretraining, stop_at=2, optimizer="adamw")
    return out


@pytest.fixture
def out(whole, tmp_path):
    """A run whose state is split."""
    shutil.copytree(whole, tmp_path / "run")
    split(tmp_path / "run")
    return tmp_path / "run"


def resume(out, **options):
    run(out, pretraining, resume="yes", optimizer="adamw", **{"steps": 4} | options)


def test_a_split_state_is_the_whole_one(whole, out, tmp_path):
    shutil.copytree(whole, tmp_path / "whole")
    resume(out, keep=1)
    resume(tmp_path / "whole")
    found, expected = (tensors(state(folder)) for folder in (out, tmp_path / "whole"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert not list(out.glob("train_state-*"))
    assert len(list((out / "step-000002").glob("train_state-000002/rows-*"))) == 3
    resume(out / "step-000002")  # it is complete


def reseal(out, saved=None):
    """List the checksums of the parts as they are."""
    saved = saved or torch.load(out / STATE, weights_only=True)
    parts = sorted(split_folder(out, 2).iterdir())
    write_state(out, saved | {"parts": [checksum(path) for path in parts]})


def change_part(out, number, change):
    """Change the tensors and the offsets of a part, as somebody would who knows the form."""
    path = parts_in(split_folder(out, 2), 3)[number]
    with safe_open(path, framework="pt") as file:
        rows = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        offsets = json.loads(file.metadata()[OFFSETS])
    offsets = {name: offsets[name]["saved_offsets"] for name in rows}
    change(rows, offsets)
    write_part(path, rows, offsets)
    reseal(out)


HEAD = "model.lm_head.weight"
MOMENT = "optimizers.0.3.exp_avg"


def without(name):
    def change(rows, offsets):
        del rows[name], offsets[name]

    return change


FOREIGN = {
    "rows that are missing": (1, without(HEAD), "its rows in the files do not follow"),
    "the last rows": (2, without(HEAD), r"lm_head.weight is \[.*\] of torch.float32, expected"),
    "rows twice": (1, lambda rows, at: at.update({HEAD: [0, 0]}), "do not follow each other"),
    "another width": (
        1,
        lambda rows, at: rows.update({HEAD: rows[HEAD][:, 1:].clone()}),
        "do not follow each other",
    ),
    "columns": (1, lambda rows, at: at.update({HEAD: [0, 1]}), "are no whole rows"),
    "a number": (
        0,
        lambda rows, at: (rows.update({HEAD: torch.ones(())}), at.update({HEAD: []})),
        "are no whole rows",
    ),
    "an offset of words": (1, lambda rows, at: at.update({HEAD: "x"}), "saved_offsets is"),
    "whole numbers": (
        1,
        lambda rows, at: rows.update({HEAD: rows[HEAD].long()}),
        "is of type I64",
    ),
    "half precision": (
        0,
        lambda rows, at: rows.update({MOMENT: rows[MOMENT].double()}),
        "exp_avg is .* of torch.float64, expected",
    ),
    "nan": (
        2,
        lambda rows, at: rows[MOMENT].fill_(torch.nan),
        "exp_avg holds numbers that are not",
    ),
    "a tensor too many": (
        0,
        lambda rows, at: (rows.update(x=torch.ones(1)), at.update(x=[0])),
        "x has no place in the state",
    ),
}


@pytest.mark.parametrize(("part", "change", "message"), FOREIGN.values(), ids=FOREIGN.keys())
def test_a_foreign_part_is_refused_by_its_tensor(out, part, change, message):
    """With checksums that are right: the files may be anybody's."""
    change_part(out, part, change)
    with pytest.raises(UserError, match=message):
        resume(out)


def test_a_damaged_or_missing_part_is_named(out):
    path = parts_in(split_folder(out, 2), 3)[1]
    raw = path.read_bytes()
    dice = random.Random(0)
    for place in [0, len(raw) - 1, *(dice.randrange(len(raw)) for _ in range(10))]:
        damaged = bytearray(raw)
        damaged[place] ^= 0x40
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"rows-00002-of-00003\.safetensors is damaged"):
            state(out)
    path.write_bytes(raw[:-1])
    with pytest.raises(UserError, match="is damaged"):
        state(out)
    path.unlink()
    with pytest.raises(
        UserError, match=r"rows-00002-of-00003.* is missing; an older state may lie"
    ):
        resume(out)


def test_mutated_headers_give_a_state_or_one_line(out):
    path = parts_in(split_folder(out, 2), 3)[1]
    raw = path.read_bytes()
    saved = torch.load(out / STATE, weights_only=True)
    refused = 0
    for seed in range(150):
        path.write_bytes(mutated_header(raw, random.Random(seed)))
        parts = [checksum(each) for each in sorted(path.parent.iterdir())]
        places_of = {"model": dict(saved["model"]), "optimizers": [], "parts": parts}
        try:
            put_back(places_of, path.parent, {}, ALONE)
        except UserError:
            refused += 1
    assert refused > 50


@pytest.mark.parametrize("parts", [["../x"], ["/etc/passwd"] * 2, [], "../x", [5], {"a": 1}])
def test_the_state_names_no_files(out, parts):
    """The names follow from the step and the number of ranks; the list holds checksums."""
    saved = torch.load(out / STATE, weights_only=True)
    write_state(out, saved | {"parts": parts})
    with pytest.raises(UserError):
        resume(out)


def test_what_a_kill_has_left_goes_and_what_is_the_users_stays(out):
    left = split_folder(out, 3)
    left.mkdir()
    (left / "rows-00001-of-00002.safetensors.4711-1.tmp").write_bytes(b"half")
    (out / "train_state-000009").mkdir()
    mine = [out / "train_state-backup", out / "train_state-000077"]
    for folder in mine:
        folder.mkdir()
        (folder / "notes.txt").write_text("mine")
        (folder / "rows-00001-of-00002.safetensors").write_text("mine")
    resume(out, save_every=1)
    assert sorted(out.glob("train_state-*")) == sorted(mine)
    assert all(len(list(folder.iterdir())) == 2 for folder in mine)


def test_overwrite_deletes_it(out):
    with pytest.raises(UserError, match=r"holds a run \(train_state-000002"):
        run(out, pretraining)
    resume(out, keep=1)
    split(out)
    run(out, pretraining, overwrite=True, stop_at=1)
    assert not list(out.glob("train_state-*"))
    assert not list(out.glob("step-*"))
