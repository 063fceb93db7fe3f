"""Exercise 16: top-p, also called nucleus sampling."""

from torch import Tensor

NEVER = float("-inf")  # the logit of a forbidden id: its probability is exactly 0


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Of each row, keep the smallest set of likeliest ids whose probabilities together reach p.

    logits (B, V). Returns new logits: those of the kept ids as they are, all others NEVER. The
    likeliest id stays, however small p is. Of ids with the same probability, no more stay than are
    needed; which ones does not matter. 0 < p <= 1. Filters before this one, such as top-k, may have
    set logits to NEVER already; they stay so.
    """
    raise NotImplementedError("write keep_top_p")
