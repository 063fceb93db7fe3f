"""How many tokens, and how long, until the loss that the original's recipe ends at?

    python bench/learning.py --input DIR --out out/learning        (goes on where it was stopped)

All runs have the same documents, cut at 512 tokens, the same first weights, and one judge: bits per
byte of held-out documents. The model is a Phi of 256 x 4 layers, 8 heads, MLP 1024, V 4096 (5.3 M
parameters), fp32, on one core. A step has 4,096 useful tokens, and each token is seen once.

    original   transformers' Phi and Adafactor at 5e-4, warm-up and linear decay; four random
               documents at a time, padded to the longest, as its Trainer does
    retuned    the same at the best of the learning rates tried
    nanophi    its own loop, packing and optimizer, also at the best of the rates tried

Learning rates are tried at half of the tokens with seed 0; the finals use other seeds. Runs of
nanophi on a share of the tokens, each with its own decay, show how few are enough. The clock counts
training and not judging.

Read in this order: `main`, the documents, the two recipes, one run, the table.
"""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from sample import shuffled
from table import print_head, print_row

from nanophi.cli import flag, run_command
from nanophi.files import replacing, write_text
from nanophi.tokenizer.bpe import train_bpe
from nanophi.tokenizer.tokenizer import Tokenizer
from nanophi.train.plot import read_metrics

CONTEXT = 512  # tokens of a document at most, and of a packed row
VOCABULARY = 4096
STEP = 4096  # useful tokens of a step
ORIGINAL_LR = 5e-4
EVAL_EVERY = 12  # steps
SHAPE = {
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "intermediate_size": 1024,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": CONTEXT,
}

Evaluate = Callable[..., dict[str, float]]  # a model -> its loss and bits per byte


@dataclass(kw_only=True)
class Config:
    input: list[str] = flag(help="documents: files, directories or globs")
    out: str = flag(help="directory of the runs; those that are complete are not run again")
    tokens: int = flag(600_000, at_least=10 * STEP, help="useful tokens of a final run")
    adafactor_lrs: list[float] = flag(help="learning rates of `retuned`")
    nanophi_lrs: list[float] = flag(help="learning rates of `nanophi`")
    shares: list[float] = flag(help="of the tokens, for the short runs of nanophi")
    seeds: int = flag(2, at_least=1, help="of the finals")
    curves: str | None = flag(None, help="write the curves of the finals here (.json)")


def main(cfg: Config) -> None:
    # 1. the documents, once for all runs
    out = Path(cfg.out)
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "documents.npz").exists():
        prepare(cfg, out)

    # 2. the best learning rate of each recipe, at half of the tokens
    nanophi_lr = best_rate(cfg, out, "nanophi", cfg.nanophi_lrs)
    adafactor_lr = best_rate(cfg, out, "adafactor", cfg.adafactor_lrs)

    # 3. the finals: name -> recipe, learning rate, share of the tokens
    finals = {
        "original": ("adafactor", ORIGINAL_LR, 1.0),
        "retuned": ("adafactor", adafactor_lr, 1.0),
    }
    for share in [*cfg.shares, 1.0]:
        finals[f"nanophi, {share:.0%}"] = ("nanophi", nanophi_lr, share)
    curves = {}
    for name, (recipe, lr, share) in finals.items():
        tokens = int(cfg.tokens * share)
        seeds = range(1, cfg.seeds + 1)
        curves[name] = [curve(out, recipe, lr, seed, tokens) for seed in seeds]

    # 4. the results
    rates = {name: lr for name, (_, lr, _) in finals.items()}
    print_table(curves, rates)
    if cfg.curves:
        write_curves(cfg.curves, curves, rates)


