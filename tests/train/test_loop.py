"""The loop: exact resume for every stage, interrupts, kills, and what it refuses."""

import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from nanophi.cli import UserError
from nanophi.train.config import TrainConfig, total_steps
from nanophi.train.distributed import ALONE
from nanophi.train.loop import train
from nanophi.train.losses import answer_logps, make_dpo_loss_fn, next_token_loss
from nanophi.train.packing import Packed
from nanophi.train.preferences import Pairs, Preference
from nanophi.train.run_files import STATE, split_folder
from nanophi.train.split_state import put_back
from nanophi.train.step import training_step
from tests.conftest import tiny_model

ROOT = Path(__file__).resolve().parents[2]


def random_documents(n=40, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(7, 400, size=rng.integers(3, 50)) for _ in range(n)]


def random_pairs(count=7, seed=0, longest_prompt=9):
    """Preference pairs of a few tokens."""
    dice = random.Random(seed)

    def words(count):
        return [dice.randrange(7, 400) for _ in range(count)]

    def side(prompt, answer):
        return prompt + answer, [False] * len(prompt) + [True] * len(answer)

    pairs = []
    for _ in range(count):
        prompt = words(dice.randrange(1, longest_prompt))
        sides = [side(prompt, words(dice.randrange(1, 9))) for _ in range(2)]
        pairs.append(Preference(*sides))
    return pairs


def config(out, **changes) -> TrainConfig:
    return TrainConfig(
        **{"out": str(out), "steps": 20, "save_every": 7, "warmup": 3, "device": "cpu"} | changes
    )


def pretraining(model):
    return next_token_loss, Packed(random_documents(), 32, 4, seed=1)


def fine_tuning(model):
    documents = random_documents()
    masks = [np.arange(len(d)) >= len(d) // 2 for d in documents]
    return next_token_loss, Packed(documents, 64, 4, 1, masks)


def preferences(model):
    sides = [(d.tolist(), [i >= 2 for i in range(len(d))]) for d in random_documents()]
    data = Pairs(
        [Preference(*pair) for pair in zip(sides[::2], sides[1::2], strict=True)], 4, seed=1
    )
    with torch.no_grad():
        data.reference = answer_logps(model, data.batch(range(len(data)))).view(-1, 2)
    return make_dpo_loss_fn(0.1), data


def run(out, stage, model=None, **changes):
    stop_at = changes.pop("stop_at", None)
    model = model or tiny_model(
        resid_pdrop=0.1
    )  # dropout: the random generator is part of the state
    loss_fn, data = stage(model)
    return train(
        model, loss_fn, data.batch_at, config(out, **changes), data_id=data.data_id, stop_at=stop_at
    )


def state(out):
    """What a run has saved, also one whose model was split."""
    saved = torch.load(Path(out) / STATE, weights_only=True)
    put_back(saved, split_folder(Path(out), saved["step"]), {}, ALONE)
    return saved


def tensors(value, path=""):
    """Every tensor of a nested state, by its path."""
    if isinstance(value, torch.Tensor):
        return {path: value}
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list | tuple)
        else ()
    )
    return {name: t for key, inner in items for name, t in tensors(inner, f"{path}/{key}").items()}


@pytest.mark.parametrize("optimizer", ["muon", "adamw", "adafactor"])
@pytest.mark.parametrize("stage", [pretraining, fine_tuning, preferences])
def test_stopped_and_resumed_equals_unbroken(stage, optimizer, tmp_path):
    run(tmp_path / "unbroken", stage, optimizer=optimizer)
    run(tmp_path / "broken", stage, optimizer=optimizer, stop_at=10)
    assert state(tmp_path / "broken")["step"] == 10
    run(tmp_path / "broken", stage, optimizer=optimizer, resume="yes")
    unbroken, resumed = tensors(state(tmp_path / "unbroken")), tensors(state(tmp_path / "broken"))
    assert unbroken.keys() == resumed.keys()
    assert len(unbroken) > 60
    assert [name for name in unbroken if not torch.equal(unbroken[name], resumed[name])] == []
    weights = [
        (tmp_path / name / "model.safetensors").read_bytes() for name in ("unbroken", "broken")
    ]
    assert weights[0] == weights[1]
    losses = [
        [
            json.loads(line)["loss"]
            for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        ]
        for name in ("unbroken", "broken")
    ]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 20


