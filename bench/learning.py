"""How many tokens, and how long, until the loss that the original's recipe ends at?

    python bench/learning.py --input DIR --out out/learning            (goes on where it was stopped)

A Phi of 256 x 4 layers, 8 heads, MLP 1024, V 4096 (5.3 M parameters), fp32, one core; 4,096 useful tokens a step, each
seen once; the same documents, cut at 512 tokens, the same first weights, and one judge: bits per byte of held-out
documents. `original` is transformers' Phi and Adafactor at 5e-4, warm-up and linear decay, four random documents at a
time padded to the longest, as its Trainer does; `retuned` the same at the best of the learning rates tried; `nanophi`
its own loop, packing and optimizer, likewise at the best of those tried. Learning rates are tried at half of the tokens
with seed 0, and the finals use other seeds. Runs of nanophi on a share of the tokens, each with its own decay, show how
few are enough. The clock counts training, not judging.
"""

import json
import os
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from sample import shuffled

from nanophi.cli import flag, run_command
from nanophi.files import replacing, write_text
from nanophi.tokenizer.bpe import train_bpe
from nanophi.tokenizer.tokenizer import Tokenizer
from nanophi.train.plot import read_metrics

CONTEXT, VOCABULARY, STEP = 512, 4096, 4096
ORIGINAL_LR = 5e-4
SHAPE = {
    "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 8, "intermediate_size": 1024,
    "vocab_size": VOCABULARY, "max_position_embeddings": CONTEXT,
}  # fmt: skip


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


def prepare(cfg: Config, out: Path) -> None:
    """Tokenizer, training and held-out documents, as all runs see them."""
    documents = shuffled(cfg.input, 0)
    texts, total = [], 0
    while total < 4 * cfg.tokens:  # characters; more than enough at this vocabulary
        texts.append(documents.pop())
        total += len(texts[-1])
    tok = train_bpe(texts, VOCABULARY, min_frequency=2)
    parts: dict[str, list[np.ndarray]] = {"held": [], "train": []}
    for wanted, part in ((30_000, parts["held"]), (int(1.1 * cfg.tokens), parts["train"])):
        while sum(map(len, part)) < wanted:
            ids = np.array([*tok.encode(texts.pop()), tok.eos_id], dtype=np.int32)
            part.extend(
                piece
                for piece in np.split(ids, range(CONTEXT, len(ids), CONTEXT))
                if len(piece) > 1
            )
    tok.save(out / "tokenizer")
    with replacing(out / "documents.npz") as beside, open(beside, "wb") as file:
        arrays = {name: np.concatenate(part) for name, part in parts.items()}
        np.savez(
            file,
            **arrays,
            **{f"{name}_lengths": [len(d) for d in part] for name, part in parts.items()},
        )


def judge(documents: list[np.ndarray], tok: Tokenizer):
    """A function of a model's weights: loss and bits per byte of the held-out documents."""
    from nanophi.model.config import PhiConfig
    from nanophi.model.phi import Phi
    from nanophi.train.losses import validation_loss
    from nanophi.train.packing import Packed

    data, model, byte_lengths = (
        Packed(documents, CONTEXT, 8, 0),
        Phi(PhiConfig(**SHAPE)),
        tok.byte_lengths(),
    )

    def evaluate(other) -> dict[str, float]:
        model.load_state_dict(other.state_dict())
        return validation_loss(model, data.in_order(), byte_lengths)

    return evaluate