def best_rate(cfg: Config, out: Path, recipe: str, rates: list[float]) -> float:
    """The learning rate that ends at the fewest bits per byte."""
    bits = {}
    for lr in rates:
        bits[lr] = curve(out, recipe, lr, 0, cfg.tokens // 2)[-1]["val_bits_per_byte"]
    best = min(bits, key=bits.get)
    if best in (min(rates), max(rates)):
        print(f"note: {best:g} is at the edge of the learning rates tried for {recipe}")
    return best


# ---- the documents


def prepare(cfg: Config, out: Path) -> None:
    """Write the tokenizer and the training and held-out documents, as all runs see them."""
    documents = shuffled(cfg.input, 0)
    texts = []
    characters = 0
    while characters < 4 * cfg.tokens:  # more than enough text with this vocabulary
        texts.append(documents.pop())
        characters += len(texts[-1])
    tok = train_bpe(texts, VOCABULARY, min_frequency=2)
    tok.save(out / "tokenizer")

    held_out = take_pieces(texts, tok, 30_000)
    train = take_pieces(texts, tok, int(1.1 * cfg.tokens))
    with replacing(out / "documents.npz") as beside, open(beside, "wb") as file:
        np.savez(
            file,
            held=np.concatenate(held_out),
            train=np.concatenate(train),
            held_lengths=[len(piece) for piece in held_out],
            train_lengths=[len(piece) for piece in train],
        )


def take_pieces(texts: list[str], tok: Tokenizer, tokens: int) -> list[np.ndarray]:
    """Remove texts from the end of the list until they have `tokens` together; returns them as ids,
    cut into pieces of CONTEXT. A piece of one token has nothing to predict and is dropped.
    """
    pieces: list[np.ndarray] = []
    while sum(map(len, pieces)) < tokens:
        ids = np.array([*tok.encode(texts.pop()), tok.eos_id], dtype=np.int32)
        for piece in np.split(ids, range(CONTEXT, len(ids), CONTEXT)):
            if len(piece) > 1:
                pieces.append(piece)
    return pieces


def load_pieces(root: Path, name: str) -> list[np.ndarray]:
    """The documents that `prepare` wrote. name: "train", or "held" for those held out"""
    stored = np.load(root / "documents.npz")
    ends = np.cumsum(stored[f"{name}_lengths"])
    return np.split(stored[name], ends[:-1])


def judge(documents: list[np.ndarray], tok: Tokenizer) -> Evaluate:
    """A function of a model: its loss and bits per byte of the held-out documents.

    It computes with our network, whose weights it takes from the model; so all are judged alike.
    """
    from nanophi.model.config import PhiConfig
    from nanophi.model.phi import Phi
    from nanophi.train.losses import validation_loss
    from nanophi.train.packing import Packed

    data = Packed(documents, CONTEXT, 8, 0)
    own = Phi(PhiConfig(**SHAPE))
    byte_lengths = tok.byte_lengths()

    def evaluate(model) -> dict[str, float]:
        own.load_state_dict(model.state_dict())
        return validation_loss(own, data.in_order(), byte_lengths)

    return evaluate


# ---- the recipes: each trains `model`, and writes metrics.jsonl with "val_bits_per_byte" at times


def nanophi(
    model,
    documents: list[np.ndarray],
    evaluate: Evaluate,
    out: Path,
    lr: float,
    seed: int,
    steps: int,
) -> None:
    from nanophi.train.config import TrainConfig
    from nanophi.train.loop import train
    from nanophi.train.losses import next_token_loss
    from nanophi.train.packing import Packed

    data = Packed(documents, CONTEXT, STEP // CONTEXT, seed)
    settings = TrainConfig(
        out=str(out),
        steps=steps,
        lr=lr,
        warmup=max(steps // 20, 1),
        seed=seed,
        eval_every=EVAL_EVERY,
        overwrite=True,
        keep=0,
    )
    train(model, next_token_loss, data.batch_at, settings, evaluate)


def original(
    model,
    documents: list[np.ndarray],
    evaluate: Evaluate,
    out: Path,
    lr: float,
    seed: int,
    steps: int,
) -> None:
    """The loop of HF's Trainer without all else that it does: the original at its quickest."""
    import random
    import time

    import torch

    peer = hf_model(model)
    optimizer = adafactor(peer, lr)
    fours = endless_fours(documents, random.Random(seed))
    warmup = max(steps // 20, 1)
    tokens = 0
    seconds = 0.0
    lines = []
    for step in range(steps):
        # 1. As many whole batches of four documents as keep up with the tokens of nanophi.
        started = time.perf_counter()
        batches = []
        useful = 0
        while tokens + useful < (step + 1) * STEP:
            four = next(fours)
            batches.append(padded(four))
            useful += sum(map(len, four)) - 4  # the first token of a document is no target

        # 2. Forward, backward, clip, update.
        rate = lr * min((step + 1) / warmup, (steps - step) / max(steps - warmup, 1))
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = add_gradients(peer, batches, useful)
        norm = torch.nn.utils.clip_grad_norm_(peer.parameters(), 1.0).item()
        optimizer.step()
        optimizer.zero_grad()

        # 3. What the step has done, in the format of nanophi's metrics.jsonl.
        step_seconds = time.perf_counter() - started
        tokens += useful
        seconds += step_seconds
        line = {
            "step": step + 1,
            "tokens": tokens,
            "loss": loss,
            "lr": rate,
            "grad_norm": norm,
            "tokens_per_s": useful / step_seconds,
            "seconds": seconds,
        }
        if (step + 1) % EVAL_EVERY == 0 or step + 1 == steps:
            line |= evaluate(peer)
        lines.append(line)
    write_text(out / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))


def hf_model(model):
    """transformers' Phi with the weights of ours."""
    from transformers import PhiConfig, PhiForCausalLM

    config = PhiConfig(**SHAPE, use_cache=False)
    peer = PhiForCausalLM._from_config(config, attn_implementation="sdpa")
    peer.load_state_dict(model.state_dict())
    return peer


def adafactor(peer, lr: float):
    """Adafactor as the original has it; weight decay for matrices alone."""
    from transformers.optimization import Adafactor

    matrices = [p for p in peer.parameters() if p.dim() > 1]
    others = [p for p in peer.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return Adafactor(groups, lr=lr, scale_parameter=False, relative_step=False)


def endless_fours(documents: list[np.ndarray], rng) -> Iterator[list[np.ndarray]]:
    """The documents in random order, four at a time; when fewer are left, a new epoch follows."""
    waiting: list[np.ndarray] = []
    while True:
        if len(waiting) < 4:
            waiting += rng.sample(documents, len(documents))
        yield waiting[:4]
        waiting = waiting[4:]


def padded(documents: list[np.ndarray]):
    """Ids (documents, longest), filled up with 0, which is [PAD]."""
    import torch

    ids = torch.zeros(len(documents), max(map(len, documents)), dtype=torch.long)
    for row, document in zip(ids, documents, strict=True):
        row[: len(document)] = torch.from_numpy(document)
    return ids


def add_gradients(peer, batches: list, useful: int) -> float:
    """Forward and backward of all batches of a step; returns the mean loss over `useful` tokens."""
    loss = 0.0
    for ids in batches:
        real = ids != 0
        output = peer(
            ids,
            attention_mask=real.long(),
            labels=ids.masked_fill(~real, -100),
            num_items_in_batch=useful,
        )
        output.loss.backward()
        loss += output.loss.item()
    return loss


RECIPES = {"nanophi": nanophi, "adafactor": original}


# ---- one run


def work(recipe: str, out: str, lr: str, seed: str, steps: str) -> None:
    """Train once, in a process of its own."""
    import torch

    from nanophi.model.config import PhiConfig
    from nanophi.model.phi import Phi

    torch.set_num_threads(1)
    torch.manual_seed(int(seed))
    model = Phi(PhiConfig(**SHAPE))
    root = Path(out).parent
    evaluate = judge(load_pieces(root, "held"), Tokenizer.load(root / "tokenizer"))
    documents = load_pieces(root, "train")
    Path(out).mkdir(exist_ok=True)
    RECIPES[recipe](model, documents, evaluate, Path(out), float(lr), int(seed), int(steps))


def curve(out: Path, recipe: str, lr: float, seed: int, tokens: int) -> list[dict]:
    """The judged lines of a run, which is run first unless it is complete."""
    steps = round(tokens / STEP)
    folder = out / f"{recipe}-lr{lr:g}-seed{seed}-{steps}"
    if not (folder / "metrics.jsonl").exists() or read_metrics(folder)[-1]["step"] < steps:
        arguments = [recipe, str(folder), str(lr), str(seed), str(steps)]
        with open(out / "log.txt", "a", encoding="utf-8") as log:
            subprocess.run(
                [sys.executable, __file__, "--work", *arguments],
                check=True,
                stdout=log,
                stderr=log,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )
    lines = [line for line in read_metrics(folder) if "val_bits_per_byte" in line]
    last = lines[-1]
    print(f"{folder.name}: {last['val_bits_per_byte']:.3f} in {last['seconds']:.0f} s", flush=True)
    return lines


# ---- the table and the file of curves


def print_table(curves: dict[str, list[list[dict]]], rates: dict[str, float]) -> None:
    """A row for each final. curves: name -> the judged lines of each of its runs"""
    print()
    print_head(
        "run",
        "learning rate",
        "tokens",
        "bits per byte, by seed",
        "seconds",
        "as good as the original",
        "as retuned",
    )
    goals = []
    for name in ("original", "retuned"):
        goals.append(statistics.mean(lines[-1]["val_bits_per_byte"] for lines in curves[name]))
    for name, runs in curves.items():
        last_lines = [lines[-1] for lines in runs]
        print_row(
            name,
            f"{rates[name]:g}",
            f"{last_lines[0]['tokens']:,}",
            ", ".join(f"{line['val_bits_per_byte']:.3f}" for line in last_lines),
            f"{statistics.mean(line['seconds'] for line in last_lines):.0f}",
            *[" / ".join(when_reached(lines, goal) for lines in runs) for goal in goals],
        )


def when_reached(lines: list[dict], bits: float) -> str:
    """Tokens and seconds until a run is as good as `bits` per byte; "no" where it never is."""
    for line in lines:
        if line["val_bits_per_byte"] <= bits:
            return f"{line['tokens']:,} tokens, {line['seconds']:.0f} s"
    return "no"


def write_curves(path: str, curves: dict[str, list[list[dict]]], rates: dict[str, float]) -> None:
    """Write the judged lines of the finals as JSON, one line for each final."""
    columns = ("tokens", "seconds", "val_bits_per_byte")
    values: dict[str, object] = {"columns": columns}
    for name, runs in curves.items():
        rounded = [
            [[round(line[column], 4) for column in columns] for line in lines] for lines in runs
        ]
        values[name] = {"lr": rates[name], "seeds": rounded}
    lines = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in values.items()]
    write_text(path, "{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        work(*sys.argv[2:])
    else:
        run_command(Config, main)
