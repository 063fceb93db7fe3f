"""The whole path on the embedded text: clean -> tokenizer -> pretrain -> SFT -> DPO -> answers, in a few minutes.

    make demo                       or, where nanophi is installed:   python examples/demo.py

It calls the scripts' `main(cfg)` as a person would call the scripts; everything lands in out/demo. The text is small,
so what the model knows is what it was taught: trained questions are answered as taught, others fluently and wrongly.
"""

import os
import platform
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the scripts stand at the root of the repository

import torch

import dpo
import pretrain
import sft
import train_tokenizer
from examples.picture import write_chat
from nanophi import generate, load
from nanophi.cli import flag, peak_memory_gb, run_command
from nanophi.infer import pairs
from nanophi.infer.modes import side_by_side
from nanophi.infer.pairs import similarity
from nanophi.text import clean, shards
from nanophi.text.corpus import read_rows
from nanophi.text.schemas import messages_of
from nanophi.tokenizer.chat import chat_prompt
from nanophi.train.plot import draw, read_metrics

ALIKE = 0.9  # an answer counts as taught from this similarity on


@dataclass(kw_only=True)
class Config:
    data: str = flag(
        str(ROOT / "data" / "demo"), help="documents, sft, rephrased, dpo and heldout .jsonl"
    )
    out: str = flag("out/demo", help="where everything goes")
    vocab_size: int = flag(2048, help="tokens")
    pretrain_epochs: float = flag(3, help="passes over the documents")
    sft_epochs: float = flag(10, help="passes over the questions")
    dpo_epochs: float = flag(2, help="passes over the preference pairs")


class Stages:
    """Runs stages one after the other and keeps their time, peak memory and key figure for the table."""

    def __init__(self):
        self.rows: list[tuple[str, float, float, str]] = []

    def run(self, name: str, work, key_figure):
        print(f"\n== {name}", flush=True)
        reset_peak_memory()
        started = time.monotonic()
        result = work()
        self.rows.append((name, time.monotonic() - started, peak_memory_gb(), key_figure(result)))
        return result

    def table(self) -> str:
        lines = [f"{'stage':12} {'seconds':>8} {'peak GB':>8}   key figure"]
        lines += [
            f"{name:12} {seconds:8.1f} {gb:8.2f}   {figure}"
            for name, seconds, gb, figure in self.rows
        ]
        total, peak = sum(row[1] for row in self.rows), max(row[2] for row in self.rows)
        return "\n".join([*lines, f"{'all':12} {total:8.1f} {peak:8.2f}"])


