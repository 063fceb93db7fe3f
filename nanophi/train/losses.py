"""Losses: pure functions of tensors, and the loss functions of the loop, which are built from them.

    loss_fn(model, batch) -> (sum of losses, count, sums of metrics)

A loss function returns sums, not means: the step divides by the count of all its micro-batches and
ranks, so that a token of a short batch weighs as much as one of a long batch.

    N learned tokens, B rows, D width, V vocabulary
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from nanophi.cli import UserError, row_named
from nanophi.expect import Expected, check
from nanophi.model.phi import Phi
from nanophi.train.distributed import ALONE, World
from nanophi.train.packing import Batch

LossFn = Callable[[Phi, Batch], tuple[Tensor, int, dict[str, Tensor]]]
Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]  # x W^T + b


# ---- the next token: pretraining and SFT


def next_token_loss(model: Phi, batch: Batch) -> tuple[Tensor, int, dict[str, Tensor]]:
    """Cross entropy over the positions with a target, for pretraining and SFT.

    Returns (sum of the losses in nats, (); number of targets; no metrics).
    """
    hidden, targets = learned_positions(model, batch)
    head = model.lm_head
    loss = head_cross_entropy(
        hidden, head.weight, head.bias, targets, product_of(head), softmax_loss_of(head)
    )
    return loss, len(hidden), {}


def learned_positions(model: Phi, batch: Batch) -> tuple[Tensor, Tensor]:
    """Hidden states (N, D) and targets (N,) of the positions with a target."""
    hidden = model.hidden(
        batch.ids, batch.cu_seqlens, branches=batch.branches, longest=batch.longest
    )
    learned = hidden.flatten(0, 1).index_select(0, batch.learned)
    return learned, batch.targets.flatten().index_select(0, batch.learned)


def product_of(head: nn.Linear) -> Product:
    """How the head multiplies: by F.linear, or by what speed.py has put in its place."""
    return getattr(head, "product", F.linear)


def softmax_loss_of(head: nn.Linear) -> "SoftmaxLoss":
    """`softmax_loss`, or what speed.py has put in its place."""
    return getattr(head, "softmax_loss", None) or softmax_loss


def plain_cross_entropy(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
    """Summed cross entropy of the head's logits, as it is said.

    hidden (N, D), weight (V, D), bias (V,), targets (N,) -> (). The logits (N, V) are by far the
    largest tensor of a step, and so are their gradients.
    """
    return F.cross_entropy(F.linear(hidden, weight, bias), targets, reduction="sum")


def head_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    targets: Tensor,
    product: Product = F.linear,
    softmax: "SoftmaxLoss | None" = None,
) -> Tensor:
    """`plain_cross_entropy` in far less memory: the logits of one chunk of tokens at a time.

    It can be differentiated once.

    product: how the head multiplies, x W^T + b
    softmax: does what `softmax_loss` does
    """
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        # Cast here, once; otherwise autocast casts the weight again for every chunk.
        hidden = hidden.to(torch.get_autocast_dtype(device))
    # Inside of `forward` autograd is always off, so whether a gradient is needed is asked here.
    needs_gradient = torch.is_grad_enabled()
    softmax = softmax or softmax_loss
    return _HeadCrossEntropy.apply(hidden, weight, bias, targets, needs_gradient, product, softmax)


# Tokens whose logits exist at once on a CPU: 512 x 8192 of them take 16 MB and fit its cache.
CHUNK = 512
# Logits that exist at once on a GPU; with their copies, 12 bytes each, they take 1.6 GB. Each chunk
# reads and writes the whole gradient of the head, so few and large chunks are better there.
LOGITS_ON_GPU = 2**27


def chunk_size(vocabulary: int, device: str, dtype: torch.dtype) -> int:
    """Tokens whose logits exist at once.

    device: its type, "cpu" or "cuda". dtype: that of the hidden states; in fp16 the chunk is small,
    because the sum of many gradients could overflow.
    """
    if device == "cpu" or dtype == torch.float16:
        return CHUNK
    return max(CHUNK, LOGITS_ON_GPU // vocabulary)


SoftmaxLoss = Callable[[Tensor, Tensor, bool], tuple[Tensor, Tensor, Tensor]]


def softmax_loss(
    logits: Tensor, targets: Tensor, needs_gradient: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Summed cross entropy of logits (N, V), which it overwrites, and its gradients:

        loss ()    d_logits (N, V)    and its sum over the tokens (V,), the gradient of the bias

    The gradient of cross entropy by the logits is softmax - onehot(target):

        softmax 0.2 0.5 0.3, target 1      gradient 0.2 -0.5 0.3

    Without `needs_gradient` both are empty.
    """
    dtype = logits.dtype
    logits = logits.to(torch.promote_types(dtype, torch.float32))
    target = targets[:, None]
    target_logit = logits.gather(1, target)
    largest = logits.amax(-1, keepdim=True)
    exps = logits.sub_(largest).exp_()  # in place: one tensor (N, V) is enough
    total = exps.sum(-1, keepdim=True)
    loss = (total.log() + largest - target_logit).sum()
    if not needs_gradient:
        return loss, logits.new_empty(0), logits.new_empty(0)
    d_logits = exps.div_(total)  # softmax
    minus_one = torch.full_like(target, -1, dtype=d_logits.dtype)
    d_logits.scatter_add_(1, target, minus_one)  # - onehot(target)
    return loss, d_logits.to(dtype), d_logits.sum(0)