def test_training_learns(tmp_path):
    run(tmp_path, pretraining, steps=60, lr=1e-2)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["loss"] > 6
    assert lines[-1]["loss"] < 4
    assert lines[-1]["tokens"] == sum(
        Packed(random_documents(), 32, 4, 1).batch_at(i).real_tokens for i in range(60)
    )
    assert list(lines[0]) == [
        "step",
        "tokens",
        "loss",
        "lr",
        "grad_norm",
        "tokens_per_s",
        "seconds",
        "skipped",
        "memory_gb",
    ]


def test_dpo_logs_rewards_and_widens_the_margin(tmp_path):
    run(tmp_path, preferences, steps=30, lr=1e-3)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["loss"] == pytest.approx(np.log(2), abs=0.05)  # dropout is on
    assert lines[-1]["margin"] > 0.5
    assert {"rewards_chosen", "rewards_rejected", "accuracy"} <= set(lines[0])


def test_a_run_too_short_to_learn_is_said(capsys):
    """A small text with the default batch gave six steps, all of them warm-up, and a model that had
    learned nothing.
    """
    assert total_steps(config("x", steps=None, epochs=2.0, warmup=20), steps_per_epoch=3.2) == 6
    assert "6 steps end within the warm-up of 20" in capsys.readouterr().out
    assert total_steps(config("x", steps=30, warmup=20), 1) == 30
    assert capsys.readouterr().out == ""


def test_micro_batches_do_not_change_the_result():
    """An average of averages would weigh the tokens of a short micro-batch more."""
    model = tiny_model()
    for stage in (fine_tuning, preferences):
        loss_fn, data = stage(model)
        found = []
        for micro_batch in (4, 3, 1):
            result = training_step(model, [], loss_fn, data.batch_at(0), micro_batch, ALONE)
            found.append((result.means, [p.grad.clone() for p in model.parameters()]))
        for line, grads in found[1:]:
            assert line == pytest.approx(found[0][0], rel=1e-5, abs=1e-6)
            torch.testing.assert_close(grads, found[0][1], rtol=1e-4, atol=1e-6)


def test_older_checkpoints_are_complete_and_few(tmp_path):
    run(tmp_path, pretraining, keep=2)
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-000007", "step-000014"]
    old = tmp_path / "step-000014"
    assert state(old)["step"] == 14
    assert len((old / "metrics.jsonl").read_text().splitlines()) == 14
    run(tmp_path / "again", pretraining, stop_at=14)
    assert (old / "model.safetensors").read_bytes() == (
        tmp_path / "again" / "model.safetensors"
    ).read_bytes()


def test_best_is_kept_and_validation_logged(tmp_path):
    losses = iter([3.0, 1.0, 2.0])
    model = tiny_model()
    loss_fn, data = pretraining(model)
    cfg = config(tmp_path, steps=6, eval_every=2)
    train(
        model,
        loss_fn,
        data.batch_at,
        cfg,
        evaluate=lambda m: {"val_loss": next(losses), "val_bits_per_byte": 1.0},
    )
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line.get("val_loss") for line in lines] == [None, 3.0, None, 1.0, None, 2.0]
    run(tmp_path / "four", pretraining, tiny_model(), steps=6, stop_at=4)
    best = (tmp_path / "best" / "model.safetensors").read_bytes()
    assert best == (tmp_path / "four" / "model.safetensors").read_bytes()
    assert state(tmp_path)["best"] == 1.0


def test_a_run_is_not_overwritten_by_accident(tmp_path):
    run(tmp_path, pretraining, steps=2)
    with pytest.raises(UserError, match="--resume goes on with it, --overwrite deletes it"):
        run(tmp_path, pretraining, steps=2)
    run(tmp_path, pretraining, steps=3, overwrite=True)
    assert state(tmp_path)["step"] == 3


