"""The directory of a run: what may be written there, what is the user's, what a state must hold."""

import fcntl
import json
import math
import random
import sys
from pathlib import Path

import pytest
import torch

import sft
from nanophi.cli import UserError
from nanophi.model import checkpoint
from nanophi.train.run_files import METRICS, STATE
from nanophi.train.rundir import RunDirectory
from nanophi.train.state import is_whole, read_state, seal
from tests.conftest import SFT, tiny_model, write
from tests.train.test_loop import pretraining, run, state, tensors


def files(folder) -> dict[str, bytes]:
    found = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path): path.read_bytes() for path in found}


# ---- what may be written


def test_the_second_run_is_told_who_writes(tmp_path):
    """Two `sft` into one directory both trained, and metrics.jsonl had 32 lines of 20 steps."""
    with open(tmp_path / ".lock", "w") as file:
        file.write("4711\n")
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX)
        for flags in ({}, {"resume": "auto"}, {"overwrite": True}):
            with pytest.raises(UserError, match="is being written by process 4711"):
                run(tmp_path, pretraining, **flags)
    run(tmp_path, pretraining, steps=1)
    assert not (tmp_path / ".lock").exists()


def sft_config(house, out, **changes):
    return sft.Config(
        **{"init_from": f"{house}/pretrain", "data": [f"{house}/sft.jsonl"], "out": str(out)}
        | {"steps": 1, "warmup": 0, "batch_tokens": 128, "device": "cpu"}
        | changes
    )


def test_the_early_model_overwrites_neither_its_origin_nor_another_run(house, tmp_path):
    """`sft --init-from X-early --out X --keep-at 0.5` trained over the checkpoint it began from;
    a run in X-early kept its old state and got new weights.
    """
    sft.main(sft_config(house, tmp_path / "x-early"))
    before = files(tmp_path)
    cfg = sft_config(house, tmp_path / "x", init_from=f"{tmp_path}/x-early", keep_at=0.5)
    with pytest.raises(UserError, match=r"--keep-at .*x-early is or holds --init-from"):
        sft.main(cfg)
    with pytest.raises(UserError, match=r"x-early, which holds a run of its own"):
        sft.main(sft_config(house, tmp_path / "x", keep_at=0.5))
    assert {path: files(tmp_path)[path] for path in before} == before


def test_a_run_does_not_go_into_a_tokenizer_or_over_its_data(house, tmp_path, tok):
    tok.save(tmp_path / "tokenizer")
    with pytest.raises(UserError, match="holds a tokenizer"):
        run(tmp_path / "tokenizer", pretraining, steps=1)
    data = write(tmp_path / "rows.jsonl", SFT)
    (tmp_path / "best").mkdir()
    inner = write(tmp_path / "best" / "rows.jsonl", SFT)
    with pytest.raises(UserError, match="is or holds --data"):
        sft.main(sft_config(house, tmp_path, data=[inner]))
    sft.main(sft_config(house, tmp_path, data=[data]))  # beside the files of the run it may lie


def test_what_only_looks_like_a_checkpoint_is_the_users(tmp_path):
    """`step-backup` ended a resumed run at its first save; a folder `step-5` was deleted."""
    run(tmp_path, pretraining, stop_at=2)
    for name in ("step-backup", "step-000030.bak", "step-5"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "notes.txt").write_text(name)
    (tmp_path / "step-6").write_text("a file")
    (tmp_path / "step-7.tmp").mkdir()
    (tmp_path / "step-7.tmp" / "mine.txt").write_text("mine")
    mine = files(tmp_path)
    run(tmp_path, pretraining, resume="yes", save_every=1, steps=5)
    run(tmp_path, pretraining, overwrite=True, steps=2)
    after = files(tmp_path)
    for path, content in mine.items():
        if "step-" in path:
            assert after[path] == content


# ---- resuming


