"""Causal attention behind one signature, with the documents of a packed batch isolated from each
other.

Read in this order: `manual` (what attention is), `same_document` (who sees whom), `plan` (what is
decided once for all layers of a forward pass), `attend` (what each layer calls). backends.py
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

import contextlib
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
    """How all layers of one forward pass attend; `plan` makes it before the first layer."""

    backend: str
    device: torch.device
    dropout: float = 0.0
    visible: Tensor | None = None  # bool, broadcastable to (B, 1, T, S); None: plain causal
    cu_seqlens: Tensor | None = None  # (documents + 1,) int32, for backends.BY_BOUNDARIES
    kernel: Callable | None = None  # the flash kernel of "varlen"
    weights: list[Tensor] | None = None  # where given, each layer appends its (B, H, T, S)

    def kernels(self) -> contextlib.AbstractContextManager:
        """The context in which the layers run, and in which backward recomputes them."""
        return backends.preferred_kernels(self.device, self.visible is not None)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """`attend`, as planned."""
        return attend(
            q, k, v, self.cu_seqlens, self.visible, self.backend, self.dropout, self.kernel,
            self.weights,
        )  # fmt: skip


def plan(
    backend: str,
    ids: Tensor,
    cu_seqlens: Tensor | None = None,
    cache: "KVCache | None" = None,
    dtype: torch.dtype = torch.float32,
    dropout: float = 0.0,
    weights: list[Tensor] | None = None,
) -> tuple[Tensor, AttentionPlan]:
    """Positions of the tokens, (B or 1, T), and how the layers attend. ids (B, T); dtype: that of
    the weights.

    There are three cases: decoding from a cache, documents packed into rows, plain rows.
    """
    batch, time = ids.shape
    device = ids.device
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    backend = backends.choose_backend(backend, device, dtype, dropout)
    if weights is not None:  # the faster backends never hold the weights
        backend = "manual"
    how = AttentionPlan(backend, device, dropout, weights=weights)

    if cache is not None:
        assert cu_seqlens is None, "a KV cache holds one document per row"
        how.visible = cache.visible(time)
        return cache.positions(time), how

    if cu_seqlens is None or backend == "causal":
        return torch.arange(time, device=device)[None], how

    if backend in backends.BY_BOUNDARIES:
        how.cu_seqlens = cu_seqlens
    else:
        how.visible = same_document(cu_seqlens, batch, time)  # one mask for all layers
    if backend == "varlen":
        how.kernel = backends.flash_kernel()  # looked up outside of what torch.compile traces
        torch._dynamo.maybe_mark_dynamic(cu_seqlens, 0)  # one graph for any number of documents
    return document_positions(cu_seqlens, batch * time).view(batch, time), how


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None = None,
    visible: Tensor | None = None,
    backend: str = "sdpa",
    dropout: float = 0.0,
    kernel: Callable | None = None,
    weights: list[Tensor] | None = None,
) -> Tensor:
    """Causal attention. q (B, H, T, K); k and v (B, H or fewer, S, K) -> (B, H, T, K).

    At most one argument says who sees whom: `cu_seqlens` (documents of a packed batch, for
    "documents" and "varlen"), `visible` (bool, broadcastable to (B, 1, T, S)); with neither,
    attention is plain causal. Fewer key heads than query heads are repeated (grouped queries).
    weights: a list to which "manual" appends its (B, H, T, S).
    """
    if k.shape[1] != q.shape[1]:
        queries_each = q.shape[1] // k.shape[1]
        k = k.repeat_interleave(queries_each, dim=1)
        v = v.repeat_interleave(queries_each, dim=1)

    if cu_seqlens is not None:
        assert backend in backends.BY_BOUNDARIES, f"{backend} isolates documents by a mask"
        if backend == "documents":
            return backends.per_document(q, k, v, cu_seqlens, dropout)
        assert dropout == 0, "flash kernels are called without dropout"
        return backends.varlen(q, k, v, cu_seqlens, kernel)

    if backend == "manual":
        if visible is None:
            visible = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
        if weights is not None:
            weights.append(attention_weights(q, k, visible).detach())
        return manual(q, k, v, visible, dropout)

    return backends.sdpa(q, k, v, visible, dropout)
