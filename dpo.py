"""Direct Preference Optimization: teach a fine-tuned model which of two answers is better.

    python dpo.py --init-from out/sft --data dpo.jsonl --out out/dpo --epochs 3 --lr 1e-4

Rows: {"prompt", "chosen", "rejected"}, in the template of SFT.

The reference is the model at the start. It is frozen, so its log-probabilities are computed once
and no second model is kept. The rewards of both answers often fall. That is normal: look at the
margin between them. To see whether the model learned more than the pairs by heart, look at the
margin on held-out pairs (--val-fraction).
"""

from dataclasses import dataclass

import torch

from nanophi.cli import Progress, UserError, flag, run_command
from nanophi.model.checkpoint import load_with_tokenizer
from nanophi.model.phi import Phi
from nanophi.text.corpus import read_rows
from nanophi.text.schemas import preference_of
from nanophi.text.share import in_share
from nanophi.tokenizer.chat import encode_chat
from nanophi.tokenizer.tokenizer import Tokenizer
from nanophi.train.config import (
    LARGEST_RATE,
    MOST_SAMPLES,
    MOST_STEPS,
    BadRows,
    TuningConfig,
    context_of,
    total_steps,
)
from nanophi.train.loop import train
from nanophi.train.losses import PREFERENCE_LOSSES, answer_logps, make_dpo_loss_fn, validate
from nanophi.train.packing import digest
from nanophi.train.preferences import Pairs, Preference
from nanophi.train.preflight import refuse_what_does_not_fit
from nanophi.train.setup import begin


@dataclass(kw_only=True)
class Config(TuningConfig):
    """The flags of this script. Those that all training scripts share are in train/config.py."""

    init_from: str = flag(help="run directory of sft.py")
    data: list[str] = flag(help="preference pairs: files, directories or globs")
    batch_pairs: int = flag(
        16,
        at_least=1,
        at_most=MOST_SAMPLES,
        help="pairs of one optimizer step over all devices",
    )
    loss: str = flag("sigmoid", choices=PREFERENCE_LOSSES, help="sigmoid is DPO's own")
    beta: float = flag(
        0.1,
        above=0,
        at_most=LARGEST_RATE,
        help="how strongly the policy is held to the reference",
    )
    lr: float = flag(
        2e-4,
        above=0,
        at_most=LARGEST_RATE,
        help="peak learning rate; with muon that of the matrices, the rest has half of it",
    )
    warmup: int = flag(5, at_least=0, at_most=MOST_STEPS, help="steps until the peak learning rate")
    val_fraction: float = flag(
        0.0,
        at_least=0,
        at_most=0.9,
        help="share of the prompts whose pairs are held out for validation",
    )


