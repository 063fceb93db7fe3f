"""Causal attention behind one signature, with the documents of a packed batch isolated from each other.

`manual` is the backend to read, and every other one is tested equal to it. A mask is always a boolean matrix "query may
see key".

    B batch, H heads, T queries, S keys, K head_dim
"""

import contextlib
import inspect
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

BACKENDS = {
    "auto": "the fastest that isolates documents, for the device and dtype",
    "manual": "the one to read",
    "sdpa": "torch's, with a mask",
    "documents": "torch's, one call per document",
    "varlen": "flash attention over the flattened batch (CUDA, bf16 or fp16)",
    "causal": "torch's without isolation: the documents of a row see each other",
}


def manual(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, dropout: float = 0.0) -> Tensor:
    """softmax(q k^T / sqrt(K)) v over the visible keys (Vaswani et al. 2017, eq. 1).

    q (B, H, T, K), k and v (B, H, S, K), visible: bool, broadcastable to (B, 1, T, S) -> (B, H, T, K).
    q is scaled before the product: in half precision q.k of Phi overflows otherwise.
    """
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # (B, H, T, S)
    scores = scores.float().masked_fill(~visible, float("-inf"))
    weights = F.dropout(scores.softmax(-1).to(q.dtype), dropout)
    return weights @ v


def same_document(cu_seqlens: Tensor, batch: int, time: int) -> Tensor:
    """(documents + 1,) boundaries of a flattened (B, T) batch -> bool (B, 1, T, T): causal, within one document."""
    rows = document_index(cu_seqlens, batch * time).view(batch, time)
    causal = torch.ones(time, time, dtype=torch.bool, device=rows.device).tril()
    return ((rows[:, :, None] == rows[:, None, :]) & causal)[:, None]