def test_another_micro_batch_under_dropout_is_refused(tmp_path):
    """It was accepted, and gave another model."""
    run(tmp_path / "dropout", pretraining, stop_at=2)
    with pytest.raises(UserError, match="--micro-batch was 8, is 1, and with dropout"):
        run(tmp_path / "dropout", pretraining, resume="yes", micro_batch=1)
    run(tmp_path / "none", pretraining, tiny_model(), stop_at=2)
    run(tmp_path / "none", pretraining, tiny_model(), resume="yes", micro_batch=1, steps=3)


def test_an_early_model_that_is_past_is_said(tmp_path, capsys):
    """`--resume --keep-at 0.01` wrote nothing, without a word."""
    out = tmp_path / "run"
    run(out, pretraining, stop_at=4)
    run(out, pretraining, resume="yes", keep_at=0.1, steps=20, stop_at=5)
    assert "--keep-at 0.1 is step 2, which is past" in capsys.readouterr().out
    run(out, pretraining, resume="yes", keep_at=0.25, steps=20, stop_at=6)  # step 5: it begins here
    assert (tmp_path / "run-early" / "config.json").exists()


@pytest.mark.parametrize("line", [b"5", b"{}", b"\xff", b'{"step": "x"}', b"[" * 100_000])
def test_damaged_metrics_do_not_stop_a_resumed_run(tmp_path, line, capsys):
    run(tmp_path, pretraining, stop_at=2)
    lines = (tmp_path / METRICS).read_bytes()
    (tmp_path / METRICS).write_bytes(line + b"\n" + lines)
    run(tmp_path, pretraining, resume="yes", steps=3)
    assert "1 of its lines (the first is line 1) cannot be read" in capsys.readouterr().out
    steps = [json.loads(line)["step"] for line in (tmp_path / METRICS).read_bytes().splitlines()]
    assert steps == [1, 2, 3]


# ---- the state


def test_one_flipped_bit_is_noticed(tmp_path):
    """Twelve of twelve flipped states were resumed: torch.load does not look at the checksums of
    the zip file.
    """
    run(tmp_path, pretraining, stop_at=1)
    path = tmp_path / STATE
    whole = path.read_bytes()
    dice = random.Random(0)
    for place in [0, len(whole) - 1, *(dice.randrange(len(whole)) for _ in range(30))]:
        damaged = bytearray(whole)
        damaged[place] ^= 0x40
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"train_state\.pt is damaged"):
            read_state(path)
    path.write_bytes(whole)
    assert read_state(path)["step"] == 1


def mapped(path) -> list[range]:
    """The addresses at which a file lies in memory, also one that has been replaced since."""
    found = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if str(path) in line:
            begin, end = line.split()[0].split("-")
            found.append(range(int(begin, 16), int(end, 16)))
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc")
@pytest.mark.parametrize("optimizer", ["muon", "adamw", "adafactor"])
def test_a_state_is_mapped_and_nothing_of_it_stays(tmp_path, optimizer, monkeypatch):
    """Each of eight ranks read 24 GB into memory of its own. What a run keeps is its own: otherwise
    it would hold on to the file of a state that is long replaced.
    """
    run(tmp_path, pretraining, stop_at=1, optimizer=optimizer)
    path = tmp_path / STATE
    saved = read_state(path)
    found = tensors([saved["model"], saved["optimizers"]]).values()
    assert len(found) > 40
    (file,) = mapped(path)
    assert all(t.data_ptr() in file for t in found)
    del saved, found
    assert not mapped(path)

    restored = []
    restore = RunDirectory.restore

    def watched(self, steps):
        restore(self, steps)
        restored.append(self)
        assert not mapped(path)

    monkeypatch.setattr(RunDirectory, "restore", watched)
    run(tmp_path, pretraining, resume="yes", stop_at=2, optimizer=optimizer)
    assert len(restored) == 1


