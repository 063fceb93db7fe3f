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

`Branches` are for preference pairs, whose two answers share a prompt: skip them at first reading.

    B batch, H heads, T queries, S keys, K head_dim, D width
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
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
    scores = q @ k.transpose(-2, -1)  # (B, H, T, S)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
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


# ---- documents that continue one another


@dataclass
class Branches:
    """Two answers that continue one prompt, which is computed once.

    A packed batch is cut into segments, and a segment may continue another one of its row: it sees
    that one too, and its positions go on behind it. The answers a and b do not see each other:

        row             p p a a b          boundaries [0, 2, 4, 5]
        continues       -1 0 0             segments 1 and 2 continue segment 0
        positions       0 1 2 3 2

        query 0 (p)  sees  x . . . .
        query 1 (p)        x x . . .
        query 2 (a)        x x x . .
        query 3 (a)        x x x x .
        query 4 (b)        x x . . x

    The backends that isolate by boundaries compute attention, and nothing else, over whole
    documents `p p a a` and `p p b`, side by side. Of the prompt's results the first ones count:

        tokens          0 1 2 3 0 1 4      the place in the batch of each of their tokens
        cu_seqlens      [0, 4, 7]
        places          0 1 2 3 6          the place among them of each token of the batch
    """

    continues: Tensor  # (segments,) int64, -1 where a segment continues none
    tokens: Tensor  # int64
    cu_seqlens: Tensor  # int32
    places: Tensor  # (B * T,) int64

    def to(self, move: Callable[[Tensor], Tensor]) -> "Branches":
        return Branches(*map(move, (self.continues, self.tokens, self.cu_seqlens, self.places)))


def branches_of(boundaries: list[int], continues: list[int]) -> Branches:
    """The branches of a batch. boundaries: of all segments, which may be empty.

    >>> branches = branches_of([0, 2, 4, 5], [-1, 0, 0])
    >>> branches.tokens.tolist(), branches.cu_seqlens.tolist(), branches.places.tolist()
    ([0, 1, 2, 3, 0, 1, 4], [0, 4, 7], [0, 1, 2, 3, 6])
    """
    segments = [range(begin, end) for begin, end in pairwise(boundaries)]
    tokens: list[int] = []
    ends = [0]
    places = [-1] * boundaries[-1]
    for number, segment in enumerate(segments):
        parent = continues[number]
        if number in continues or not (segment or parent >= 0):
            continue  # it is computed as a part of what continues it, or there is nothing
        document = [*(segments[parent] if parent >= 0 else ()), *segment]
        for place, token in enumerate(document, start=len(tokens)):
            if places[token] < 0:
                places[token] = place
        tokens += document
        ends.append(len(tokens))
    return Branches(
        torch.tensor(continues),
        torch.tensor(tokens),
        torch.tensor(ends, dtype=torch.int32),
        torch.tensor(places),
    )


def branch_positions(cu_seqlens: Tensor, continues: Tensor, tokens: int) -> Tensor:
    """`document_positions`, but a segment that continues another one goes on behind it.

    >>> branch_positions(torch.tensor([0, 2, 4, 5]), torch.tensor([-1, 0, 0]), 5)
    tensor([0, 1, 2, 3, 2])
    """
    lengths = cu_seqlens.diff().long()
    before = torch.where(continues >= 0, lengths[continues.clamp(min=0)], 0)
    return document_positions(cu_seqlens, tokens) + before[document_index(cu_seqlens, tokens)]


def same_branch(cu_seqlens: Tensor, continues: Tensor, batch: int, time: int) -> Tensor:
    """The mask of a batch with branches, bool (B, 1, T, T): causal, within a segment and the one
    that it continues.
    """
    segments = document_index(cu_seqlens, batch * time).view(batch, time)
    parents = continues[segments]
    queries, keys = segments[:, :, None], segments[:, None, :]
    sees = (queries == keys) | (parents[:, :, None] == keys)
    causal = torch.ones(time, time, dtype=torch.bool, device=segments.device).tril()
    return (sees & causal)[:, None]


# ---- one forward pass


@dataclass
class AttentionPlan:
    """How all layers of one forward pass attend. At most one of `visible` and `cu_seqlens` says who
    sees whom; with neither, attention is plain causal.
    """

    backend: str = "sdpa"
    visible: Tensor | None = None  # bool, broadcastable to (B, 1, T, S)
    cu_seqlens: Tensor | None = None  # (documents + 1,) int32, for backends.BY_BOUNDARIES
    longest: int | None = None  # tokens of the longest of those documents, where it is known
    branches: Branches | None = None  # whose documents those boundaries cut, where there are some
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
    branches: Branches | None = None,
    longest: int | None = None,
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
        positions = cache.begin(time)
        plan.visible = cache.visible()
        return positions, plan

    if cu_seqlens is None or not isolates:
        assert branches is None, "answers that share their prompt must be isolated"
        return torch.arange(time, device=device)[None], plan

    if plan.backend in backends.BY_BOUNDARIES:
        plan.cu_seqlens = cu_seqlens if branches is None else branches.cu_seqlens
        plan.branches = branches
        plan.longest = longest if branches is None else None
    elif branches is not None:
        plan.visible = same_branch(cu_seqlens, branches.continues, batch, time)
    else:
        plan.visible = same_document(cu_seqlens, batch, time)  # one mask for all layers
    if backend == "varlen":
        plan.flash = backends.flash_kernel()  # looked up outside of what torch.compile traces
        torch._dynamo.maybe_mark_dynamic(cu_seqlens, 0)  # one graph for any number of documents
    if branches is not None:
        positions = branch_positions(cu_seqlens, branches.continues, batch * time)
    else:
        positions = document_positions(cu_seqlens, batch * time)
    return positions.view(batch, time), plan


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
        rows = q.shape
        if plan.branches is not None:
            q, k, v = (side_by_side(x, plan.branches.tokens) for x in (q, k, v))
        if plan.backend == "documents":
            out = backends.per_document(q, k, v, plan.cu_seqlens, plan.dropout)
        else:
            assert plan.dropout == 0, "flash kernels are called without dropout"
            out = backends.varlen(q, k, v, plan.cu_seqlens, plan.flash, plan.longest)
        return out if plan.branches is None else back_in_rows(out, plan.branches.places, rows)

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


def side_by_side(x: Tensor, tokens: Tensor) -> Tensor:
    """Tokens of a batch, by their places -> x (B, H, T, K) as one row (1, H, tokens, K)."""
    flat = x.transpose(1, 2).flatten(0, 1)  # (B T, H, K)
    return flat.index_select(0, tokens)[None].transpose(1, 2)


def back_in_rows(x: Tensor, places: Tensor, shape: torch.Size) -> Tensor:
    """The inverse: of one row (1, H, tokens, K), those at `places`, in rows (B, H, T, K)."""
    batch, heads, time, width = shape
    flat = x.transpose(1, 2)[0].index_select(0, places)  # (B T, H, K)
    return flat.view(batch, time, heads, width).transpose(1, 2)
