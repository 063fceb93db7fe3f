"""Steps of DPO beside TRL's DPOTrainer: the same model, pairs, batch and optimizer.

    python bench/alignment.py --pairs long short

Each side is a process of its own on the same core(s), and the sides take turns. A step is forward,
loss, backward, clipping and one step of AdamW; the reference's log-probabilities are computed
before, on both sides.

    nanophi        this repository, as dpo.py trains: prompts shared where they are long enough
    separate       the same with --share-prompt off
    trl            TRL's DPOTrainer on transformers' PhiForCausalLM, with sdpa attention
    trl-padding    the same with padding-free batches, which TRL offers

Speed is the median of the steps behind the first two. Memory is the peak beyond what the process
held with everything imported.
"""

import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass

from machine import cpu_has, cpu_name, measured_alone, memory_gb
from table import print_head, print_row

from nanophi.cli import flag, run_command

PAIRS = {"long": (256, 64), "short": (32, 128)}  # name -> tokens of prompts and of answers
BATCH = 8  # pairs of a step
SHAPE = {  # 10 M parameters
    "hidden_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "intermediate_size": 1024,
    "vocab_size": 10240,
    "max_position_embeddings": 512,
}
SIDES = ("nanophi", "separate", "trl", "trl-padding")


@dataclass(kw_only=True)
class Config:
    pairs: list[str] = flag(help=f"of {', '.join(PAIRS)}")
    sides: list[str] | None = flag(None, help=f"of {', '.join(SIDES)}")
    cores: int = flag(1, at_least=1, help="cores of each side")
    steps: int = flag(8, at_least=4, help="steps of each run")
    repeats: int = flag(3, at_least=1, help="runs of each side")


def main(cfg: Config) -> None:
    cores = sorted(os.sched_getaffinity(0))[-cfg.cores :]
    features = [name for name in ("avx512f", "avx2") if cpu_has(name)]
    print(
        f"{len(cores)} core(s) of {cpu_name()} ({', '.join(features)}), "
        f"medians of {cfg.repeats} runs of {cfg.steps} steps of {BATCH} pairs\n"
    )
    print_head("prompt + answer", "side", "pairs/s", "x TRL", "peak GB", "of TRL's")
    for name in cfg.pairs:
        runs: dict[str, list[dict]] = {}
        for _ in range(cfg.repeats):
            for side in cfg.sides or SIDES:
                measured = measured_alone(
                    __file__, [side, name, str(cfg.steps), str(cfg.cores)], cores
                )
                if measured is not None:
                    runs.setdefault(side, []).append(measured)
        print_rows(name, runs)


def print_rows(name: str, runs: dict[str, list[dict]]) -> None:
    prompt, answer = PAIRS[name]
    medians = {
        side: {key: statistics.median(one[key] for one in several) for key in several[0]}
        for side, several in runs.items()
    }
    trl = medians.get("trl")
    for side, median in medians.items():
        speed, gb = median["pairs_per_s"], median["gb"]
        ratios = (f"{speed / trl['pairs_per_s']:.2f}", f"{gb / trl['gb']:.2f}") if trl else ("", "")
        cells = (f"{speed:.2f}", ratios[0], f"{gb:.2f}", ratios[1])
        print_row(f"{prompt} + {answer}", side, *cells)


# ---- one run, in a process of its own


def work(side: str, name: str, steps: int, cores: int) -> None:
    """Train for some steps, and print speed and memory as JSON."""
    import torch

    torch.set_num_threads(cores)
    torch.manual_seed(0)
    times = trl(name, steps, side) if side.startswith("trl") else nanophi(name, steps, side)
    speed = BATCH / statistics.median(times[2:])
    print(json.dumps({"pairs_per_s": speed, "gb": memory_gb("VmHWM") - before_gb[0]}))


before_gb: list[float] = []  # what the process held with everything imported


