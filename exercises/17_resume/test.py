import functools
import io
import os
import tempfile
from pathlib import Path
from unittest.mock import patch

import torch

import nanophi
from nanophi.train.optim import peak_rates, set_rates

STEPS = 8
STOP = 4


class Run:
    """A small model with dropout, trained by Muon and AdamW. Batches are functions of the step."""

    def __init__(self, seed=0):
        torch.manual_seed(seed)
        cfg = nanophi.PhiConfig(
            vocab_size=64,
            hidden_size=16,
            num_attention_heads=2,
            num_hidden_layers=1,
            intermediate_size=32,
            max_position_embeddings=16,
        )
        self.model = nanophi.Phi(cfg)
        self.model.set_dropout(0.2)
        self.model.train()
        self.optimizers = nanophi.build_optimizers(self.model, "muon", lr=0.01, weight_decay=0.1)
        self.peaks = peak_rates(self.optimizers)
        documents = [[(3 * n + i * i) % 64 for i in range(9 + n)] for n in range(12)]
        self.data = nanophi.Packed(documents, context=16, batch_rows=2, seed=0)
        self.losses = {}

    def train(self, first, last):
        for step in range(first, last):
            set_rates(self.optimizers, self.peaks, nanophi.schedule("wsd", step, STEPS, warmup=2))
            loss, count, _ = nanophi.next_token_loss(self.model, self.data.batch_at(step))
            (loss / count).backward()
            for optimizer in self.optimizers:
                optimizer.step()
                optimizer.zero_grad()
            self.losses[step] = (loss / count).item()
        return self

    def weights(self):
        return {name: p.detach().clone() for name, p in self.model.named_parameters()}


class Killed(BaseException):
    """What no `except Exception` catches, as nothing catches a kill."""


def folder():
    return tempfile.TemporaryDirectory()


def stopped(mine, path):
    """A run that saved after STOP steps. Two more steps were lost when it was killed."""
    run = Run().train(0, STOP)
    mine.save_state(path, run.model, run.optimizers, STOP)
    after = {
        "weights": run.weights(),
        "moments": moments(run.optimizers),
        "random": torch.rand(4),
    }
    run.train(STOP, STOP + 2)
    return after


def resumed(mine, path):
    """A new process: another seed, a new model, new optimizers. They go on from the file."""
    run = Run(seed=1)
    return run, mine.load_state(path, run.model, run.optimizers)


def moments(optimizers):
    """All tensors that the optimizers keep, by name."""
    return {
        f"optimizer {o}, parameter {p}: {name}": value.clone()
        for o, optimizer in enumerate(optimizers)
        for p, kept in optimizer.state_dict()["state"].items()
        for name, value in kept.items()
    }


def same(found, expected, what):
    missing = sorted(expected.keys() - found.keys())
    assert not missing, f"{what}: {missing[0]} is missing, and {len(missing) - 1} more"
    for name, value in expected.items():
        assert torch.equal(found[name], value), f"{what}: {name} differs"


@functools.cache
def unbroken():
    """The losses and weights of the run that nobody stopped."""
    run = Run().train(0, STEPS)
    return run.losses, run.weights()


def goes_on_as_unbroken(run, done):
    assert done == STOP, f"{STOP} steps were done when it was saved, load_state says {done}"
    run.train(done, STEPS)  # before the unbroken run, which seeds the generator
    losses, weights = unbroken()
    for step in range(STOP, STEPS):
        found, expected = run.losses[step], losses[step]
        assert found == expected, f"step {step}: the loss is {found!r}, unbroken {expected!r}"
    same(run.weights(), weights, f"the weights after {STEPS} steps")


def test_the_weights_come_back(mine):
    with folder() as here:
        path = Path(here) / "state.pt"
        expected = stopped(mine, path)["weights"]
        run, _ = resumed(mine, path)
        same(run.weights(), expected, "the weights")


def test_the_optimizers_come_back(mine):
    with folder() as here:
        path = Path(here) / "state.pt"
        expected = stopped(mine, path)["moments"]
        run, _ = resumed(mine, path)
        same(moments(run.optimizers), expected, "what the optimizers keep")
        counted = run.optimizers[0].param_groups[0]["steps"]
        assert counted == STOP, f"Muon counts its steps in its group: {STOP}, not {counted}"


def test_the_random_numbers_go_on(mine):
    with folder() as here:
        path = Path(here) / "state.pt"
        expected = stopped(mine, path)["random"]
        resumed(mine, path)
        assert torch.equal(torch.rand(4), expected), "other random numbers follow: other dropout"


def test_the_step_comes_back(mine):
    with folder() as here:
        path = Path(here) / "state.pt"
        stopped(mine, path)
        _, done = resumed(mine, path)
        assert done == STOP, f"{STOP} steps were done when it was saved, load_state says {done}"


def test_saving_changes_nothing(mine):
    """A run that saves after each step is the same run."""
    plain = Run().train(0, STOP)
    saving = Run()
    with folder() as here:
        for step in range(STOP):
            saving.train(step, step + 1)
            mine.save_state(Path(here) / "state.pt", saving.model, saving.optimizers, step + 1)
    same(saving.weights(), plain.weights(), "a run that saves after each step: the weights")


def test_eight_steps_stopped_at_four_give_the_same_bits(mine):
    with folder() as here:
        path = Path(here) / "state.pt"
        stopped(mine, path)
        goes_on_as_unbroken(*resumed(mine, path))


def test_a_kill_while_it_saves_leaves_the_older_state(mine):
    """Each call of torch.save is killed half-way once; the disk has half of the bytes then. Each
    renaming is killed before it begins.
    """
    with folder() as here:
        path = Path(here) / "state.pt"
        number = 0
        while True:
            stopped(mine, path)
            later = Run().train(0, STOP + 1)
            was_killed, calls = killed(mine, path, later, number)
            if not was_killed:
                break
            number += 1
            try:
                run, done = resumed(mine, path)
            except Exception as error:
                reason = f"{type(error).__name__}: {str(error)[:60]}"
                raise AssertionError(
                    f"killed while it saved step {STOP + 1}, and the state of step {STOP} is gone "
                    f"too ({reason}): write beside the file, then os.replace, and delete nothing"
                ) from None
            goes_on_as_unbroken(run, done)
        assert "torch.save" in calls, "save_state did not call torch.save: this test cannot stop it"
        assert {"os.replace", "os.rename"} & set(calls), (
            "save_state did not call os.replace: a file written in place is half for a while"
        )


def killed(mine, path, run, number):
    """Whether save_state was killed in its call with this number, and the names of its calls: of
    torch.save, os.replace and os.rename.
    """
    calls = []
    save = torch.save

    def is_last(name):
        calls.append(name)
        return len(calls) > number

    def dying_save(value, file, *rest, **more):
        if not is_last("torch.save"):
            return save(value, file, *rest, **more)
        whole = io.BytesIO()
        save(value, whole)
        half = whole.getvalue()[: len(whole.getvalue()) // 2]
        if hasattr(file, "write"):
            file.write(half)
            file.flush()
        else:
            Path(file).write_bytes(half)
        raise Killed

    def dying(name, rename):
        def renaming(*paths, **more):
            if is_last(name):
                raise Killed
            return rename(*paths, **more)

        return renaming

    with (
        patch.object(torch, "save", dying_save),
        patch.object(os, "replace", dying("os.replace", os.replace)),
        patch.object(os, "rename", dying("os.rename", os.rename)),
    ):
        try:
            mine.save_state(path, run.model, run.optimizers, STOP + 1)
        except Killed:
            return True, calls
    return False, calls
