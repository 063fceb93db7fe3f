"""Direct Preference Optimization: teach a fine-tuned model which of two answers is better.

    python dpo.py --init-from out/sft --data dpo.jsonl --out out/dpo --epochs 3 --lr 1e-4

Rows: {"prompt", "chosen", "rejected"}, in the template of SFT.

--loss chooses among a family: sigmoid is DPO itself, ipo gives the margin an aim, simpo needs no
reference. Both answers of a pair continue one prompt, which is computed once where it is long
enough (--share-prompt).

The reference is the model at the start. It is frozen, so its log-probabilities are computed once
and kept in --out, and no second model is kept.

The rewards of both answers often fall. That is normal: look at the margin between them. To see
whether the model learned more than the pairs by heart, look at the margin on held-out pairs
(--val-fraction).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

from nanophi.cli import UserError, flag, row_named, run_command
from nanophi.expect import check_settings
from nanophi.infer.samples import answer_length
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
    Dropped,
    TuningConfig,
    context_of,
    total_steps,
)
from nanophi.train.held_out import HeldOut, Reference, right_by_length
from nanophi.train.loop import train
from nanophi.train.losses import PREFERENCE_LOSSES, make_dpo_loss_fn
from nanophi.train.preferences import Conversation, Pairs, Preference, share_of_prompts
from nanophi.train.preflight import fit
from nanophi.train.reference import add_reference, digest_of_weights
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
    beta: float | None = flag(
        None,
        above=0,
        at_most=LARGEST_RATE,
        help="how strongly the policy is held to the reference (default: the loss's own)",
    )
    label_smoothing: float = flag(
        0.0,
        at_least=0,
        at_most=0.5,
        help="share of the pairs that may be the wrong way round (sigmoid losses)",
    )
    target_margin: float | None = flag(
        None, at_least=0, at_most=LARGEST_RATE, help="of rewards (simpo; default: the loss's own)"
    )
    sft_weight: float = flag(
        0.0,
        at_least=0,
        at_most=LARGEST_RATE,
        help="add so much of the chosen answer's own loss, which keeps it likely",
    )
    share_prompt: Literal["auto", "on", "off"] = flag(
        "auto", help="compute the prompt of a pair once; auto: where prompts are long enough"
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
    refuse_contradictions(cfg)
    if cfg.beta is None:
        cfg = replace(cfg, beta=PREFERENCE_LOSSES[cfg.loss].beta)  # run.json says what it was
    if cfg.compile is None:  # pairs that share their prompts have many forms, each compiled anew
        cfg = replace(cfg, compile=False)
    setup = begin(cfg, starts_from=cfg.init_from)

    # 2. The fine-tuned model. It has no dropout, unless --dropout asks for it: dropout makes policy
    #    and reference differ by chance.
    model, tok = load_with_tokenizer(cfg.init_from, setup.world.device, cfg.template)
    model.attention = cfg.attention
    model.set_dropout(cfg.dropout or 0.0)

    # 3. The data: pairs of conversations, some held out by their prompts.
    context = context_of(cfg, model)
    pairs, kept_back = read_pairs(cfg.data, tok, context, cfg.bos, cfg.val_fraction, cfg.skip_bad)
    multiple = max(128, context // 4) if cfg.compile else 1  # few lengths to compile
    share = shares_prompts(cfg, pairs)
    data = Pairs(pairs, cfg.batch_pairs, cfg.seed, multiple, share)
    rows_of_a_pair = 1 if share else 2
    setup = fit(model.cfg, setup, cfg.batch_pairs, data.longest, rows_of_a_pair, model)
    validation = (
        Pairs(kept_back, setup.micro_batch, cfg.seed, multiple, share) if kept_back else None
    )
    steps = total_steps(cfg, data.steps_per_epoch, "--batch-pairs", cfg.batch_pairs)
    weights = digest_of_weights(model)

    # 4. The reference: what the model thinks of all answers before it learns, in the same dtype.
    if PREFERENCE_LOSSES[cfg.loss].reference:
        parts = [data] if validation is None else [data, validation]
        add_reference(model, parts, setup, weights)

    # 5. The loss, and what is measured on the held-out pairs: now, and at each evaluation.
    loss_fn = make_dpo_loss_fn(
        cfg.beta,
        cfg.loss,
        label_smoothing=cfg.label_smoothing,
        target_margin=cfg.target_margin,
        sft_weight=cfg.sft_weight,
    )
    held_out = None
    if validation is not None and setup.writes:
        reference = None  # a sharded model may be too large to stand a second time on each rank
        if not cfg.shard:
            device = setup.world.device
            reference = Reference(cfg.init_from, cfg.template, cfg.attention, device, weights)
        by_length = right_by_length(pairs, kept_back)
        answer_tokens = answers_of(kept_back)
        world = setup.world
        held_out = HeldOut(validation, loss_fn, by_length, reference, answer_tokens, world)
        with setup.autocast(cache=True):
            held_out(model)

    # 6. Training.
    print(
        f"dpo: {steps:,} steps of {cfg.batch_pairs} pairs = "
        f"{steps / data.steps_per_epoch:.1f} epochs -> {cfg.out}"
    )
    train(
        model,
        loss_fn,
        data.batch_at,
        setup,
        held_out,
        steps=steps,
        tok=tok,
        data_id=f"{data.data_id}-{weights}",
    )

    # 7. What was learned beyond length.
    if held_out is not None:
        with setup.autocast(cache=True):
            print(f"dpo: {held_out.summary(held_out(model))}")
    return model


def answers_of(pairs: list[Preference], most: int = 16) -> Callable[[Phi], float]:
    """A function of a model: how long its answers to some of these prompts are.

    An answer is cut where it is twice as long as the longest one that was chosen.
    """
    some = pairs[:: -(-len(pairs) // most)]
    prompts = [pair.chosen[0][: pair.chosen[1].index(True)] for pair in some]
    longest = max(sum(pair.chosen[1]) for pair in some)
    return partial(answer_length, prompts=prompts, longest=2 * longest)


def read_pairs(
    paths: list[str],
    tok: Tokenizer,
    context: int,
    bos: bool,
    val_fraction: float = 0.0,
    skip_bad: bool = False,
) -> tuple[list[Preference], list[Preference]]:
    """The pairs to train on and those held out, split by prompt; those that teach nothing are
    dropped and counted. A UserError where none is left to train on.
    """
    bad = BadRows()
    dropped = Dropped()
    training: list[Preference] = []
    held_out: list[Preference] = []
    for prompt, *answers in read_rows(paths, use=preference_of, on_bad=bad):
        question = {"role": "user", "content": prompt}
        sides = [
            encode_chat([question, {"role": "assistant", "content": answer}], tok, bos)
            for answer in answers
        ]
        reason = fault_of(sides, answers, context)
        if reason is not None:
            dropped(reason, prompt)
            continue
        part = held_out if in_share(prompt, val_fraction) else training
        part.append(Preference(*sides))
    bad.settle(skip_bad)
    counted = f", {len(held_out):,} held out" if val_fraction else ""
    print(f"dpo: {len(training):,} pairs{counted}")
    dropped.tell("dpo")
    if not training:
        held = f"{len(held_out):,} held out (--val-fraction), " if held_out else ""
        raise UserError(
            f"no pair in {', '.join(paths)} is left to train on: {held}{dropped} dropped; "
            "give more pairs, or a longer --context"
        )
    if val_fraction and not held_out:
        print(
            f"note: --val-fraction {val_fraction:g} holds out none of {len(training):,} pairs, "
            "so nothing is validated: raise it"
        )
    return training, held_out


def fault_of(sides: list[Conversation], answers: list[str], context: int) -> str | None:
    """Why a pair teaches nothing; None where it can be learned."""
    chosen, rejected = (answer.strip() for answer in answers)
    if not chosen or not rejected:
        return "with an empty answer"
    if chosen == rejected:
        return "whose answers are equal"
    if any(mask.index(True) >= context for _, mask in sides):
        return f"whose question alone fills {context} tokens"
    if max(len(ids) for ids, _ in sides) - 1 > context:
        return f"longer than {context} tokens"
    return None


def refuse_contradictions(cfg: Config) -> None:
    """A UserError for numbers that the loss does not take, and for what cannot share prompts."""
    check_settings(cfg)
    takes = row_named(PREFERENCE_LOSSES, cfg.loss, "loss").takes
    given = {"label_smoothing": cfg.label_smoothing, "target_margin": cfg.target_margin}
    for name, value in given.items():
        if value and name not in takes:
            flag_name = name.replace("_", "-")
            raise UserError(f"--loss {cfg.loss} takes no --{flag_name}: leave it out")
    if cfg.share_prompt == "on" and cfg.attention == "causal":
        raise UserError(
            "--share-prompt on with --attention causal: there the answers of a pair would see each "
            "other"
        )


# Shorter prompts than this share of all inputs are computed twice: then attention over whole
# documents, prompt and answer side by side, costs more than is saved.
LONG_ENOUGH = 0.1


def shares_prompts(cfg: Config, pairs: list[Preference]) -> bool:
    """Whether each pair computes its prompt once; says what that saves.

    torch.compile would compile each new form of a batch, so auto leaves compiled runs as they are.
    """
    saved = share_of_prompts(pairs)
    if cfg.share_prompt == "auto":
        can = cfg.attention != "causal" and not cfg.compile
        shares = can and saved >= LONG_ENOUGH
    else:
        shares = cfg.share_prompt == "on"
    if shares:
        print(f"dpo: each pair computes its prompt once, which saves {saved:.0%} of all inputs")
    return shares


if __name__ == "__main__":
    run_command(Config, main)
