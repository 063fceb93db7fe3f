"""Steps of DPO and of SFT beside TRL's trainers: the same model, data, batch and optimizer.

    python bench/alignment.py --pairs long short
    python bench/alignment.py --pairs long short --reference along
    python bench/alignment.py --conversations sft.jsonl --tokenizer out/tokenizer

Each side is a process of its own on the same core(s), and the sides take turns. A step is forward,
loss, backward, clipping and one step of AdamW. Speed is the median of the steps behind the first
two. Memory is the peak beyond what the process held with everything imported.

    pairs of random tokens      nanophi        this repository, as dpo.py trains, prompts shared
                                separate       the same with --share-prompt off
                                trl            TRL's DPOTrainer on transformers' PhiForCausalLM
                                trl-padding    the same with padding-free batches
    real conversations          nanophi        this repository, as sft.py trains
                                trl-packing    TRL's SFTTrainer, completions only, its packing on
                                trl-padding    the same with padding-free batches, not packed
                                trl            the same with padded batches of similar lengths

--reference before: its log-probabilities are computed once, before training, by both sides. along:
a second, frozen model computes them in each step, by both sides.
"""

import contextlib
import copy
import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from typing import Literal

from machine import cpu_has, cpu_name, measured_alone, memory_gb
from table import print_head, print_row

from nanophi.cli import UserError, flag, run_command

PAIRS = {"long": (256, 64), "short": (32, 128)}  # name -> tokens of prompts and of answers
BATCH = 8  # pairs, or packed rows, of a step
CONTEXT = 512
SHAPE = {  # 10 M parameters
    "hidden_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "intermediate_size": 1024,
    "vocab_size": 10240,
    "max_position_embeddings": CONTEXT,
}
OF_PAIRS = ("nanophi", "separate", "trl", "trl-padding")
OF_CONVERSATIONS = ("nanophi", "trl", "trl-packing", "trl-padding")


@dataclass(kw_only=True)
class Config:
    pairs: list[str] | None = flag(None, help=f"of {', '.join(PAIRS)}")
    conversations: str | None = flag(None, help="a file of rows that sft.py reads")
    tokenizer: str | None = flag(None, help="of the conversations, with at most 10,240 tokens")
    reference: Literal["before", "along"] = flag("before", help="when DPO's is computed")
    sides: list[str] | None = flag(None, help="fewer than all of them")
    cores: int = flag(1, at_least=1, help="cores of each side")
    steps: int = flag(8, at_least=4, help="steps of each run")
    repeats: int = flag(3, at_least=1, help="runs of each side")


def main(cfg: Config) -> None:
    if (cfg.conversations is None) != (cfg.tokenizer is None):
        raise UserError("--conversations and --tokenizer go together")
    cores = sorted(os.sched_getaffinity(0))[-cfg.cores :]
    features = [name for name in ("avx512f", "avx2") if cpu_has(name)]
    print(
        f"{len(cores)} core(s) of {cpu_name()} ({', '.join(features)}), medians of {cfg.repeats} "
        f"runs of {cfg.steps} steps of {BATCH} pairs or rows; reference {cfg.reference}\n"
    )
    print_head("work", "side", "a second", "x TRL", "peak GB", "of TRL's")
    for name in cfg.pairs or []:
        prompt, answer = PAIRS[name]
        title = f"pairs, {prompt} + {answer}"
        compare(cfg, cores, OF_PAIRS, title, "pairs", name, cfg.reference)
    if cfg.conversations is not None:
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "rows.json")
            encode(cfg.conversations, cfg.tokenizer, path)
            compare(cfg, cores, OF_CONVERSATIONS, "conversations, tokens", "sft", path)


def compare(cfg: Config, cores: list[int], sides: tuple[str, ...], title: str, *work: str) -> None:
    """Run the sides by turns, and print a row for each. TRL's first side is what it is held
    against.
    """
    runs: dict[str, list[dict]] = {}
    for _ in range(cfg.repeats):
        for side in sides:
            if cfg.sides is None or side in cfg.sides:
                given = [side, *work, str(cfg.steps), str(cfg.cores)]
                measured = measured_alone(__file__, given, cores)
                if measured is not None:
                    runs.setdefault(side, []).append(measured)
    medians = {
        side: {key: statistics.median(one[key] for one in several) for key in several[0]}
        for side, several in runs.items()
    }
    trl = next((median for side, median in medians.items() if side.startswith("trl")), None)
    for side, median in medians.items():
        speed, gb = median["speed"], median["gb"]
        ratios = (f"{speed / trl['speed']:.2f}", f"{gb / trl['gb']:.2f}") if trl else ("", "")
        print_row(title, side, f"{speed:,.2f}", ratios[0], f"{gb:.2f}", ratios[1])


