"""What happens to logits before a token is chosen: one function each, in the order `choose` applies them.

The order and the semantics are those of transformers' generate, so that the same settings give the same tokens.

    B rows, V vocabulary; logits (B, V) fp32; history: for each row, the ids of its prompt and answer so far
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from nanophi.cli import UserError

NEVER = float("-inf")


@dataclass
class Sampling:
    """How the next token is chosen; names and meanings are transformers'."""

    temperature: float = 0.0  # 0: greedy
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0

    def __post_init__(self):
        for name, right, expected in (
            ("temperature", self.temperature >= 0, "0 (greedy) or above"),
            ("top_k", self.top_k is None or self.top_k >= 1, "at least 1"),
            ("top_p", self.top_p is None or 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("repetition_penalty", self.repetition_penalty > 0, "above 0"),
            ("no_repeat_ngram_size", self.no_repeat_ngram_size >= 0, "0 (off) or above"),
        ):
            if not right:
                raise UserError(
                    f"{name} {getattr(self, name)} is out of range: it must be {expected}"
                )


def penalize_repetition(logits: Tensor, history: list[list[int]], penalty: float) -> Tensor:
    """Make every id that already occurred less likely (Keskar et al. 2019): positive logits / penalty, others x it."""
    logits = logits.clone()
    for row, ids in zip(logits, history, strict=True):
        seen = torch.tensor(sorted(set(ids)), device=row.device)
        scores = row[seen]
        row[seen] = torch.where(scores < 0, scores * penalty, scores / penalty)
    return logits


def forbid_repeated_ngrams(logits: Tensor, history: list[list[int]], size: int) -> Tensor:
    """Forbid every id that would complete an n-gram of `size` ids a second time."""
    logits = logits.clone()
    for row, ids in zip(logits, history, strict=True):
        prefix = ids[len(ids) - size + 1 :]
        if len(prefix) < size - 1 or len(ids) < size:
            continue
        windows = range(len(ids) - size + 1)
        banned = [ids[i + size - 1] for i in windows if ids[i : i + size - 1] == prefix]
        row[banned] = NEVER
    return logits


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Forbid all but the k largest; ties with the k-th stay."""
    smallest = logits.topk(min(k, logits.shape[-1])).values[..., -1:]
    return logits.masked_fill(logits < smallest, NEVER)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Keep the smallest set of most likely ids whose probability reaches p (nucleus; Holtzman et al. 2020)."""
    ascending, order = logits.sort()
    outside = ascending.softmax(-1).cumsum(-1) <= 1 - p
    outside[..., -1] = False  # the likeliest stays whatever p is
    return logits.masked_fill(outside.scatter(-1, order, outside), NEVER)


def choose(
    logits: Tensor,
    history: list[list[int]],
    how: Sampling,
    generator: torch.Generator | None = None,
) -> list[int]:
    """Logits (B, V) -> one id per row."""
    logits = logits.float()
    if how.repetition_penalty != 1.0:
        logits = penalize_repetition(logits, history, how.repetition_penalty)
    if how.no_repeat_ngram_size > 0:
        logits = forbid_repeated_ngrams(logits, history, how.no_repeat_ngram_size)
    if how.temperature == 0.0:
        return logits.argmax(-1).tolist()
    logits = logits / how.temperature
    if how.top_k:
        logits = keep_top_k(logits, how.top_k)
    if how.top_p is not None and how.top_p < 1.0:
        logits = keep_top_p(logits, how.top_p)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0].tolist()