def main(cfg: Config) -> Phi:
    # 1. Check the flags and --out; find the device, the dtype and the ranks.
    setup = begin(cfg, starts_from=cfg.init_from)

    # 2. The fine-tuned model. It has no dropout, unless --dropout asks for it: dropout makes policy
    #    and reference differ by chance.
    model, tok = load_with_tokenizer(cfg.init_from, setup.world.device)
    model.attention = cfg.attention
    model.set_dropout(cfg.dropout or 0.0)

    # 3. The data: pairs of conversations, some held out by their prompts.
    context = context_of(cfg, model)
    pairs, held_out = read_pairs(cfg.data, tok, context, cfg.bos, cfg.val_fraction, cfg.skip_bad)
    multiple = max(128, context // 4) if cfg.compile else 1  # few lengths to compile
    data = Pairs(pairs, cfg.batch_pairs, cfg.seed, multiple)
    validation = Pairs(held_out, cfg.micro_batch, cfg.seed, multiple) if held_out else None
    refuse_what_does_not_fit(model.cfg, setup, cfg.batch_pairs, data.longest, 2, model)
    steps = total_steps(cfg, data.steps_per_epoch, "--batch-pairs", cfg.batch_pairs)
    data_id = f"{data.data_id}-{digest_of_weights(model)}"

    # 4. The reference: what the model thinks of all answers before it learns, in the same dtype.
    with setup.autocast(cache=True):
        data.reference = reference_logps(model, data, cfg.micro_batch)
        if validation is not None:
            validation.reference = reference_logps(model, validation, cfg.micro_batch)

    # 5. Training.
    loss_fn = make_dpo_loss_fn(cfg.beta, cfg.loss)

    def evaluate(model: Phi) -> dict[str, float]:
        return validate(model, loss_fn, validation.in_order())

    print(
        f"dpo: {steps:,} steps of {cfg.batch_pairs} pairs = "
        f"{steps / data.steps_per_epoch:.1f} epochs -> {cfg.out}"
    )
    train(
        model,
        loss_fn,
        data.batch_at,
        setup,
        evaluate if validation is not None else None,
        steps=steps,
        tok=tok,
        data_id=data_id,
    )

    # 6. What was learned beyond length.
    if validation is not None and setup.writes:
        with setup.autocast(cache=True):
            means = evaluate(model)
        print(
            f"dpo: held-out pairs: margin {means['val_margin']:.2f}, accuracy "
            f"{means['val_accuracy']:.0%}, where length alone would be right in "
            f"{right_by_length(pairs, held_out):.0%}"
        )
    return model


def read_pairs(
    paths: list[str],
    tok: Tokenizer,
    context: int,
    bos: bool,
    val_fraction: float = 0.0,
    skip_bad: bool = False,
) -> tuple[list[Preference], list[Preference]]:
    """The pairs to train on and those held out, split by prompt; too long ones are dropped and
    counted. A UserError where none is left to train on.
    """
    bad = BadRows()
    training: list[Preference] = []
    held_out: list[Preference] = []
    too_long = 0
    for prompt, *answers in read_rows(paths, use=preference_of, on_bad=bad):
        question = {"role": "user", "content": prompt}
        sides = [
            encode_chat([question, {"role": "assistant", "content": answer}], tok, bos)
            for answer in answers
        ]
        if max(len(ids) for ids, _ in sides) - 1 > context:
            too_long += 1
            continue
        part = held_out if in_share(prompt, val_fraction) else training
        part.append(Preference(*sides))
    bad.settle(skip_bad)
    counted = f", {len(held_out):,} held out" if val_fraction else ""
    print(
        f"dpo: {len(training):,} pairs{counted}; {too_long:,} longer than {context} tokens dropped"
    )
    if not training:
        raise UserError(
            f"no pair in {', '.join(paths)} is left to train on: {too_long:,} are longer than "
            f"{context} tokens (--context), {len(held_out):,} are held out (--val-fraction)"
        )
    if val_fraction and not held_out:
        print(
            f"note: --val-fraction {val_fraction:g} holds out none of {len(training):,} pairs, "
            "so nothing is validated: raise it"
        )
    return training, held_out


def digest_of_weights(model: Phi) -> str:
    """Names the reference: a run can be resumed only with the same one."""
    return digest(*(p.detach().flatten().cpu().view(torch.int32) for p in model.parameters()))


@torch.no_grad()
def reference_logps(model: Phi, data: Pairs, micro_batch: int) -> torch.Tensor:
    """log p(answer | prompt) of both answers of every pair under the frozen reference: (pairs, 2),
    on the CPU.
    """
    logps = []
    with Progress("reference", len(data)) as bar:
        for first in range(0, len(data), micro_batch):
            batch = data.batch(range(first, min(first + micro_batch, len(data))))
            logps.append(answer_logps(model, batch.to(model.device)).view(-1, 2).cpu())
            bar.update(len(batch))
    return torch.cat(logps)


def right_by_length(training: list[Preference], held_out: list[Preference]) -> float:
    """The accuracy on held-out pairs of a rule that knows only lengths.

    It chooses the longer answer, or the shorter one if the training pairs prefer that. A model with
    a lower accuracy has learned nothing about content.
    """
    longer = share_of_longer(held_out)
    return longer if share_of_longer(training) >= 0.5 else 1 - longer


def share_of_longer(pairs: list[Preference]) -> float:
    """How often the chosen answer is the longer one; a tie counts half."""
    points = 0.0
    for pair in pairs:
        chosen = len(pair.chosen[0])
        rejected = len(pair.rejected[0])
        points += 1.0 if chosen > rejected else 0.5 if chosen == rejected else 0.0
    return points / len(pairs)


if __name__ == "__main__":
    run_command(Config, main)
