"""Losses: pure functions of tensors, and the loss_fn(model, batch) -> (loss sum, count, metric sums) built from them.

A loss_fn returns sums, not means: the loop divides by the count of the whole step, over all micro-steps and devices,
so that a short batch does not weigh as much as a long one.

    N learned tokens, B rows, D width, V vocabulary
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nanophi.model.linear import product
from nanophi.model.phi import Phi
from nanophi.train.packing import Batch

CHUNK = 512  # tokens whose logits exist at once on a CPU, whose cache holds 512 x V fp32 at V = 8192 (16 MB)
ON_A_GPU = (
    2**27
)  # logits at once there (1.6 GB, all told): each chunk reads and writes the whole gradient of the head

LossFn = Callable[[Phi, Batch], tuple[Tensor, int, dict[str, Tensor]]]


def chunk_size(vocabulary: int, device: str, dtype: torch.dtype) -> int:
    """Tokens whose logits exist at once, by the type of the device ("cpu", "cuda") and the dtype of the hidden states;
    few in fp16, where the sum of their gradients could overflow."""
    return (
        CHUNK if device == "cpu" or dtype == torch.float16 else max(CHUNK, ON_A_GPU // vocabulary)
    )


class _HeadCrossEntropy(torch.autograd.Function):
    """sum of -log softmax(hidden W^T + b)[target], never holding more than a chunk of logits.

    The gradient of cross entropy is softmax - onehot, known as soon as the logits are, so forward computes it too
    (where `learning`) and backward only scales: the logits exist once, and are not recomputed.
    """

    @staticmethod
    def forward(
        ctx, hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, learning: bool
    ) -> Tensor:
        compute = weight.to(hidden.dtype)
        d_hidden = torch.empty_like(hidden)
        d_weight, d_bias = torch.zeros_like(weight), torch.zeros_like(bias)
        exact = torch.promote_types(hidden.dtype, torch.float32)  # of the softmax
        loss = torch.zeros((), dtype=exact, device=hidden.device)
        chunk = chunk_size(len(weight), hidden.device.type, hidden.dtype)
        for start in range(0, len(hidden), chunk):
            rows = hidden[start : start + chunk]
            target = targets[start : start + chunk, None]
            logits = product(rows, compute, bias.to(rows.dtype)).to(exact)  # (chunk, V)
            of_target, largest = logits.gather(1, target), logits.amax(-1, keepdim=True)
            exps = logits.sub_(
                largest
            ).exp_()  # in place: one (chunk, V) tensor, one exponential of it
            total = exps.sum(-1, keepdim=True)
            loss += (total.log() + largest - of_target).sum()
            if not learning:
                continue
            d_logits = exps.div_(total)  # softmax
            d_logits.scatter_add_(1, target, torch.full_like(target, -1, dtype=d_logits.dtype))
            d_bias += d_logits.sum(0)
            d_logits = d_logits.to(rows.dtype)
            d_hidden[start : start + chunk] = product(d_logits, compute.t())
            if rows.dtype == d_weight.dtype:  # without a (V, D) product in between
                d_weight.addmm_(d_logits.t(), rows)
            else:
                d_weight += d_logits.t() @ rows
        ctx.save_for_backward(d_hidden, d_weight, d_bias)
        return loss

    @staticmethod
    def backward(ctx, d_loss: Tensor):
        # In place: the weight's is as large as the head, and nobody asks for it twice.
        return *(grad.mul_(d_loss) for grad in ctx.saved_tensors), None, None


def head_cross_entropy(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
    """Summed cross entropy of the head's logits. hidden (N, D), weight (V, D), bias (V,), targets (N,) -> ()."""
    device = hidden.device.type
    if torch.is_autocast_enabled(
        device
    ):  # once, or autocast would cast the weight anew for every chunk
        hidden = hidden.to(torch.get_autocast_dtype(device))
    return _HeadCrossEntropy.apply(hidden, weight, bias, targets, torch.is_grad_enabled())


def next_token_loss(model: Phi, batch: Batch) -> tuple[Tensor, int, dict[str, Tensor]]:
    """Pretraining and SFT alike: cross entropy in nats over the positions that have a target."""
    hidden, targets = _learned(model, batch)
    return (
        head_cross_entropy(hidden, model.lm_head.weight, model.lm_head.bias, targets),
        len(hidden),
        {},
    )


