"""What DPO measures on pairs that it does not learn from; a line in words where a run goes wrong.

val_loss, val_margin, ...    means over the pairs, see `losses.measures`
val_accuracy_error           its standard error
val_accuracy_by_length       what a rule gets that knows only which answer is longer
val_kl                       KL(policy || reference) at the tokens of the answers, in nats
val_answer_tokens            how long the model's own answers are
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nanophi.cli import UserError
from nanophi.model.checkpoint import load_with_tokenizer
from nanophi.model.phi import Phi
from nanophi.train.distributed import ALONE, World
from nanophi.train.losses import LossFn, chunk_size, learned_positions, validate
from nanophi.train.preferences import Pairs, Preference
from nanophi.train.reference import digest_of_weights


@dataclass
class HeldOut:
    """An `evaluate` for the training loop.

    pairs:      the held-out pairs
    by_length:  the accuracy of `right_by_length`
    reference:  gives the frozen model again; None where KL is not to be measured
    answer_tokens: how many tokens a model's own answers to held-out prompts have, on average
    world:      its ranks divide the pairs; all of them write the answers, which are few
    """

    pairs: Pairs
    loss_fn: LossFn
    by_length: float
    reference: "Reference | None"
    answer_tokens: Callable[[Phi], float]
    world: World = ALONE
    watch: "Watch" = field(default_factory=lambda: Watch())

    def __call__(self, model: Phi) -> dict[str, float]:
        """What is measured of a model."""
        means = validate(model, self.loss_fn, self.pairs.in_order(), self.world)
        share = means["val_accuracy"]
        means["val_accuracy_error"] = math.sqrt(share * (1 - share) / len(self.pairs))
        means["val_accuracy_by_length"] = self.by_length
        means["val_answer_tokens"] = self.answer_tokens(model)
        reference = self.reference.again() if self.reference is not None else None
        all_have_it = all(self.world.gather(reference is not None))
        if reference is not None and all_have_it:
            means["val_kl"] = divergence(model, reference, self.pairs, self.world)
        self.watch.look(means)
        return means

    def summary(self, means: dict[str, float]) -> str:
        """What was learned beyond length, in a line."""
        return (
            f"held-out pairs: margin {means['val_margin']:.2f}, accuracy "
            f"{means['val_accuracy']:.0%} ± {means['val_accuracy_error']:.0%} (one standard "
            f"error), where length alone would be right in {self.by_length:.0%}"
        )


# ---- how far the policy has gone from the reference


@torch.no_grad()
def divergence(policy: Phi, reference: Phi, pairs: Pairs, world: World = ALONE) -> float:
    """KL(policy || reference), the mean over all tokens of all answers, in nats a token.

    At each token both models give a distribution over the vocabulary:

        sum over v of p(v) (log p(v) - log q(v))      p policy, q reference

    It is exact at these tokens. What RLHF bounds is the same along answers that the policy writes
    itself.

    world: its ranks divide the pairs, and all get the mean
    """
    was_training = policy.training
    policy.eval()
    total = 0.0
    tokens = 0
    for batch, counts in world.turns(pairs.in_order()):
        if not counts:
            continue
        batch = batch.to(policy.device)
        hidden, _ = learned_positions(policy, batch)
        of_reference, _ = learned_positions(reference, batch)
        chunk = chunk_size(policy.cfg.vocab_size, hidden.device.type, hidden.dtype)
        for rows, others in zip(hidden.split(chunk), of_reference.split(chunk), strict=True):
            total += kl(policy.lm_head(rows), reference.lm_head(others)).sum().item()
        tokens += len(hidden)
    policy.train(was_training)
    sums = torch.tensor([total, tokens], dtype=torch.float64, device=world.device)
    total, counted = world.add(sums).tolist()
    return total / counted


def kl(logits: Tensor, others: Tensor) -> Tensor:
    """KL divergence of each row of logits from the same row of others: (N, V), (N, V) -> (N,).

    >>> p, q = torch.tensor([[0.5, 0.5]]), torch.tensor([[0.25, 0.75]])
    >>> kl(p.log(), q.log())  # 0.5 ln 2 + 0.5 ln (2 / 3)
    tensor([0.1438])
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    log_p = logits.to(dtype).log_softmax(-1)
    log_q = others.to(dtype).log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


@dataclass
class Reference:
    """The frozen reference again, from where the run started: no second model is kept.

    weights: what `digest_of_weights` gave at the start. Where the checkpoint has changed since, or
    cannot be read, a note says so once, and there is no reference.
    """

    path: str
    template: str | None
    attention: str
    device: str
    weights: str
    lost: bool = False

    def again(self) -> Phi | None:
        """The model as it was at the start, read anew; None where that cannot be."""
        if self.lost:
            return None
        try:
            model, _ = load_with_tokenizer(self.path, self.device, self.template)
            if digest_of_weights(model) != self.weights:
                raise UserError(f"{self.path} has changed since the start")
        except (UserError, OSError) as error:
            print(f"note: {error}: the KL to the reference is no longer measured")
            self.lost = True
            return None
        model.attention = self.attention
        return model.eval()


# ---- what length alone tells


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


# ---- what goes wrong

LARGEST_FALL = 0.5  # nats a token
LARGEST_MARGIN = 20.0  # sigmoid(20) is 1 to eight digits: nothing more is to be learned there
LARGEST_GROWTH = 1.5  # of the model's own answers
FEW_TOKENS = 8  # answers that have grown by less are as long as they were


class Watch:
    """Says in words, once each, when a run goes where DPO is known to go wrong."""

    def __init__(self) -> None:
        self.start: dict[str, float] | None = None  # what was measured first, before training
        self.said: set[str] = set()

    def look(self, means: dict[str, float]) -> None:
        """means: what an evaluation has measured."""
        self.start = means if self.start is None else self.start
        fall = logp_of_chosen(self.start) - logp_of_chosen(means)
        if fall > LARGEST_FALL:
            self.say(
                "less likely",
                f"chosen answers have become less likely, by {fall:.1f} nats a token: lower --lr, "
                "raise --beta, or give --sft-weight 0.1",
            )
        if means["val_margin"] > LARGEST_MARGIN:
            self.say(
                "margin",
                f"the margin of rewards is {means['val_margin']:.0f}, where nothing more is to be "
                "learned: take fewer --steps, or --loss ipo, whose margin has an aim",
            )
        before, now = self.start["val_answer_tokens"], means["val_answer_tokens"]
        if now > max(LARGEST_GROWTH * before, before + FEW_TOKENS):
            self.say(
                "longer",
                f"the model's own answers have grown from {before:.0f} to {now:.0f} tokens: it may "
                "learn length in place of content; --loss sigmoid-norm counts by token",
            )

    def say(self, kind: str, line: str) -> None:
        if kind not in self.said:
            print(f"note: {line}")
            self.said.add(kind)


def logp_of_chosen(means: dict[str, float]) -> float:
    """The mean log-probability of a token of the chosen answers, about."""
    return means["val_logps_chosen"] / means["val_tokens_chosen"]