def test_resume_needs_a_state_and_auto_does_not(tmp_path):
    with pytest.raises(UserError, match="nothing to resume"):
        run(tmp_path, pretraining, resume="yes")
    run(tmp_path, pretraining, steps=2, resume="auto")
    with pytest.raises(UserError, match="--resume maybe"):
        run(tmp_path, pretraining, resume="maybe")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": 0.5}, r"lr was 0\.002, is 0\.5"),
        (
            {"optimizer": "adamw", "weight_decay": 0.0},
            r"optimizer was muon, is adamw; weight_decay was 0\.1, is 0\.0",
        ),
        (
            {"model": tiny_model(num_hidden_layers=1, resid_pdrop=0.1)},
            "model was .*num_hidden_layers=2",
        ),
        ({"steps": 1}, "at step 2, beyond the 1 asked for"),
        ({"stage": fine_tuning}, "data was .*, is "),
    ],
)
def test_what_would_give_another_model_is_not_resumed(changes, message, tmp_path):
    """A forgotten --epochs ended in success with half a model, another --weight-decay was ignored
    in silence.
    """
    run(tmp_path, pretraining, stop_at=2)
    before = (tmp_path / STATE).read_bytes()
    with pytest.raises(UserError, match=message):
        run(tmp_path, **{"stage": pretraining} | changes, resume="yes")
    assert (tmp_path / STATE).read_bytes() == before
    run(tmp_path, pretraining, resume="yes", recompute=True, save_every=3, steps=3)  # may differ


def test_the_loop_is_the_loop_written_out(tmp_path):
    """Schedule, clipping and weight decay as ten plain lines have them; nothing else happens to the
    weights.

    In fp64: AdamW makes a step of any gradient, so where one is zero but for rounding, in fp32 two
    libraries part.
    """
    ours, plain = tiny_model().double(), tiny_model().double()
    cfg = config(
        tmp_path, steps=6, optimizer="adamw", lr=3e-3, clip=0.5, schedule="cosine", warmup=2
    )
    data = Packed(random_documents(), 32, 4, seed=1)
    train(ours, next_token_loss, data.batch_at, cfg)
    matrices, vectors = (
        [p for p in plain.parameters() if (p.dim() > 1) == wide] for wide in (True, False)
    )
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95))
    for step, factor in enumerate([0.5, 1.0, 1.0, 0.5 + 0.5 * 2**-0.5, 0.5, 0.5 - 0.5 * 2**-0.5]):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * factor
        batch = data.batch_at(step)
        logits = plain(batch.ids, batch.cu_seqlens)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        assert torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5) > 0.5  # so that it does clip
        optimizer.step()
    start = dict(tiny_model().named_parameters())
    for (name, a), b in zip(ours.named_parameters(), plain.parameters(), strict=True):
        assert (a - b).norm() < 1e-8 * (b - start[name]).norm(), name


def test_bf16_computes_in_bf16_and_keeps_fp32_weights(tmp_path):
    losses = []
    for dtype in ("float32", "bfloat16"):
        model = run(tmp_path / dtype, pretraining, tiny_model(), dtype=dtype, steps=3)
        assert all(p.dtype == torch.float32 for p in model.parameters())
        losses.append(
            json.loads((tmp_path / dtype / "metrics.jsonl").read_text().splitlines()[0])["loss"]
        )
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)


def test_the_seed_reaches_dropout_and_the_callers_config_stays(tmp_path):
    weights = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        model = run(tmp_path / name, pretraining, seed=seed, steps=2)
        weights.append(model.lm_head.weight.detach().clone())
        torch.rand(7)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    cfg = config(tmp_path / "d", steps=1)
    loss_fn, data = pretraining(None)
    train(tiny_model(), loss_fn, data.batch_at, cfg, resume="auto")
    assert cfg.resume is None


def test_leftovers_of_an_interrupted_deletion_are_still_a_run(tmp_path):
    """Only step-000900 was left; the new run was let in, and rotated its own checkpoints away
    behind it.
    """
    run(tmp_path, pretraining, steps=9)
    for path in tmp_path.iterdir():
        if path.name != "step-000007":
            path.unlink()
    with pytest.raises(UserError, match=r"holds a run \(step-000007\)"):
        run(tmp_path, pretraining)
    run(tmp_path, pretraining, steps=5, save_every=2, overwrite=True)
    assert [p.name for p in tmp_path.glob("step-*")] == ["step-000004"]


def test_a_shipped_model_is_not_trained_over_by_resume_auto(tmp_path):
    run(tmp_path, pretraining, steps=2)
    (tmp_path / STATE).unlink()  # "deleting it ships the model"
    with pytest.raises(UserError, match=r"holds model\.safetensors without a train_state"):
        run(tmp_path, pretraining, resume="auto")