# ---- one run, in a process of its own


def work(side: str, kind: str, *rest: str) -> None:
    """Train for some steps, and print speed and memory as JSON."""
    import torch

    *given, steps, cores = rest
    torch.set_num_threads(int(cores))
    torch.manual_seed(0)
    runs = {
        ("pairs", False): dpo,
        ("pairs", True): trls_dpo,
        ("sft", False): sft,
        ("sft", True): trls_sft,
    }
    done = runs[kind, side.startswith("trl")](side, *given, int(steps))
    speed = statistics.median(count / seconds for count, seconds in done[2:])
    print(json.dumps({"speed": speed, "gb": memory_gb("VmHWM") - before_gb[0]}))


before_gb: list[float] = []  # what the process held with everything imported
Done = list[tuple[int, float]]  # of each step: pairs or tokens, and seconds


def random_pairs(name: str, count: int) -> list[tuple[list[int], list[int], list[int]]]:
    """(prompt, chosen, rejected) as ids."""
    import random

    dice = random.Random(0)
    prompt, answer = PAIRS[name]
    return [
        tuple(dice.choices(range(7, SHAPE["vocab_size"]), k=k) for k in (prompt, answer, answer))
        for _ in range(count)
    ]


def encode(path: str, tokenizer: str, out: str) -> None:
    """Conversations of one turn as a JSON list of [prompt ids, answer ids], for both sides."""
    from nanophi.text.corpus import read_rows
    from nanophi.text.schemas import messages_of
    from nanophi.tokenizer.chat import encode_chat
    from nanophi.tokenizer.tokenizer import Tokenizer

    tok = Tokenizer.load(tokenizer)
    rows = []
    for messages in read_rows([path], use=messages_of):
        ids, mask = encode_chat(messages, tok)
        prompt = mask.index(True) if True in mask else len(mask)
        if all(mask[prompt:]) and prompt < len(mask) and len(ids) <= CONTEXT:
            rows.append([ids[:prompt], ids[prompt:]])
    if len(tok) > SHAPE["vocab_size"] or not rows:
        raise UserError(f"{tokenizer} has too many tokens, or {path} no row that fits")
    with open(out, "w") as file:
        json.dump(rows, file)


def read_encoded(path: str) -> list[tuple[list[int], list[int]]]:
    with open(path) as file:
        return json.load(file)


# ---- ours


def our_model():
    from nanophi.model.config import PhiConfig
    from nanophi.model.phi import Phi
    from nanophi.model.speed import speed_up

    before_gb.append(memory_gb("VmRSS"))
    model = Phi(PhiConfig(**SHAPE))
    speed_up(model)
    return model.train()


def our_steps(model, loss_fn, batch_at, steps: int, count_of) -> Done:
    from nanophi.train.distributed import World
    from nanophi.train.optim import build_optimizers
    from nanophi.train.step import training_step

    optimizers = build_optimizers(model, "adamw", 1e-4, 0.0)
    done = []
    for step in range(steps):
        started = time.perf_counter()
        batch = batch_at(step)
        training_step(model, optimizers, loss_fn, batch, BATCH, World(0, 1, "cpu"), clip=1.0)
        done.append((count_of(batch), time.perf_counter() - started))
    return done


def dpo(side: str, name: str, reference: str, steps: int) -> Done:
    import torch

    from nanophi.train.losses import answer_logps, make_dpo_loss_fn
    from nanophi.train.preferences import Pairs, Preference
    from nanophi.train.reference import reference_logps

    model = our_model()
    pairs = [
        Preference(
            *((prompt + answer, [False] * len(prompt) + [True] * len(answer)) for answer in answers)
        )
        for prompt, *answers in random_pairs(name, steps * BATCH)
    ]
    data = Pairs(pairs, BATCH, 0, share=side == "nanophi")
    loss_fn = make_dpo_loss_fn(0.1)
    if reference == "before":
        data.reference = reference_logps(model, data, BATCH)
        return our_steps(model, loss_fn, data.batch_at, steps, len)

    frozen = copy.deepcopy(model).eval().requires_grad_(False)

    def loss_beside_reference(model, batch):
        with torch.no_grad():
            batch.reference = answer_logps(frozen, batch)
        return loss_fn(model, batch)

    return our_steps(model, loss_beside_reference, data.batch_at, steps, len)