def nanophi(
    model, documents: list[np.ndarray], evaluate, out: Path, lr: float, seed: int, steps: int
) -> None:
    from nanophi.train.loop import TrainConfig, train
    from nanophi.train.losses import next_token_loss
    from nanophi.train.packing import Packed

    data = Packed(documents, CONTEXT, STEP // CONTEXT, seed)
    settings = TrainConfig(
        out=str(out),
        steps=steps,
        lr=lr,
        warmup=max(steps // 20, 1),
        seed=seed,
        eval_every=12,
        overwrite=True,
        keep=0,
    )
    train(model, next_token_loss, data.batch_at, settings, evaluate)


def original(
    model, documents: list[np.ndarray], evaluate, out: Path, lr: float, seed: int, steps: int
) -> None:
    """The loop of HF's Trainer without what else it does: the peer at its quickest."""
    import random
    import time

    import torch
    from transformers import PhiConfig, PhiForCausalLM
    from transformers.optimization import Adafactor

    peer = PhiForCausalLM._from_config(
        PhiConfig(**SHAPE, use_cache=False), attn_implementation="sdpa"
    )
    peer.load_state_dict(model.state_dict())
    decayed = [p for p in peer.parameters() if p.dim() > 1]
    others = [p for p in peer.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = Adafactor(groups, lr=lr, scale_parameter=False, relative_step=False)
    order, tokens, seconds, warmup = random.Random(seed), 0, 0.0, max(steps // 20, 1)
    waiting, lines = [], []
    for step in range(steps):
        started, batches, useful = time.perf_counter(), [], 0
        while (
            tokens + useful < (step + 1) * STEP
        ):  # whole batches, and no more tokens in all than nanophi has
            if len(waiting) < 4:
                waiting += order.sample(documents, len(documents))
            four, waiting = waiting[:4], waiting[4:]
            ids = torch.zeros(4, max(map(len, four)), dtype=torch.long)
            for row, document in zip(ids, four, strict=True):
                row[: len(document)] = torch.from_numpy(document)
            batches.append(ids)
            useful += sum(map(len, four)) - 4
        factor = min((step + 1) / warmup, (steps - step) / max(steps - warmup, 1))
        for group in optimizer.param_groups:
            group["lr"] = lr * factor
        total = 0.0
        for ids in batches:
            real = ids != 0
            labels = ids.masked_fill(~real, -100)
            loss = peer(
                ids, attention_mask=real.long(), labels=labels, num_items_in_batch=useful
            ).loss
            loss.backward()
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(peer.parameters(), 1.0).item()
        optimizer.step()
        optimizer.zero_grad()
        tokens, seconds = tokens + useful, seconds + time.perf_counter() - started
        line = {
            "step": step + 1,
            "tokens": tokens,
            "loss": total,
            "lr": lr * factor,
            "grad_norm": norm,
        }
        lines.append(
            line | {"tokens_per_s": useful / (time.perf_counter() - started), "seconds": seconds}
        )
        if (step + 1) % 12 == 0 or step + 1 == steps:
            lines[-1] |= evaluate(peer)
    write_text(out / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))


def work(recipe: str, out: str, lr: str, seed: str, steps: str) -> None:
    """One run, in a process of its own."""
    import torch

    from nanophi.model.config import PhiConfig
    from nanophi.model.phi import Phi

    torch.set_num_threads(1)
    torch.manual_seed(int(seed))
    model = Phi(PhiConfig(**SHAPE))
    root = Path(out).parent
    stored, tok = np.load(root / "documents.npz"), Tokenizer.load(root / "tokenizer")
    held, train = (
        np.split(stored[n], np.cumsum(stored[f"{n}_lengths"])[:-1]) for n in ("held", "train")
    )
    Path(out).mkdir(exist_ok=True)
    recipes = {"nanophi": nanophi, "adafactor": original}
    recipes[recipe](model, train, judge(held, tok), Path(out), float(lr), int(seed), int(steps))


def curve(out: Path, recipe: str, lr: float, seed: int, tokens: int) -> list[dict]:
    """The judged lines of a run, which is run where it is not complete."""
    steps = round(tokens / STEP)
    folder = out / f"{recipe}-lr{lr:g}-seed{seed}-{steps}"
    if not (folder / "metrics.jsonl").exists() or read_metrics(folder)[-1]["step"] < steps:
        command = [
            sys.executable,
            __file__,
            "--work",
            recipe,
            str(folder),
            str(lr),
            str(seed),
            str(steps),
        ]
        with open(out / "log.txt", "a", encoding="utf-8") as log:
            subprocess.run(
                command,
                check=True,
                stdout=log,
                stderr=log,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )
    lines = [line for line in read_metrics(folder) if "val_bits_per_byte" in line]
    print(
        f"{folder.name}: {lines[-1]['val_bits_per_byte']:.3f} in {lines[-1]['seconds']:.0f} s",
        flush=True,
    )
    return lines


def until(lines: list[dict], bits: float) -> dict | None:
    """The first judged line that is as good as `bits`."""
    return next((line for line in lines if line["val_bits_per_byte"] <= bits), None)


def main(cfg: Config) -> None:
    out = Path(cfg.out)
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "documents.npz").exists():
        prepare(cfg, out)
    best = {}
    for recipe, lrs in (("nanophi", cfg.nanophi_lrs), ("adafactor", cfg.adafactor_lrs)):
        found = {
            lr: curve(out, recipe, lr, 0, cfg.tokens // 2)[-1]["val_bits_per_byte"] for lr in lrs
        }
        best[recipe] = min(found, key=found.get)
        if best[recipe] in (min(lrs), max(lrs)):
            print(f"note: {best[recipe]:g} is at the edge of the learning rates tried for {recipe}")
    seeds = range(1, cfg.seeds + 1)
    runs = {
        "original": ("adafactor", ORIGINAL_LR, 1.0),
        "retuned": ("adafactor", best["adafactor"], 1.0),
    }
    runs |= {
        f"nanophi, {share:.0%}": ("nanophi", best["nanophi"], share) for share in [*cfg.shares, 1.0]
    }
    curves = {
        name: [curve(out, recipe, lr, seed, int(cfg.tokens * share)) for seed in seeds]
        for name, (recipe, lr, share) in runs.items()
    }
    goals = {
        name: statistics.mean(one[-1]["val_bits_per_byte"] for one in curves[name])
        for name in list(runs)[:2]
    }
    print(
        "\n| run | learning rate | tokens | bits per byte, by seed | seconds | as good as the original | as retuned |"
    )
    print("|---|---|---|---|---|---|---|")
    for name, ofs in curves.items():
        bits = [line[-1]["val_bits_per_byte"] for line in ofs]
        seconds = statistics.mean(line[-1]["seconds"] for line in ofs)
        cells = [
            name,
            f"{runs[name][1]:g}",
            f"{ofs[0][-1]['tokens']:,}",
            ", ".join(f"{bit:.3f}" for bit in bits),
        ]
        for goal in goals.values():
            reached = [until(lines, goal) for lines in ofs]
            told = (
                f"{line['tokens']:,} tokens, {line['seconds']:.0f} s" if line else "no"
                for line in reached
            )
            cells.append(" / ".join(told))
        cells.insert(4, f"{seconds:.0f}")
        print("| " + " | ".join(cells) + " |")
    if cfg.curves:
        keep = ("tokens", "seconds", "val_bits_per_byte")
        told = {
            name: {
                "lr": runs[name][1],
                "seeds": [[[round(line[k], 4) for k in keep] for line in one] for one in ofs],
            }
            for name, ofs in curves.items()
        }
        lines = (
            f"{json.dumps(name)}: {json.dumps(value)}"
            for name, value in ({"columns": keep} | told).items()
        )
        write_text(cfg.curves, "{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        work(*sys.argv[2:])
    else:
        run_command(Config, main)