def test_a_damaged_state_and_a_full_disk_are_said(tmp_path):
    import resource

    run(tmp_path, pretraining, stop_at=2)
    whole = (tmp_path / STATE).read_bytes()
    (tmp_path / STATE).write_bytes(whole[:5000])
    with pytest.raises(UserError, match=r"train_state\.pt is damaged"):
        run(tmp_path, pretraining, resume="yes")
    (tmp_path / STATE).write_bytes(whole)
    old_limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    for limit, message in (
        (100_000, "cannot write .*model.safetensors"),
        (200_000, "cannot write .*train_state.pt"),
    ):
        resource.setrlimit(
            resource.RLIMIT_FSIZE, (limit, old_limit[1])
        )  # fails as a full disk does
        try:
            with pytest.raises(UserError, match=message):
                run(tmp_path, pretraining, resume="yes")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, old_limit)
    signal.signal(signal.SIGXFSZ, handler)
    assert (tmp_path / STATE).read_bytes() == whole
    run(tmp_path, pretraining, resume="yes")


SCRIPT = """
    import sys, time
    from tests.train.test_loop import *
    torch.set_num_threads(1)
    out, slow = sys.argv[1], float(sys.argv[2])
    model = tiny_model(resid_pdrop=0.1)
    loss_fn, data = pretraining(model)
    def batch_at(step):
        time.sleep(slow)
        return data.batch_at(step)
    if len(sys.argv) > 3:  # dawdle within each write of a checkpoint, to be killed there
        import nanophi.files
        replace = nanophi.files.os.replace
        def dawdling(a, b):
            print("writing", flush=True); time.sleep(float(sys.argv[3])); replace(a, b)
        nanophi.files.os.replace = dawdling
    train(model, loss_fn, batch_at, config(out, save_every=2), resume="auto", data_id=data.data_id)
    print("finished", flush=True)
"""


def start(out, slow=0.0, *more):
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT), str(out), str(slow), *map(str, more)]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_for_step(out, step):
    path = Path(out) / "metrics.jsonl"
    while not path.exists() or len(path.read_text().splitlines()) < step:
        time.sleep(0.02)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupts_save_and_leave_a_code_that_stops_a_chain(number, code, tmp_path):
    process = start(tmp_path, 0.05)
    wait_for_step(tmp_path, 3)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert "interrupted: saved step" in out
    step = state(tmp_path)["step"]
    assert 3 <= step < 20
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == step


def test_killed_at_any_moment_a_run_ends_with_the_same_bytes(tmp_path):
    """Five SIGKILLs, three of them while a file of a checkpoint is being written."""
    process = start(tmp_path / "unbroken")
    process.communicate(timeout=120)
    assert process.returncode == 0
    broken = tmp_path / "broken"
    for step in (1, 5):
        process = start(broken, 0.1)
        wait_for_step(broken, step)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    for nth_write in (2, 5, 9):
        process = start(broken, 0.0, 0.2)
        for _ in range(nth_write):
            while process.stdout.readline().strip() != "writing":
                pass
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        assert list(broken.rglob("*.tmp")), "the kill should have hit a write"
    process = start(broken)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "resume:" in out
    assert (broken / "model.safetensors").read_bytes() == (
        tmp_path / "unbroken/model.safetensors"
    ).read_bytes()
    assert len((broken / "metrics.jsonl").read_text().splitlines()) == 20


@pytest.mark.slow
def test_twenty_kills_at_random_moments(tmp_path):
    """The same with twenty, at least five of them between the first byte and the last rename of a
    checkpoint.
    """
    start(tmp_path / "unbroken").communicate(timeout=120)
    broken, moments, within_a_save = tmp_path / "broken", random.Random(0), 0
    for number in range(20):
        process = start(broken, 1.0, *([0.3] if number % 2 else []))
        if number % 2:
            for _ in range(moments.randint(1, 6)):
                if not process.stdout.readline():  # the run is complete, and goes on resuming that
                    break
            time.sleep(moments.uniform(0, 0.3))
        else:
            time.sleep(moments.uniform(2, 6))
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        within_a_save += bool(list(broken.rglob("*.tmp")))
    assert within_a_save >= 5
    process = start(broken)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert (broken / "model.safetensors").read_bytes() == (
        tmp_path / "unbroken/model.safetensors"
    ).read_bytes()
    assert len((broken / "metrics.jsonl").read_text().splitlines()) == 20