def sft(side: str, path: str, steps: int) -> Done:
    import numpy as np

    from nanophi.train.losses import next_token_loss
    from nanophi.train.packing import Packed

    model = our_model()
    documents, masks = [], []
    for prompt, answer in read_encoded(path):
        documents.append(np.array(prompt + answer))
        masks.append(np.array([False] * len(prompt) + [True] * len(answer)))
    data = Packed(documents, CONTEXT, BATCH, 0, masks)
    return our_steps(model, next_token_loss, data.batch_at, steps, lambda batch: batch.real_tokens)


# ---- TRL's


def trls_dpo(side: str, name: str, reference: str, steps: int) -> Done:
    with quiet():
        from datasets import Dataset
        from transformers import PhiForCausalLM
        from trl import DPOConfig, DPOTrainer

    class Encoded(DPOTrainer):
        def _prepare_dataset(self, dataset, *args, **named):
            return dataset  # it holds ids already

    before_gb.append(memory_gb("VmRSS"))
    rows = [
        {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}
        for prompt, chosen, rejected in random_pairs(name, steps * BATCH)
    ]
    with tempfile.TemporaryDirectory() as folder, quiet():
        args = DPOConfig(
            output_dir=folder, beta=0.1, max_length=None, padding_free=side == "trl-padding",
            precompute_ref_log_probs=reference == "before", **their_settings(BATCH, steps),
        )  # fmt: skip
        clock = clock_of(lambda: BATCH)
        model = PhiForCausalLM(their_config())
        frozen = copy.deepcopy(model) if reference == "along" else None
        trainer = Encoded(
            model, frozen, args=args, train_dataset=Dataset.from_list(rows),
            processing_class=made_up_tokenizer(), callbacks=[clock],
        )  # fmt: skip
        trainer.train()
    return clock.done


def trls_sft(side: str, path: str, steps: int) -> Done:
    with quiet():
        from datasets import Dataset
        from transformers import PhiForCausalLM
        from trl import SFTConfig, SFTTrainer

    seen: list[int] = []  # tokens of each batch, without padding: [PAD] is 0, and no text has it

    class Counted(SFTTrainer):
        def compute_loss(self, model, inputs, *args, **named):
            seen.append(int((inputs["input_ids"] != 0).sum()))
            return super().compute_loss(model, inputs, *args, **named)

    before_gb.append(memory_gb("VmRSS"))
    encoded = read_encoded(path)
    rows = [
        {
            "input_ids": prompt + answer,
            "completion_mask": [0] * len(prompt) + [1] * len(answer),
        }
        for prompt, answer in encoded
    ]
    packing = side == "trl-packing"
    mean_length = sum(len(row["input_ids"]) for row in rows) / len(rows)
    batch = BATCH if packing else round(BATCH * CONTEXT / mean_length)
    with tempfile.TemporaryDirectory() as folder, quiet():
        args = SFTConfig(
            output_dir=folder, packing=packing, padding_free=side != "trl",
            completion_only_loss=True,
            train_sampling_strategy="group_by_length" if side == "trl" else "random",
            max_length=CONTEXT if packing else None, **their_settings(batch, steps),
        )  # fmt: skip
        clock = clock_of(lambda: seen[-1])
        trainer = Counted(
            PhiForCausalLM(their_config()), args=args, train_dataset=Dataset.from_list(rows),
            processing_class=made_up_tokenizer(), callbacks=[clock],
        )  # fmt: skip
        trainer.train()
    return clock.done


@contextlib.contextmanager
def quiet():
    """Without the warnings of other libraries, and without what they print."""
    import warnings

    with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
        warnings.simplefilter("ignore")
        yield


def their_config():
    from transformers import PhiConfig

    return PhiConfig(**SHAPE, partial_rotary_factor=0.5, attn_implementation="sdpa")


def their_settings(batch: int, steps: int) -> dict:
    """What both trainers are told."""
    return {
        "per_device_train_batch_size": batch, "max_steps": steps, "learning_rate": 1e-4,
        "gradient_checkpointing": False, "bf16": False, "use_cpu": True, "report_to": [],
        "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True,
        "dataloader_pin_memory": False, "remove_unused_columns": False,
    }  # fmt: skip


def clock_of(count):
    """A callback that writes down, for each step, what `count` says and the seconds."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def __init__(self):
            self.done: Done = []

        def on_step_begin(self, *args, **named):
            self.started = time.perf_counter()

        def on_step_end(self, *args, **named):
            self.done.append((count(), time.perf_counter() - self.started))

    return Clock()


def made_up_tokenizer():
    """A tokenizer that is asked for nothing but its special tokens."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"[PAD]": 0, "[EOS]": 1}, unk_token="[PAD]")),
        pad_token="[PAD]",
        eos_token="[EOS]",
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        work(*sys.argv[2:])
    else:
        run_command(Config, main)
