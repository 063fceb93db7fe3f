"""Every preference loss on the same pairs, from the same model: what each one moves.

    python bench/preferences.py --init-from out/sft --data dpo.jsonl --out out/losses

dpo.py runs once for each loss, with the same flags and each loss's own defaults. Then the model
answers the prompts of the held-out pairs, greedily. The first row is the model before DPO.

    accuracy     of held-out pairs, with its standard error
    by length    what a rule gets that knows only which answer is longer
    kl           KL(policy || reference), in nats a token of the held-out answers
    chosen       log-probability of a token of the chosen answers
    tokens       length of the model's own answers, cut at --max-new-tokens
    distinct-2   different pairs of neighbouring tokens in all answers, as a share of all pairs
    stops        answers that end by themselves
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from table import print_head, print_row

import dpo
from nanophi.cli import flag, run_command
from nanophi.infer.generate import generate
from nanophi.model.checkpoint import load_with_tokenizer
from nanophi.train.losses import PREFERENCE_LOSSES

PROMPTS_AT_ONCE = 16


@dataclass(kw_only=True)
class Config:
    init_from: str = flag(help="run directory of sft.py")
    data: list[str] = flag(help="preference pairs: files, directories or globs")
    out: str = flag(help="a directory for the runs")
    losses: list[str] | None = flag(None, help="fewer than all of them")
    epochs: float = flag(1.0, above=0, help="of each run")
    lr: float = flag(2e-4, above=0, help="peak learning rate of each run")
    sft_weight: float = flag(0.0, at_least=0, help="of each run")
    val_fraction: float = flag(0.2, above=0, at_most=0.9, help="share of the prompts held out")
    max_new_tokens: int = flag(120, at_least=1, help="longest answer")


def main(cfg: Config) -> None:
    rows = [("before", cfg.init_from, {})]
    for loss in cfg.losses or PREFERENCE_LOSSES:
        out = Path(cfg.out) / loss
        dpo.main(
            dpo.Config(
                init_from=cfg.init_from, data=cfg.data, out=str(out), loss=loss,
                epochs=cfg.epochs, lr=cfg.lr, sft_weight=cfg.sft_weight, eval_every=20,
                val_fraction=cfg.val_fraction, resume="auto", micro_batch=4, skip_bad=True,
            )
        )  # fmt: skip
        lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
        rows.append((loss, str(out), [line for line in lines if "val_margin" in line][-1]))

    print()
    print_head(
        "loss", "margin", "accuracy", "by length", "kl", "chosen", "tokens", "distinct-2", "stops"
    )
    for name, directory, line in rows:
        print_row(name, *measured(line), *spoken(directory, cfg))


def measured(line: dict[str, float]) -> list[str]:
    """The cells of what dpo.py has logged last; dashes for the model before it."""
    if not line:
        return ["-"] * 5
    return [
        f"{line['val_margin']:.2f}",
        f"{line['val_accuracy']:.1%} ± {line['val_accuracy_error']:.1%}",
        f"{line['val_accuracy_by_length']:.1%}",
        f"{line['val_kl']:.3f}",
        f"{line['val_logps_chosen'] / line['val_tokens_chosen']:.2f}",
    ]


def spoken(directory: str, cfg: Config) -> list[str]:
    """The cells of what a model answers to the held-out prompts."""
    model, tok = load_with_tokenizer(directory)
    context = model.cfg.max_position_embeddings
    _, held_out = dpo.read_pairs(cfg.data, tok, context, False, cfg.val_fraction, True)
    prompts = sorted({tuple(pair.chosen[0][: pair.chosen[1].index(True)]) for pair in held_out})
    answers: list[list[int]] = []
    for first in range(0, len(prompts), PROMPTS_AT_ONCE):
        some = [list(prompt) for prompt in prompts[first : first + PROMPTS_AT_ONCE]]
        answers += generate(model, some, cfg.max_new_tokens)
    stops = sum(answer[-1] == model.cfg.eos_token_id for answer in answers)
    return [
        f"{sum(map(len, answers)) / len(answers):.1f}",
        f"{distinct_pairs(answers):.3f}",
        f"{stops / len(answers):.0%}",
    ]


def distinct_pairs(answers: Iterable[list[int]]) -> float:
    """distinct-2 (Li et al. 2016).

    >>> distinct_pairs([[1, 2, 1, 2], [3, 1]])
    0.75
    """
    pairs = [pair for answer in answers for pair in pairwise(answer)]
    return len(set(pairs)) / max(len(pairs), 1)


if __name__ == "__main__":
    run_command(Config, main)