def document_index(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """Boundaries -> which document each flattened token belongs to: [0, 2, 5] -> [0, 0, 1, 1, 1].

    tokens: how many there are, or a GPU would have to be asked for it.
    """
    lengths = cu_seqlens.diff().long()
    return torch.arange(len(lengths), device=lengths.device).repeat_interleave(
        lengths, output_size=tokens
    )


def document_positions(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """Boundaries -> the position of each flattened token in its document: [0, 2, 5] -> [0, 1, 0, 1, 2]."""
    starts = cu_seqlens[:-1].long()[document_index(cu_seqlens, tokens)]
    return torch.arange(tokens, device=starts.device) - starts


def per_document(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, dropout: float = 0.0
) -> Tensor:
    """One plain causal call per document, over the flattened batch.

    The cheapest isolation on a CPU: work falls with the square of each document instead of the row. Measured on rows
    of 512 to 2048 tokens: 1.7 to 6.4 times faster than one call with a mask, and cheaper than no isolation at all.
    """
    batch, heads, time, width = q.shape
    lengths = cu_seqlens.diff().tolist()
    # Flat is (1, B T, H, K): nothing is copied, as Phi computes q, k, v in this order.
    flat = [x.transpose(1, 2).reshape(1, batch * time, heads, width) for x in (q, k, v)]
    pieces = zip(*(x.transpose(1, 2).split(lengths, dim=2) for x in flat), strict=True)
    out = [
        F.scaled_dot_product_attention(*piece, is_causal=True, dropout_p=dropout)
        for piece in pieces
    ]
    return (
        torch.cat([x.transpose(1, 2) for x in out], dim=1)
        .view(batch, time, heads, width)
        .transpose(1, 2)
    )


def pad_heads(*tensors: Tensor) -> list[Tensor]:
    """Zeros behind the last dimension up to a multiple of 8, as flash kernels and cuDNN want it. q.k stays the same;
    the scale must be that of the true width, and what comes out is cut again."""
    return [
        F.pad(x, (0, -x.shape[-1] % 8)) if x.shape[-1] % 8 else x for x in tensors
    ]  # F.pad by 0 would copy


@cache
def flash_kernel() -> Callable | None:
    """A function (q, k, v, cu_seqlens, longest, scale) of flat q, k, v (tokens, H, K), causal within each document:
    that of the package flash-attn where it imports, else torch's own (2.10 or newer), else None."""
    with contextlib.suppress(ImportError):
        from flash_attn import flash_attn_varlen_func

        return lambda q, k, v, cu, longest, scale: flash_attn_varlen_func(
            q, k, v, cu, cu, longest, longest, softmax_scale=scale, causal=True
        )
    with contextlib.suppress(ImportError):
        from torch.nn.attention.varlen import varlen_attn

        if "window_size" in inspect.signature(varlen_attn).parameters:
            return lambda q, k, v, cu, longest, scale: varlen_attn(
                q, k, v, cu, cu, longest, longest, window_size=(-1, 0), scale=scale
            )
        return lambda q, k, v, cu, longest, scale: varlen_attn(  # torch 2.10: K**-0.5 is built in
            q * (scale * q.shape[-1] ** 0.5), k, v, cu, cu, longest, longest, is_causal=True
        )
    return None


def varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, kernel: Callable | None = None
) -> Tensor:
    """All documents of a batch in one call of a flash kernel. The longest document is given as the row, a constant:
    its true length would have to be fetched from the device at every step."""
    batch, heads, time, width = q.shape
    q, k = q.to(v.dtype), k.to(v.dtype)  # autocast leaves what comes from a LayerNorm in fp32
    flat = [x.transpose(1, 2).reshape(batch * time, heads, width) for x in (q, k, v)]
    out = (kernel or flash_kernel())(*pad_heads(*flat), cu_seqlens, time, width**-0.5)
    return out[..., :width].view(batch, time, heads, width).transpose(1, 2)


def choose_backend(
    backend: str, device: torch.device, dtype: torch.dtype, dropout: float = 0.0
) -> str:
    """What "auto" stands for on a device, given the dtype that is computed in."""
    if backend != "auto":
        return backend
    if device.type == "cpu":
        return "documents"
    if device.type != "cuda" or dtype == torch.float32 or dropout or flash_kernel() is None:
        return "sdpa"
    return (
        "varlen" if torch.cuda.get_device_capability(device)[0] >= 8 else "sdpa"
    )  # what flash kernels need


def preferred_kernels(device: torch.device, masked: bool):
    """On compute capability 9 (Hopper) cuDNN's attention is about twice as fast as the one torch would take first. Not
    where there is a mask, nor before cuDNN 9.15.1: it has been wrong there (pytorch issues 196678, 169849)."""
    capability = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0
    if capability >= 9 and (masked or (torch.backends.cudnn.version() or 0) <= 91500):
        return sdpa_kernel(
            [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
        )
    if capability != 9:
        return contextlib.nullcontext()
    order = [
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.MATH,
    ]
    return sdpa_kernel(order, set_priority=True)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None = None,
    visible: Tensor | None = None,
    backend: str = "sdpa",
    dropout: float = 0.0,
    kernel: Callable | None = None,
) -> Tensor:
    """Causal attention. q (B, H, T, K); k and v (B, H or fewer, S, K) -> (B, H, T, K).

    Who sees whom is said by at most one of: `cu_seqlens` (documents of a packed batch, for "documents" and "varlen"),
    `visible` (bool, broadcastable to (B, 1, T, S)), or neither (plain causal). Fewer key heads are repeated (GQA).
    """
    if k.shape[1] != q.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    if cu_seqlens is not None:
        assert backend in ("documents", "varlen"), (
            f"the backend {backend} isolates documents by a mask"
        )
        if backend == "varlen":
            assert dropout == 0, "flash kernels are called without dropout"
            return varlen(q, k, v, cu_seqlens, kernel)
        return per_document(q, k, v, cu_seqlens, dropout)
    if backend == "manual":
        if visible is None:
            visible = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
        return manual(q, k, v, visible, dropout)
    width, mask = (
        q.shape[-1],
        {"attn_mask": visible, "is_causal": visible is None, "dropout_p": dropout},
    )
    if q.is_cuda:
        q, k, v = pad_heads(q, k, v)
    return F.scaled_dot_product_attention(q, k, v, scale=width**-0.5, **mask)[..., :width]
