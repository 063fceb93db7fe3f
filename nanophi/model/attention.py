"""Causal attention, with the documents of a packed batch isolated from each other.

Read in this order: `manual` (what attention is), `same_document` (who sees whom), `plan_attention`
(what is decided once, before the first layer), `attend` (what each layer calls). backends.py
computes the same faster; the tests compare each backend with `manual`.

A packed row holds several documents. cu_seqlens are their boundaries in the flattened batch, and a
mask is a boolean matrix "this query may see that key":

    cu_seqlens [0, 2, 5]               a row of 5 tokens: documents a a and b b b
    same_document(...)                 query 0 (a)  sees  x . . . .
                                       query 1 (a)        x x . . .
                                       query 2 (b)        . . x . .
                                       query 3 (b)        . . x x .
                                       query 4 (b)        . . x x x
    document_positions(...)            0 1 0 1 2

    B batch, H heads, T queries, S keys, K head_dim, D width
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from nanophi.model import backends

if TYPE_CHECKING:  # phi.py imports this file
    from nanophi.model.phi import KVCache


# ---- what attention is


def attention_weights(q: Tensor, k: Tensor, visible: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(K)) over the visible keys (Vaswani et al. 2017, eq. 1) -> (B, H, T, S).

    q (B, H, T, K), k (B, H, S, K); visible: bool, broadcastable to (B, 1, T, S).
    """
    q = q * q.shape[-1] ** -0.5  # before the product: in half precision q k^T of Phi overflows
    scores = (q @ k.transpose(-2, -1)).float()  # (B, H, T, S)
    return scores.masked_fill(~visible, float("-inf")).softmax(-1).to(q.dtype)


def manual(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, dropout: float = 0.0) -> Tensor:
    """The backend to read: each query takes the mean of the values, weighted by attention.

    Shapes as in `attention_weights`, v (B, H, S, K) -> (B, H, T, K).
    """
    return F.dropout(attention_weights(q, k, visible), dropout) @ v


# ---- who sees whom


def document_index(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """Boundaries -> the number of the document that each flattened token belongs to.

    tokens: how many there are. The last boundary says so too, but to read it the CPU would wait for
    the GPU.

    >>> document_index(torch.tensor([0, 2, 5]), 5)
    tensor([0, 0, 1, 1, 1])
    """
    lengths = cu_seqlens.diff().long()
    numbers = torch.arange(len(lengths), device=lengths.device)
    return numbers.repeat_interleave(lengths, output_size=tokens)


def document_positions(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """Boundaries -> the position of each flattened token in its document.

    >>> document_positions(torch.tensor([0, 2, 5]), 5)
    tensor([0, 1, 0, 1, 2])
    """
    starts = cu_seqlens[:-1].long()[document_index(cu_seqlens, tokens)]
    return torch.arange(tokens, device=starts.device) - starts


def same_document(cu_seqlens: Tensor, batch: int, time: int) -> Tensor:
    """The mask of a packed (B, T) batch -> bool (B, 1, T, T): causal, within one document.

    >>> same_document(torch.tensor([0, 2, 5]), 1, 5).int()[0, 0]
    tensor([[1, 0, 0, 0, 0],
            [1, 1, 0, 0, 0],
            [0, 0, 1, 0, 0],
            [0, 0, 1, 1, 0],
            [0, 0, 1, 1, 1]], dtype=torch.int32)
    """
    documents = document_index(cu_seqlens, batch * time).view(batch, time)
    same = documents[:, :, None] == documents[:, None, :]
    causal = torch.ones(time, time, dtype=torch.bool, device=documents.device).tril()
    return (same & causal)[:, None]


# ---- one forward pass


@dataclass
class AttentionPlan:
    """How all layers of one forward pass attend. At most one of `visible` and `cu_seqlens` says who
    sees whom; with neither, attention is plain causal.
    """

    backend: str = "sdpa"
    visible: Tensor | None = None  # bool, broadcastable to (B, 1, T, S)
    cu_seqlens: Tensor | None = None  # (documents + 1,) int32, for backends.BY_BOUNDARIES
    dropout: float = 0.0
    flash: Callable | None = None  # the kernel of "varlen"
    weights: list[Tensor] | None = None  # where given, each layer appends its (B, H, T, S)


def plan_attention(
    backend: str,
    ids: Tensor,
    cu_seqlens: Tensor | None = None,
    cache: "KVCache | None" = None,
    dtype: torch.dtype = torch.float32,
    dropout: float = 0.0,
    weights: list[Tensor] | None = None,
) -> tuple[Tensor, AttentionPlan]:
    """Before the first layer: positions of the tokens, (B or 1, T), and how all layers attend.

    ids (B, T); dtype: that of the weights; weights: a list for the attention weights of each layer

    There are three cases: decoding from a cache, documents packed into rows, plain rows.
    """
    batch, time = ids.shape
    device = ids.device
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    backend = backends.choose_backend(backend, device, dtype, dropout)
    isolates = backend != "causal"
    if weights is not None:  # the faster backends never hold the weights
        backend = "manual"
    plan = AttentionPlan(backend, dropout=dropout, weights=weights)

    if cache is not None:
        assert cu_seqlens is None, "a KV cache holds one document per row"
        plan.visible = cache.visible(time)
        return cache.positions(time), plan

    if cu_seqlens is None or not isolates:
        return torch.arange(time, device=device)[None], plan

    if backend in backends.BY_BOUNDARIES:
        plan.cu_seqlens = cu_seqlens
    else:
        plan.visible = same_document(cu_seqlens, batch, time)  # one mask for all layers
    if backend == "varlen":
        plan.flash = backends.flash_kernel()  # looked up outside of what torch.compile traces
        torch._dynamo.maybe_mark_dynamic(cu_seqlens, 0)  # one graph for any number of documents
    return document_positions(cu_seqlens, batch * time).view(batch, time), plan


def attend(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> Tensor:
    """Causal attention of one layer. q (B, H, T, K); k and v (B, H or fewer, S, K) -> (B, H, T, K).

    Fewer heads of keys than of queries are repeated (grouped-query attention).
    """
    if k.shape[1] != q.shape[1]:
        queries_each = q.shape[1] // k.shape[1]
        k = k.repeat_interleave(queries_each, dim=1)
        v = v.repeat_interleave(queries_each, dim=1)

    if plan.cu_seqlens is not None:
        assert plan.backend in backends.BY_BOUNDARIES, f"{plan.backend} isolates by a mask"
        if plan.backend == "documents":
            return backends.per_document(q, k, v, plan.cu_seqlens, plan.dropout)
        assert plan.dropout == 0, "flash kernels are called without dropout"
        return backends.varlen(q, k, v, plan.cu_seqlens, plan.flash)

    if plan.backend == "manual":
        visible = plan.visible
        if visible is None:
            visible = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
        if plan.weights is not None:
            plan.weights.append(attention_weights(q, k, visible).detach())
        return manual(q, k, v, visible, plan.dropout)

    # "documents" and "varlen" too come here where there is no document to isolate.
    known = ("sdpa", "causal", *backends.BY_BOUNDARIES)
    assert plan.backend in known, f"attend does not know the backend {plan.backend}"
    return backends.sdpa(q, k, v, plan.visible, plan.dropout)