def _learned(model: Phi, batch: Batch) -> tuple[Tensor, Tensor]:
    """Hidden states (N, D) and targets (N,) of the positions that have one: the rest never reaches the head."""
    hidden = model.hidden(batch.ids, batch.cu_seqlens).flatten(0, 1)
    return hidden.index_select(0, batch.learned), batch.targets.flatten()[batch.learned]


def answer_logps(model: Phi, batch: Batch) -> Tensor:
    """log p(answer | prompt) of each row, summed over its learned tokens: (B,). The logits of a chunk at once."""
    hidden, targets = _learned(model, batch)
    chunk = chunk_size(model.cfg.vocab_size, hidden.device.type, hidden.dtype)

    def of(rows: Tensor, wanted: Tensor) -> Tensor:
        return -F.cross_entropy(model.lm_head(rows).float(), wanted, reduction="none")

    # What a token's gradient is multiplied by depends on the whole answer, so backward computes the logits again.
    again = partial(checkpoint, of, use_reentrant=False, preserve_rng_state=False)
    logps = torch.cat([*map(again, hidden.split(chunk), targets.split(chunk))])  # (N,)
    row = batch.learned // batch.ids.shape[1]
    return torch.zeros(len(batch.ids), device=logps.device).index_add(0, row, logps)


def dpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    beta: float = 0.1,
) -> Tensor:
    """Direct Preference Optimization (Rafailov et al. 2023, eq. 7): -log sigmoid(beta * margin), unreduced.

    Each argument: log-probabilities of an answer, summed over its tokens, in nats, shape (B,) -> losses (B,). It is
    ln 2 where the policy equals the reference, and falls as chosen gains on rejected relative to it.
    """
    margin = (policy_chosen - ref_chosen) - (policy_rejected - ref_rejected)
    return -F.logsigmoid(beta * margin)


def make_dpo_loss_fn(beta: float) -> LossFn:
    """The loop's loss for preference pairs; `batch.reference` holds the frozen reference's log-probabilities."""

    def loss_fn(model: Phi, batch: Batch) -> tuple[Tensor, int, dict[str, Tensor]]:
        chosen, rejected = answer_logps(model, batch).view(-1, 2).unbind(1)
        ref_chosen, ref_rejected = batch.reference.view(-1, 2).unbind(1)
        losses = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta)
        reward_chosen = (
            beta * (chosen - ref_chosen).detach()
        )  # implicit reward, eq. 5 without the partition term
        reward_rejected = beta * (rejected - ref_rejected).detach()
        sums = {
            "rewards_chosen": reward_chosen.sum(),
            "rewards_rejected": reward_rejected.sum(),
            "margin": (reward_chosen - reward_rejected).sum(),
            "accuracy": (reward_chosen > reward_rejected).float().sum(),
        }
        return losses.sum(), len(losses), sums

    return loss_fn


@torch.no_grad()
def validate(model: Phi, loss_fn: LossFn, batches: Iterable[Batch]) -> dict[str, float]:
    """Means of the loss and the metrics over all batches, as "val_loss" and so on."""
    was_training = model.training
    model.eval()
    total, sums = 0, Counter()
    for batch in batches:
        loss, count, metrics = loss_fn(model, batch.to(model.lm_head.weight.device))
        total += count
        sums.update({name: float(value) for name, value in ({"loss": loss} | metrics).items()})
    model.train(was_training)
    return {f"val_{name}": value / total for name, value in sums.items()}


def validation_loss(
    model: Phi, batches: Iterable[Batch], byte_lengths: list[int]
) -> dict[str, float]:
    """Mean loss in nats per token, and bits per byte of the text that the targets spell ([EOS] is no text).

    Bits per byte do not depend on the tokenizer, so runs of different vocabularies can be compared.
    """
    lengths = torch.tensor(byte_lengths)

    def loss_fn(model: Phi, batch: Batch):
        loss, count, _ = next_token_loss(model, batch)
        return loss, count, {"bytes": lengths[batch.targets.flatten()[batch.learned].cpu()].sum()}

    means = validate(model, loss_fn, batches)
    bits_per_token, bytes_per_token = means["val_loss"] / math.log(2), means["val_bytes"]
    return {
        "val_loss": means["val_loss"],
        "val_bits_per_byte": bits_per_token / max(bytes_per_token, 1e-9),
    }
