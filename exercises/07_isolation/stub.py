"""Exercise 7: attention in which the documents of a row do not see each other.

B batch, T time, H heads, K head_dim
"""

from torch import Tensor


def same_document(cu_seqlens: Tensor, batch: int, time: int) -> Tensor:
    """Who sees whom: bool (B, 1, T, T), True where the query (third dimension) may see the key
    (fourth): a key of its own document, and not later than itself.

    cu_seqlens: (documents + 1,) int32, the boundaries of the documents in the flattened batch of
    B * T tokens; every multiple of T is one.

        same_document(torch.tensor([0, 2, 5]), 1, 5)[0, 0].int()
            1 0 0 0 0
            1 1 0 0 0
            0 0 1 0 0
            0 0 1 1 0
            0 0 1 1 1
    """
    raise NotImplementedError("write same_document")


def attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(K)) v over the visible keys. q, k, v (B, H, T, K) -> (B, H, T, K).

    visible: as `same_document` gives it.
    """
    raise NotImplementedError("write attention")