class _HeadCrossEntropy(torch.autograd.Function):
    """The sum of -log softmax(hidden W^T + b)[target], with the logits of one chunk at a time.

    The gradient is known as soon as the logits are, see `softmax_loss`. So forward computes all
    gradients too, and backward only scales them: the logits exist once and are not recomputed.
    """

    @staticmethod
    def forward(
        ctx,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor,
        targets: Tensor,
        needs_gradient: bool,
        product: Product,
        softmax: SoftmaxLoss,
    ) -> Tensor:
        cast_weight = weight.to(hidden.dtype)
        cast_bias = bias.to(hidden.dtype)
        sum_dtype = torch.promote_types(hidden.dtype, torch.float32)
        d_hidden = torch.empty_like(hidden)
        d_weight = torch.zeros_like(weight)
        d_bias = torch.zeros_like(bias)
        loss = torch.zeros((), dtype=sum_dtype, device=hidden.device)
        chunk = chunk_size(len(weight), hidden.device.type, hidden.dtype)
        for start in range(0, len(hidden), chunk):
            rows = hidden[start : start + chunk]
            logits = product(rows, cast_weight, cast_bias)  # (chunk, V)
            part, d_logits, d_bias_part = softmax(
                logits, targets[start : start + chunk], needs_gradient
            )
            loss += part
            if not needs_gradient:
                continue
            d_bias += d_bias_part
            d_hidden[start : start + chunk] = product(d_logits, cast_weight.t(), None)
            if rows.dtype == d_weight.dtype:
                d_weight.addmm_(d_logits.t(), rows)  # without another tensor (V, D)
            else:
                d_weight += d_logits.t() @ rows
        ctx.save_for_backward(d_hidden, d_weight, d_bias)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, d_loss: Tensor):
        # In place: d_weight is as large as the head, and backward runs only once.
        d_hidden, d_weight, d_bias = (gradient.mul_(d_loss) for gradient in ctx.saved_tensors)
        return d_hidden, d_weight, d_bias, None, None, None, None


# ---- preferences: DPO and its family


def answer_logps(model: Phi, batch: Batch) -> Tensor:
    """log p(answer | prompt) of each answer, summed over its learned tokens: (answers,).

    Two answers, each with its prompt in a row of 4 places:

        learned places in the flattened batch   2    3    5    6    7
        their log-probabilities                -1   -2   -1   -1   -3
        their answers, batch.answer             0    0    1    1    1     -> [-3, -5]
    """
    hidden, targets = learned_positions(model, batch)
    chunk = chunk_size(model.cfg.vocab_size, hidden.device.type, hidden.dtype)

    def logps_of(rows: Tensor, answer_ids: Tensor) -> Tensor:
        logits = model.lm_head(rows)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return -F.cross_entropy(logits, answer_ids, reduction="none")

    # Here the gradient of each token gets a factor that depends on the loss of the whole answer,
    # which is known only later. So backward computes the logits of each chunk again.
    recomputed = partial(checkpoint, logps_of, use_reentrant=False, preserve_rng_state=False)
    pieces = zip(hidden.split(chunk), targets.split(chunk), strict=True)
    logps = torch.cat([recomputed(rows, answer_ids) for rows, answer_ids in pieces])  # (N,)
    answers = len(batch.ids) * batch.answers_per_row
    return torch.zeros(answers, dtype=logps.dtype, device=logps.device).index_add(
        0, batch.answer, logps
    )


def dpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Direct Preference Optimization (Rafailov et al. 2023, eq. 7): -log sigmoid(beta * margin),
    unreduced.

    Each argument: log-probabilities of an answer, summed over its tokens, in nats, shape (B,) ->
    losses (B,). The loss is ln 2 where the policy equals the reference, and falls as chosen gains
    on rejected relative to it. A pair whose chosen answer gained 2 nats while its rejected one lost
    3 has the margin 5:

    >>> dpo_loss(torch.tensor(-8.0), torch.tensor(-13.0), torch.tensor(-10.0), torch.tensor(-10.0))
    tensor(0.4741)
    """
    check_same_shape(policy_chosen, policy_rejected, ref_chosen, ref_rejected)
    options = PreferenceOptions(beta, label_smoothing)
    return sigmoid_loss(policy_chosen - ref_chosen, policy_rejected - ref_rejected, options)


def check_same_shape(*logps: Tensor) -> None:
    """Refuse log-probabilities of several shapes: (B,) and (B, 1) would give (B, B) losses."""
    if not all(isinstance(values, Tensor) for values in logps):
        raise UserError("log-probabilities of answers are tensors of the shape (B,)")
    shapes = [tuple(values.shape) for values in logps]
    if len(set(shapes)) > 1:
        raise UserError(
            f"log-probabilities of the shapes {', '.join(map(str, shapes))}, expected (B,) of each"
        )


@dataclass(frozen=True)
class PreferenceOptions:
    """The numbers that a preference loss takes; each reads those that it needs."""

    beta: float  # how strongly the policy is held to the reference
    label_smoothing: float = 0.0  # the share of pairs that are thought to be the wrong way round
    target_margin: float = 0.0  # how much better chosen shall be


# Each loss is a function of the gains of both answers: chosen = log policy(y) - log reference(y) of
# the chosen answer y, shape (B,), and the same of the rejected one. It returns losses (B,).


def sigmoid_loss(chosen: Tensor, rejected: Tensor, options: PreferenceOptions) -> Tensor:
    """DPO (Rafailov et al. 2023, eq. 7). With label smoothing e, conservative DPO (Mitchell 2023):
    (1 - e) times the loss of the pair as it is, and e times that of the pair the other way round.
    """
    scaled = options.beta * (chosen - rejected) - options.target_margin
    as_it_is = -F.logsigmoid(scaled)
    if not options.label_smoothing:
        return as_it_is
    other_way_round = -F.logsigmoid(-scaled)
    return torch.lerp(as_it_is, other_way_round, options.label_smoothing)


def ipo_loss(chosen: Tensor, rejected: Tensor, options: PreferenceOptions) -> Tensor:
    """Identity preference optimization (Azar et al. 2023, eq. 17): the margin shall be
    1 / (2 beta), neither less nor more.
    """
    return (chosen - rejected - 1 / (2 * options.beta)) ** 2


def hinge_loss(chosen: Tensor, rejected: Tensor, options: PreferenceOptions) -> Tensor:
    """SLiC's hinge on DPO's margin (Liu et al. 2023, RSO, eq. 7): a pair whose scaled margin has
    reached 1 teaches nothing more.
    """
    return F.relu(1 - options.beta * (chosen - rejected))


@dataclass(frozen=True)
class PreferenceLoss:
    """A row of PREFERENCE_LOSSES.

    beta:      what --beta is where it is not given
    per_token: gains are divided by the number of the answer's tokens
    reference: gains are those on a reference; without, on nothing, and none is computed
    takes:     what it takes beside beta, of PreferenceOptions
    target_margin: what --target-margin is where it is not given
    """

    function: Callable[[Tensor, Tensor, PreferenceOptions], Tensor]
    beta: float = 0.1
    per_token: bool = False
    reference: bool = True
    takes: tuple[str, ...] = ()
    target_margin: float = 0.0


PREFERENCE_LOSSES: dict[str, PreferenceLoss] = {  # dpo.py --loss
    "sigmoid": PreferenceLoss(sigmoid_loss, takes=("label_smoothing",)),
    # Length-normalised DPO (Lambert et al. 2024, Tulu 3, eq. 6): a long answer has no advantage.
    "sigmoid-norm": PreferenceLoss(
        sigmoid_loss, beta=5.0, per_token=True, takes=("label_smoothing",)
    ),
    # By token as well: its authors' own form, which the paper does not say.
    "ipo": PreferenceLoss(ipo_loss, per_token=True),
    "hinge": PreferenceLoss(hinge_loss),
    # SimPO (Meng et al. 2024, eq. 6).
    "simpo": PreferenceLoss(
        sigmoid_loss,
        beta=2.0,
        per_token=True,
        reference=False,
        takes=("label_smoothing", "target_margin"),
        target_margin=1.0,
    ),
}


def make_dpo_loss_fn(
    beta: float | None = None,
    loss: str = "sigmoid",
    *,
    label_smoothing: float = 0.0,
    target_margin: float | None = None,
    sft_weight: float = 0.0,
) -> LossFn:
    """The loop's loss for preference pairs.

    loss:       a name of PREFERENCE_LOSSES; beta and target_margin: by default those of its row
    sft_weight: how much of the chosen answer's own loss is added, -log p per token (Pang et al.
                2024, eq. 1): it keeps chosen answers from becoming less likely

    `batch.reference` holds the log-probabilities under the frozen reference, chosen and rejected
    taking turns.
    """
    row = row_named(PREFERENCE_LOSSES, loss, "preference loss")
    check(beta, Expected(float, above=0, optional=True), "beta")
    check(label_smoothing, Expected(float, at_least=0, at_most=0.5), "label_smoothing")
    check(target_margin, Expected(float, at_least=0, optional=True), "target_margin")
    check(sft_weight, Expected(float, at_least=0), "sft_weight")
    options = PreferenceOptions(
        row.beta if beta is None else beta,
        label_smoothing,
        row.target_margin if target_margin is None else target_margin,
    )

    def loss_fn(model: Phi, batch: Batch) -> tuple[Tensor, int, dict[str, Tensor]]:
        logps = answer_logps(model, batch).view(-1, 2)  # (pairs, 2)
        tokens = (
            torch.zeros_like(logps)
            .view(-1)
            .index_add(0, batch.answer, torch.ones_like(batch.answer, dtype=logps.dtype))
        )
        tokens = tokens.view(-1, 2).clamp(min=1)
        gains = logps
        if row.reference:
            if batch.reference is None:
                raise UserError("pairs without a reference: fill Pairs.reference before training")
            gains = gains - batch.reference.view(-1, 2)
        if row.per_token:
            gains = gains / tokens
        losses = row.function(*gains.unbind(1), options)
        if sft_weight:
            losses = losses - sft_weight * (logps / tokens)[:, 0]
        return losses.sum(), len(losses), measures(options.beta * gains, logps, tokens)

    return loss_fn


@torch.no_grad()
def measures(rewards: Tensor, logps: Tensor, tokens: Tensor) -> dict[str, Tensor]:
    """What is logged of pairs, summed over them. Each argument (pairs, 2), chosen first.

    rewards: the implicit reward, beta * log(policy / reference) (Rafailov et al. 2023, eq. 5). Its
        last term, which depends on the prompt only, is left out: it cancels in the margin
    """
    margin = rewards[:, 0] - rewards[:, 1]
    return {
        "rewards_chosen": rewards[:, 0].sum(),
        "rewards_rejected": rewards[:, 1].sum(),
        "margin": margin.sum(),
        "accuracy": (margin > 0).to(margin.dtype).sum(),
        "logps_chosen": logps[:, 0].sum(),
        "logps_rejected": logps[:, 1].sum(),
        "tokens_chosen": tokens[:, 0].sum(),
        "tokens_rejected": tokens[:, 1].sum(),
    }


# ---- validation


@torch.no_grad()
def validate(
    model: Phi, loss_fn: LossFn, batches: Iterable[Batch], world: World = ALONE
) -> dict[str, float]:
    """Means of the loss and the metrics over all batches, as "val_loss" and so on.

    world: its ranks divide the batches, and all get the means. The sums are in fp64, which adds
    numbers of fp32 without rounding, or nearly so: the means are those of one process
    """
    was_training = model.training
    model.eval()
    learned = 0
    sums: dict[str, float] = {}
    for batch, counts in world.turns(batches):
        loss, count, metrics = loss_fn(model, batch.to(model.device))
        learned += count if counts else 0
        for name, value in ({"loss": loss} | metrics).items():
            sums[name] = sums.get(name, 0.0) + (float(value) if counts else 0.0)
    model.train(was_training)
    numbers = torch.tensor([learned, *sums.values()], dtype=torch.float64, device=world.device)
    total, *summed = world.add(numbers).tolist()
    if not total:
        raise UserError("there is nothing to validate on: no batch has a target")
    return {f"val_{name}": value / total for name, value in zip(sums, summed, strict=True)}


def validation_loss(
    model: Phi, batches: Iterable[Batch], byte_lengths: list[int], world: World = ALONE
) -> dict[str, float]:
    """Mean loss in nats per token, and bits per byte of the text that the targets spell ([EOS] is
    no text).

    byte_lengths: bytes of text that each id stands for. Bits per byte do not depend on the
    tokenizer, so that runs of different vocabularies can be compared.
    world: see `validate`
    """
    lengths = torch.tensor(byte_lengths)

    def loss_fn(model: Phi, batch: Batch) -> tuple[Tensor, int, dict[str, Tensor]]:
        loss, count, _ = next_token_loss(model, batch)
        learned_ids = batch.targets.flatten()[batch.learned].cpu()
        return loss, count, {"bytes": lengths[learned_ids].sum()}

    means = validate(model, loss_fn, batches, world)
    bits_per_token = means["val_loss"] / math.log(2)
    bytes_per_token = max(means["val_bytes"], 1e-9)
    return {
        "val_loss": means["val_loss"],
        "val_bits_per_byte": bits_per_token / bytes_per_token,
    }