def reset_peak_memory() -> None:
    """Start the kernel's high-water mark anew, where it lets us (Linux)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


@dataclass
class Answer:
    """What a checkpoint says to one question, and what it was taught to say."""

    question: str
    taught: str
    said: str
    ended: bool

    @property
    def as_taught(self) -> bool:
        return similarity(self.said, self.taught) >= ALIKE

    def __str__(self) -> str:
        return (
            f"提问：{self.question}\n回答：{self.said}{' [EOS]' if self.ended else ' (no end)'}\n"
        )


def ask(directory: str, rows: list[dict], batch: int = 64) -> list[Answer]:
    """Greedy answers of a checkpoint to every question of the rows, later turns with the turns before them."""
    model, tok = load(directory)
    found: list[Answer] = []
    asked = [
        (turns[:i], turns[i]["content"])
        for turns in map(messages_of, rows)
        for i in range(1, len(turns), 2)
    ]
    for first in range(0, len(asked), batch):
        part = asked[first : first + batch]
        answered = generate(
            model, [chat_prompt(turns, tok) for turns, _ in part], max_new_tokens=200
        )
        for (turns, taught), ids in zip(part, answered, strict=True):
            ended = ids[-1] == tok.eos_id
            said = tok.decode(ids[:-1] if ended else ids)
            found.append(Answer(turns[-1]["content"], taught, said, ended))
    return found


def main(cfg: Config) -> dict:
    out, data, stages = Path(cfg.out), Path(cfg.data), Stages()
    print(
        f"environment: Python {platform.python_version()}, torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads of {platform.machine()}, {'CUDA' if torch.cuda.is_available() else 'CPU'}"
    )
    text = {
        name: str(out / "text" / f"{name}.jsonl")
        for name in ("documents", "sft", "rephrased", "dpo")
    }
    place = {
        name: str(out / name)
        for name in ("tokenizer", "tokens", "pretrain", "sft-early", "sft", "dpo")
    }
    made_pairs = str(out / "text" / "pairs.jsonl")
    common = {"save_every": 10_000, "keep": 0, "overwrite": True, "warmup": 10}

    def clean_all():
        for name, path in text.items():
            config = clean.Config(
                input=[str(data / f"{name}.jsonl")], out=path, dedup=name == "documents"
            )
            counts[name] = clean.main(config)
        return counts["documents"]

    counts: dict[str, dict] = {}
    stages.run(
        "clean",
        clean_all,
        lambda c: f"{c['read']} documents, {c['repeated']} repeated, {c['written']} kept",
    )
    stages.run(
        "tokenizer",
        lambda: train_tokenizer.main(
            train_tokenizer.Config(
                input=list(text.values()), out=place["tokenizer"], vocab_size=cfg.vocab_size
            )
        ),
        lambda r: f"{r['tokens']:,} tokens",
    )
    stages.run(
        "shards",
        lambda: shards.main(
            shards.Config(
                input=[text["documents"]],
                tokenizer=place["tokenizer"],
                out=place["tokens"],
                val_fraction=0.04,
            )
        ),
        lambda r: f"{r['tokens']:,} tokens, {r['characters'] / r['tokens']:.2f} characters each",
    )
    stages.run(
        "pretrain",
        lambda: pretrain.main(
            pretrain.Config(
                data=place["tokens"], tokenizer=place["tokenizer"], out=place["pretrain"], preset="demo", lr=6e-3,
                epochs=cfg.pretrain_epochs, eval_every=50, batch_tokens=2048, **common,
            )
        ),
        lambda _: "validation {val_bits_per_byte:.2f} bits per byte".format(**read_metrics(place["pretrain"])[-1]),
    )  # fmt: skip
    stages.run(
        "sft",
        lambda: sft.main(
            sft.Config(
                init_from=place["pretrain"], data=[text["sft"], text["rephrased"]], out=place["sft"],
                epochs=cfg.sft_epochs, lr=5e-3, batch_tokens=2048, keep_at=0.25, **common,
            )
        ),
        lambda _: "loss {loss:.3f}".format(**read_metrics(place["sft"])[-1]),
    )  # fmt: skip
    stages.run(
        "pairs",
        lambda: pairs.main(
            pairs.Config(model=place["sft-early"], data=[text["sft"]], out=made_pairs, batch=64)
        ),
        lambda r: f"{r['pairs']} of {r['prompts']} kept",
    )
    stages.run(
        "dpo",
        lambda: dpo.main(
            dpo.Config(
                init_from=place["sft"], data=[text["dpo"], made_pairs], out=place["dpo"], epochs=cfg.dpo_epochs,
                lr=2e-4, batch_pairs=16, val_fraction=0.15, eval_every=4, **common | {"warmup": 3},
            )
        ),
        lambda _: (
            "held-out margin {val_margin:.2f}, accuracy {val_accuracy:.0%}".format(**read_metrics(place["dpo"])[-1])
        ),
    )  # fmt: skip
    rows = list(read_rows([text["sft"], text["rephrased"]]))
    found = stages.run(
        "answers",
        lambda: {name: ask(place[name], rows) for name in ("sft", "dpo")},
        lambda f: (
            "as taught: "
            + ", ".join(f"{name} {sum(a.as_taught for a in f[name])}" for name in f)
            + f" of {len(f['dpo'])}"
        ),
    )
    picture = out / "loss.png"
    draw(
        {"pretraining": [place["pretrain"]], "SFT": [place["sft"]], "DPO": [place["dpo"]]}, picture
    )

    print(f"\n== What {place['dpo']} answers (greedy)\n")
    for answer in found["dpo"][:6]:
        print(answer)
    held_out = list(read_rows([data / "heldout.jsonl"]))
    rephrased = ask(
        place["dpo"],
        [{"instruction": row["question"], "output": row["output"]} for row in held_out],
    )
    print(f"== The {len(rephrased)} questions in other words, which it was never taught\n")
    for row, answer in zip(held_out, rephrased, strict=True):
        print(f"{answer}（taught as：{row['rephrases']}）\n")
    print("== SFT and DPO side by side, where they differ\n")
    both = zip(found["sft"], found["dpo"], strict=True)
    for before, after in [pair for pair in both if pair[0].said != pair[1].said][:3]:
        print(
            f"提问：{before.question}\n{side_by_side(['SFT', 'DPO'], [before.said, after.said], 80)}\n"
        )
    print(stages.table())
    answers_picture = out / "answers.svg"
    write_chat(answers_picture, [(a.question, a.said) for a in rephrased[:5]])
    print(f"\nloss curves: {picture}; answers to questions in other words: {answers_picture}")
    for name, answers in found.items():
        taught = sum(answer.as_taught for answer in answers)
        print(
            f"{place[name]} answers {taught} of {len(answers)} trained questions as taught (>= {ALIKE})"
        )
    kept = sum(answer.as_taught for answer in rephrased)
    print(
        f"{place['dpo']} answers {kept} of {len(rephrased)} questions in other words with what it was taught"
    )
    everything = found["dpo"] + rephrased
    print(f"{sum(a.ended for a in everything)} of {len(everything)} answers end with [EOS]")
    print(
        f"\nChat with it:  {os.path.relpath(sys.executable)} generate.py --model {place['dpo']} --chat"
    )
    return {"found": found, "rephrased": rephrased}


if __name__ == "__main__":
    run_command(Config, main)