def test_a_state_without_a_seal_is_read(tmp_path):
    """An older version wrote none."""
    run(tmp_path, pretraining, stop_at=1)
    torch.save(state(tmp_path), tmp_path / STATE)
    run(tmp_path, pretraining, resume="yes", steps=2)
    torch.save(state(tmp_path), tmp_path / "other.pt")
    assert is_whole(tmp_path / "other.pt")
    (tmp_path / "other.pt").write_bytes((tmp_path / "other.pt").read_bytes()[:-1])
    assert not is_whole(tmp_path / "other.pt")


def shared(saved):
    layer = "model.layers.0"
    saved["model"][f"{layer}.mlp.fc2.bias"] = saved["model"][f"{layer}.self_attn.dense.bias"]


BROKEN = {
    "a list": (lambda s: [s], "what it holds is"),
    "a step alone": (lambda s: {"step": 1}, "tokens is missing"),
    "no model": (lambda s: s | {"model": {}}, "is missing"),
    "a tensor too many": (lambda s: s["model"].update(x=torch.zeros(1)), '"x" is not of this'),
    "a misshapen tensor": (
        lambda s: s["model"].update({"lm_head.bias": torch.zeros(3)}),
        r"lm_head.bias is \[3\] of torch.float32, expected",
    ),
    "numbers that are not finite": (
        lambda s: s["model"]["lm_head.bias"].fill_(math.nan),
        "lm_head.bias holds numbers that are not finite",
    ),
    "one tensor for two": (shared, "are one tensor"),
    "no optimizers": (lambda s: s | {"optimizers": []}, "optimizers has 0 entries"),
    "moments of nothing": (lambda s: s["optimizers"][0]["state"].clear(), "state is empty"),
    "no random states": (lambda s: s | {"rng": []}, "rng is empty"),
    "no random state": (lambda s: s | {"rng": ["bad"]}, "entry 0 is no random state"),
    "a scale of words": (lambda s: s | {"scale": ["x", 1]}, "scale"),
    "settings": (lambda s: s | {"settings": {"lr": 5}}, "settings: lr is 5, expected a string"),
    "best": (lambda s: s | {"best": "low"}, "best"),
}


@pytest.mark.parametrize(("change", "message"), BROKEN.values(), ids=BROKEN.keys())
def test_a_foreign_state_is_refused_by_its_field(tmp_path, change, message):
    """29 such states ended in tracebacks, and an empty rng was resumed without a word."""
    run(tmp_path, pretraining, stop_at=1)
    saved = state(tmp_path)
    changed = change(saved)
    torch.save(changed if isinstance(changed, dict | list) else saved, tmp_path / STATE)
    seal(tmp_path / STATE)
    before = files(tmp_path)
    with pytest.raises(UserError, match=message):
        run(tmp_path, pretraining, resume="yes", steps=2)
    assert files(tmp_path) == before


def test_what_is_no_state_at_all_is_refused(tmp_path):
    run(tmp_path, pretraining, stop_at=1)
    for raw in (b"", b"hello world", b"PK\x05\x06" + bytes(18), b"\x80\x04N."):
        (tmp_path / STATE).write_bytes(raw)
        with pytest.raises(UserError, match=r"train_state\.pt is damaged"):
            run(tmp_path, pretraining, resume="yes", steps=2)


def test_older_states_keep_their_own_content(tmp_path):
    """They are links; where `out` itself holds a link to a file elsewhere, the file is linked and
    not the link.
    """
    run(tmp_path, pretraining, stop_at=2)
    first = tensors(state(tmp_path)["model"])
    weights = tmp_path / checkpoint.WEIGHTS
    weights.rename(tmp_path / "elsewhere")
    weights.symlink_to(tmp_path / "elsewhere")
    run(tmp_path, pretraining, resume="yes", steps=4)
    kept = tensors(state(tmp_path / "step-000002")["model"])
    assert all(torch.equal(kept[name], value) for name, value in first.items())
    assert not (tmp_path / "step-000002" / checkpoint.WEIGHTS).is_symlink()
