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
from nanophi import generate, load
from nanophi.cli import flag, run
from nanophi.infer.pairs import similarity
from nanophi.text import clean, shards
from nanophi.text.chat import chat_prompt
from nanophi.text.corpus import messages_of, read_rows
from nanophi.train.plot import draw, read_metrics

ALIKE = 0.9  # an answer counts as taught from this similarity on


@dataclass(kw_only=True)
class Config:
    data: str = flag(str(ROOT / "data" / "demo"), help="documents.jsonl, sft.jsonl and dpo.jsonl")
    out: str = flag("out/demo", help="where everything goes")
    vocab_size: int = flag(2048, help="tokens")
    pretrain_epochs: float = flag(6, help="passes over the documents")
    sft_epochs: float = flag(40, help="passes over the questions")
    dpo_epochs: float = flag(6, help="passes over the preference pairs")


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
        lines += [f"{name:12} {seconds:8.1f} {gb:8.2f}   {figure}" for name, seconds, gb, figure in self.rows]
        total, peak = sum(row[1] for row in self.rows), max(row[2] for row in self.rows)
        return "\n".join([*lines, f"{'all':12} {total:8.1f} {peak:8.2f}"])


def reset_peak_memory() -> None:
    """Start the kernel's high-water mark anew, where it lets us (Linux)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def peak_memory_gb() -> float:
    """Highest resident memory since the last reset (since the start where there is no reset)."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024 / 1e9
    except OSError:
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / 1e9 if sys.platform == "darwin" else peak * 1024 / 1e9


def answers(directory: str, rows: list[dict]) -> list[tuple[str, str, str, bool]]:
    """Greedy answers of a checkpoint to the rows' questions: (question, taught, answer, whether it ended in [EOS])."""
    model, tok = load(directory)
    turns = [[message["content"] for message in messages_of(row)[:2]] for row in rows]
    answered = generate(model, [chat_prompt(question, tok) for question, _ in turns], max_new_tokens=200)
    found = []
    for (question, taught), ids in zip(turns, answered, strict=True):
        ended = ids[-1] == tok.eos_id
        found.append((question, taught, tok.decode(ids[:-1] if ended else ids), ended))
    return found


def as_taught(found: list) -> int:
    return sum(similarity(answer, taught) >= ALIKE for _, taught, answer, _ in found)


def main(cfg: Config) -> dict:
    out, data, stages = Path(cfg.out), Path(cfg.data), Stages()
    print(
        f"environment: Python {platform.python_version()}, torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads of {platform.machine()}, {'CUDA' if torch.cuda.is_available() else 'CPU'}"
    )
    text = {name: str(out / "text" / f"{name}.jsonl") for name in ("documents", "sft", "dpo")}
    tokenizer, tokens, run_of = (
        str(out / "tokenizer"),
        str(out / "tokens"),
        {n: str(out / n) for n in ("pretrain", "sft", "dpo")},
    )

    def clean_all():
        counts = [
            clean.main(clean.Config(input=[str(data / f"{name}.jsonl")], out=path, dedup=name == "documents"))
            for name, path in text.items()
        ]
        return counts[0]

    stages.run("clean", clean_all, lambda c: f"{c['read']} documents, {c['repeated']} repeated, {c['written']} kept")
    stages.run(
        "tokenizer",
        lambda: train_tokenizer.main(
            train_tokenizer.Config(input=list(text.values()), out=tokenizer, vocab_size=cfg.vocab_size)
        ),
        lambda r: f"{r['tokens']:,} tokens",
    )
    stages.run(
        "shards",
        lambda: shards.main(
            shards.Config(input=[text["documents"]], tokenizer=tokenizer, out=tokens, val_fraction=0.04)
        ),
        lambda r: f"{r['tokens']:,} tokens, {r['characters'] / r['tokens']:.2f} characters each",
    )
    common = {"save_every": 10_000, "keep": 0, "overwrite": True, "warmup": 10}
    stages.run(
        "pretrain",
        lambda: pretrain.main(
            pretrain.Config(
                data=tokens, tokenizer=tokenizer, out=run_of["pretrain"], preset="demo", epochs=cfg.pretrain_epochs,
                lr=6e-3, eval_every=20, batch_tokens=2048, **common,
            )
        ),
        lambda _: "validation {val_bits_per_byte:.2f} bits per byte".format(**read_metrics(run_of["pretrain"])[-1]),
    )  # fmt: skip
    stages.run(
        "sft",
        lambda: sft.main(
            sft.Config(
                init_from=run_of["pretrain"],
                data=[text["sft"]],
                out=run_of["sft"],
                epochs=cfg.sft_epochs,
                lr=3e-3,
                batch_tokens=2048,
                **common,
            )
        ),
        lambda _: "loss {loss:.3f}".format(**read_metrics(run_of["sft"])[-1]),
    )
    stages.run(
        "dpo",
        lambda: dpo.main(
            dpo.Config(
                init_from=run_of["sft"], data=[text["dpo"]], out=run_of["dpo"], epochs=cfg.dpo_epochs, batch_pairs=10,
                lr=1e-4, **common | {"warmup": 3},
            )
        ),
        lambda _: "margin {margin:.2f}, accuracy {accuracy:.0%}".format(**read_metrics(run_of["dpo"])[-1]),
    )  # fmt: skip
    rows = list(read_rows([text["sft"]]))
    found = stages.run(
        "answers",
        lambda: {name: answers(run_of[name], rows) for name in ("sft", "dpo")},
        lambda f: f"as taught: sft {as_taught(f['sft'])}, dpo {as_taught(f['dpo'])} of {len(rows)}",
    )
    picture = out / "loss.png"
    draw({"pretraining": [run_of["pretrain"]], "SFT": [run_of["sft"]], "DPO": [run_of["dpo"]]}, picture)

    print("\n== What it answers (greedy, out/demo/dpo)\n")
    for question, _, answer, ended in found["dpo"][:8]:
        print(f"提问：{question}\n回答：{answer}{' [EOS]' if ended else ' (no end)'}\n")
    unknown = [{"instruction": q, "output": ""} for q in ("感冒了可以运动吗？", "怎样种一棵苹果树？")]
    print("Two questions it was not taught; with so little text, expect the answer to another one, or nonsense:\n")
    for question, _, answer, ended in answers(run_of["dpo"], unknown):
        print(f"提问：{question}\n回答：{answer}{' [EOS]' if ended else ' (no end)'}\n")
    print(stages.table())
    ended = sum(e for *_, e in found["dpo"])
    print(f"\nloss curves: {picture}")
    for name in ("sft", "dpo"):
        print(
            f"{run_of[name]} answers {as_taught(found[name])} of {len(rows)} trained questions as taught (>= {ALIKE})"
        )
    print(f"{ended} of {len(rows)} answers end with [EOS]")
    print(f"\nChat with it:  {os.path.relpath(sys.executable)} generate.py --model {run_of['dpo']} --chat")
    return {"as_taught": {name: as_taught(found[name]) for name in found}, "ended": ended, "questions": len(rows)}


if __name__ == "__main__":
    run(Config, main)
