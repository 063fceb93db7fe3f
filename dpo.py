"""Direct Preference Optimization: teach a fine-tuned model which of two answers is better.

    python dpo.py --init-from out/sft --data dpo.jsonl --out out/dpo --epochs 3 --lr 1e-4

Rows: {"prompt", "chosen", "rejected"}, in the template of SFT. The reference is the model at the start; being frozen,
its log-probabilities are computed once and no second model is kept. Falling rewards of both answers are normal: what
counts is the margin between them, on held-out pairs (--val-fraction) if one wants to know whether it learned more than
the pairs by heart.
"""

from dataclasses import dataclass

import torch

from nanophi.cli import Progress, flag, run_command
from nanophi.model.checkpoint import load_with_tokenizer
from nanophi.model.phi import Phi
from nanophi.text.corpus import read_rows
from nanophi.text.schemas import preference_of
from nanophi.text.share import in_share
from nanophi.tokenizer.chat import encode_chat
from nanophi.tokenizer.tokenizer import Tokenizer
from nanophi.train.distributed import join
from nanophi.train.loop import TrainConfig, context_of, precision, total_steps, train
from nanophi.train.losses import answer_logps, make_dpo_loss_fn, validate
from nanophi.train.packing import Pair, Pairs, digest
from nanophi.train.rundir import claim


@dataclass(kw_only=True)
class Config(TrainConfig):
    init_from: str = flag(help="run directory of sft.py")
    data: list[str] = flag(help="preference pairs: files, directories or globs")
    batch_pairs: int = flag(16, at_least=1, help="pairs of one optimizer step over all devices")
    beta: float = flag(0.1, above=0, help="how strongly the policy is held to the reference")
    lr: float = flag(
        2e-4,
        above=0,
        help="peak learning rate; with muon that of the matrices, the rest has half of it",
    )
    warmup: int = flag(5, at_least=0, help="steps until the peak learning rate")
    val_fraction: float = flag(
        0.0,
        at_least=0,
        at_most=0.9,
        help="share of the prompts whose pairs are held out for validation",
    )


def read_pairs(
    paths: list[str], tok: Tokenizer, context: int, bos: bool, val_fraction: float = 0.0
) -> tuple[list[Pair], list[Pair]]:
    """The pairs to train on and those held out, split by prompt; too long ones are dropped and counted."""
    pairs, held_out, too_long = [], [], 0
    for prompt, *answers in read_rows(paths, use=preference_of):
        sides = [
            encode_chat(
                [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}],
                tok,
                bos,
            )
            for answer in answers
        ]
        if max(len(ids) for ids, _ in sides) - 1 > context:
            too_long += 1
        else:
            (held_out if in_share(prompt, val_fraction) else pairs).append(Pair(*sides))
    held = f", {len(held_out):,} held out" if val_fraction else ""
    print(f"dpo: {len(pairs):,} pairs{held}; {too_long:,} longer than {context} tokens dropped")
    return pairs, held_out


def right_by_length(pairs: list[Pair], held_out: list[Pair]) -> float:
    """How often the better answer is the longer one (or the shorter, where training pairs say so): the share of
    held-out pairs that one tells apart without reading. Accuracy below it has learned nothing about content."""

    def longer(of: list[Pair]) -> float:
        lengths = [(len(pair.chosen[0]), len(pair.rejected[0])) for pair in of]
        return sum((a > b) + 0.5 * (a == b) for a, b in lengths) / len(lengths)

    return longer(held_out) if longer(pairs) >= 0.5 else 1 - longer(held_out)


@torch.no_grad()
def reference_logps(model: Phi, data: Pairs, micro_batch: int) -> torch.Tensor:
    """log p(answer | prompt) of both answers of every pair under the frozen reference: (pairs, 2), on the CPU."""
    device = model.lm_head.weight.device
    found = []
    with Progress("reference", len(data)) as bar:
        for first in range(0, len(data), micro_batch):
            batch = data.batch(range(first, min(first + micro_batch, len(data))))
            found.append(answer_logps(model, batch.to(device)).view(-1, 2).cpu())
            bar.update(len(batch))
    return torch.cat(found)


def main(cfg: Config) -> Phi:
    claim(cfg)
    world = join(cfg.device)
    model, tok = load_with_tokenizer(cfg.init_from, world.device)
    model.attention = cfg.attention
    model.set_dropout(cfg.dropout or 0.0)  # or policy and reference would differ by chance
    pairs, held_out = read_pairs(cfg.data, tok, context_of(cfg, model), cfg.bos, cfg.val_fraction)
    multiple = max(128, context_of(cfg, model) // 4) if cfg.compile else 1  # few lengths to compile
    data = Pairs(pairs, cfg.batch_pairs, cfg.seed, multiple)
    data_id = f"{data.data_id}-{digest(*(p.detach().flatten().cpu().view(torch.int32) for p in model.parameters()))}"
    validation = Pairs(held_out, cfg.micro_batch, cfg.seed, multiple) if held_out else None
    with precision(
        cfg, world.device
    ):  # as the policy computes, or they would differ from the start
        for part in filter(None, (data, validation)):
            part.reference = reference_logps(model, part, cfg.micro_batch)
    steps = total_steps(cfg, data.steps_per_epoch)
    print(
        f"dpo: {steps:,} steps of {cfg.batch_pairs} pairs = {steps / data.steps_per_epoch:.1f} epochs -> {cfg.out}"
    )
    loss_fn = make_dpo_loss_fn(cfg.beta)
    evaluate = None
    if validation:

        def evaluate(model):
            return validate(model, loss_fn, validation.in_order())

    train(
        model,
        loss_fn,
        data.batch_at,
        cfg,
        evaluate,
        cfg.resume,
        steps=steps,
        tok=tok,
        data_id=data_id,
    )
    if evaluate and not (cfg.show_batch or cfg.overfit_one_batch):
        with precision(cfg, world.device):
            found = evaluate(model)
        print(
            "dpo: held-out pairs: margin {val_margin:.2f}, accuracy {val_accuracy:.0%}, ".format(
                **found
            )
            + f"where length alone would be right in {right_by_length(pairs, held_out):.0%}"
        )
    return model


if __name__ == "__main__":
    run_command(Config, main)