def random_pairs(name: str, count: int) -> list[tuple[list[int], list[int], list[int]]]:
    """(prompt, chosen, rejected) as ids."""
    import random

    dice = random.Random(0)
    prompt, answer = PAIRS[name]
    return [
        tuple(dice.choices(range(7, SHAPE["vocab_size"]), k=k) for k in (prompt, answer, answer))
        for _ in range(count)
    ]


def nanophi(name: str, steps: int, side: str) -> list[float]:
    """The seconds of each step of ours."""
    from nanophi.model.config import PhiConfig
    from nanophi.model.phi import Phi
    from nanophi.model.speed import speed_up
    from nanophi.train.distributed import World
    from nanophi.train.losses import make_dpo_loss_fn
    from nanophi.train.optim import build_optimizers
    from nanophi.train.preferences import Pairs, Preference
    from nanophi.train.reference import reference_logps
    from nanophi.train.step import training_step

    before_gb.append(memory_gb("VmRSS"))
    model = Phi(PhiConfig(**SHAPE))
    speed_up(model)
    pairs = [
        Preference(
            *((prompt + answer, [False] * len(prompt) + [True] * len(answer)) for answer in answers)
        )
        for prompt, *answers in random_pairs(name, steps * BATCH)
    ]
    data = Pairs(pairs, BATCH, 0, share=side == "nanophi")
    data.reference = reference_logps(model, data, BATCH)
    optimizers = build_optimizers(model, "adamw", 1e-4, 0.0)
    loss_fn = make_dpo_loss_fn(0.1)
    model.train()
    times = []
    for step in range(steps):
        started = time.perf_counter()
        batch = data.batch_at(step)
        training_step(model, optimizers, loss_fn, batch, BATCH, World(0, 1, "cpu"), clip=1.0)
        times.append(time.perf_counter() - started)
    return times


def trl(name: str, steps: int, side: str) -> list[float]:
    """The seconds of each step of TRL's, from the trainer's own callbacks."""
    import warnings

    warnings.simplefilter("ignore")
    from datasets import Dataset
    from transformers import (
        PhiConfig,
        PhiForCausalLM,
        PreTrainedTokenizerFast,
        TrainerCallback,
    )
    from trl import DPOConfig, DPOTrainer

    before_gb.append(memory_gb("VmRSS"))
    times: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *args, **named):
            self.started = time.perf_counter()

        def on_step_end(self, *args, **named):
            times.append(time.perf_counter() - self.started)

    class Encoded(DPOTrainer):
        def _prepare_dataset(self, dataset, *args, **named):
            return dataset  # it holds ids already

    rows = [
        {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}
        for prompt, chosen, rejected in random_pairs(name, steps * BATCH)
    ]
    config = PhiConfig(**SHAPE, partial_rotary_factor=0.5, attn_implementation="sdpa")
    with tempfile.TemporaryDirectory() as folder:
        args = DPOConfig(
            output_dir=folder, beta=0.1, per_device_train_batch_size=BATCH, max_steps=steps,
            precompute_ref_log_probs=True, padding_free=side == "trl-padding", max_length=None,
            gradient_checkpointing=False, bf16=False, use_cpu=True, report_to=[],
            learning_rate=1e-4, save_strategy="no", logging_strategy="no", disable_tqdm=True,
            dataloader_pin_memory=False, remove_unused_columns=False,
        )  # fmt: skip
        trainer = Encoded(
            PhiForCausalLM(config), args=args, train_dataset=Dataset.from_list(rows),
            processing_class=made_up_tokenizer(PreTrainedTokenizerFast), callbacks=[Clock()],
        )  # fmt: skip
        trainer.train()
    return times


def made_up_tokenizer(of: type):
    """A tokenizer that is asked for nothing but its special tokens."""
    from tokenizers import Tokenizer, models

    return of(
        tokenizer_object=Tokenizer(models.WordLevel({"[PAD]": 0, "[EOS]": 1}, unk_token="[PAD]")),
        pad_token="[PAD]",
        eos_token="[EOS]",
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        work(sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))
    else:
        run_command(Config, main)
