"""Attention computed faster than by hand. Skip this file at first reading: the results are those of
attention.manual.

    sdpa           torch's attention, with a mask or plainly causal
    per_document   torch's attention, one call per document of a packed batch
    varlen         flash attention over the flattened batch, for CUDA

    B batch, H heads, T queries, S keys, K head_dim
"""

import contextlib
import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from nanophi.cli import row_named

BACKENDS = {
    "auto": "the fastest that isolates documents, for the device and dtype",
    "manual": "the one to read",
    "sdpa": "torch's, with a mask",
    "documents": "torch's, one call per document",
    "varlen": "flash attention over the flattened batch (CUDA, bf16 or fp16)",
    "causal": "torch's without isolation: the documents of a row see each other",
}
BY_BOUNDARIES = ("documents", "varlen")  # these take cu_seqlens; the others take a mask


# ---- the backends


def sdpa(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, dropout: float = 0.0) -> Tensor:
    """torch's scaled_dot_product_attention. visible: as in AttentionPlan."""
    width = q.shape[-1]
    if q.is_cuda:
        q, k, v = pad_heads(q, k, v)
    causal = visible is None
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=visible, dropout_p=dropout, is_causal=causal, scale=width**-0.5
    )
    return out[..., :width]


def per_document(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, dropout: float = 0.0
) -> Tensor:
    """One plain causal call of torch's attention per document, over the flattened batch.

    The cheapest isolation on a CPU: the work grows with the square of each document instead of the
    row. Measured on rows of 512 to 2048 tokens: 1.7 to 6.4 times faster than one call with a mask,
    and cheaper than no isolation.
    """
    batch, heads, time, width = q.shape
    lengths = cu_seqlens.diff().tolist()

    def documents(x: Tensor) -> tuple[Tensor, ...]:
        # (1, B T, H, K). Nothing is copied, because Phi computes q, k and v in this order.
        flat = x.transpose(1, 2).reshape(1, batch * time, heads, width)
        return flat.transpose(1, 2).split(lengths, dim=2)

    outs = [
        F.scaled_dot_product_attention(*document, is_causal=True, dropout_p=dropout).transpose(1, 2)
        for document in zip(documents(q), documents(k), documents(v), strict=True)
    ]
    return torch.cat(outs, dim=1).view(batch, time, heads, width).transpose(1, 2)


def varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    kernel: Callable | None = None,
    longest: int | None = None,
) -> Tensor:
    """All documents of a batch in one call of a flash kernel.

    The kernel starts work for `longest` queries of each document, so it must be at least the length
    of the longest one. Without it T is taken, which no document exceeds: to read the true length
    here, the CPU would wait for the GPU at every step.
    """
    batch, heads, time, width = q.shape
    q = q.to(v.dtype)  # under autocast, qk_layernorm gives fp32
    k = k.to(v.dtype)
    flat = [x.transpose(1, 2).reshape(batch * time, heads, width) for x in (q, k, v)]
    kernel = kernel or flash_kernel()
    assert kernel is not None, "the backend varlen needs flash-attn, or torch 2.10 or newer"
    out = kernel(*pad_heads(*flat), cu_seqlens, longest or time, width**-0.5)
    return out[..., :width].view(batch, time, heads, width).transpose(1, 2)


def pad_heads(*tensors: Tensor) -> list[Tensor]:
    """Zeros after the last dimension up to a multiple of 8, as flash kernels and cuDNN need it.

    q k^T stays the same. The caller passes the scale of the true width and cuts the result to it.
    """
    padding = -tensors[0].shape[-1] % 8
    if padding == 0:  # F.pad by 0 would copy
        return list(tensors)
    return [F.pad(x, (0, padding)) for x in tensors]


@cache
def flash_kernel() -> Callable | None:
    """A function (q, k, v, cu_seqlens, longest, scale) of flat q, k, v (tokens, H, K), causal
    within each document.

    It is that of the package flash-attn where that can be imported, otherwise torch's own (2.10 or
    newer), otherwise None.
    """
    with contextlib.suppress(ImportError):
        from flash_attn import flash_attn_varlen_func

        return lambda q, k, v, cu, longest, scale: flash_attn_varlen_func(
            q, k, v, cu, cu, longest, longest, softmax_scale=scale, causal=True
        )
    with contextlib.suppress(ImportError):
        from torch.nn.attention.varlen import varlen_attn

        kernel: Any = varlen_attn  # its arguments differ between versions of torch
        if "window_size" in inspect.signature(kernel).parameters:
            return lambda q, k, v, cu, longest, scale: kernel(
                q, k, v, cu, cu, longest, longest, window_size=(-1, 0), scale=scale
            )
        return lambda q, k, v, cu, longest, scale: kernel(  # torch 2.10 scales by K**-0.5
            q * (scale * q.shape[-1] ** 0.5), k, v, cu, cu, longest, longest, is_causal=True
        )
    return None


# ---- which backend and which kernel


def choose_backend(
    backend: str, device: torch.device, dtype: torch.dtype, dropout: float = 0.0
) -> str:
    """The backend that "auto" stands for; any other name stands for itself. dtype: the one that is
    computed in.
    """
    if backend != "auto":
        row_named(BACKENDS, backend, "attention")
        return backend
    if device.type == "cpu":
        return "documents"
    if device.type != "cuda" or dtype == torch.float32 or dropout or flash_kernel() is None:
        return "sdpa"
    has_flash = torch.cuda.get_device_capability(device)[0] >= 8
    return "varlen" if has_flash else "sdpa"


def has_bf16(device: torch.device | str) -> bool:
    """Whether a device is a GPU that computes in bf16: one of compute capability 8 or more."""
    on_cuda = torch.device(device).type == "cuda"
    return on_cuda and torch.cuda.get_device_capability(device)[0] >= 8


def preferred_kernels(device: torch.device, masked: bool) -> contextlib.AbstractContextManager:
    """The order in which torch's attention tries its kernels.

    On compute capability 9 (Hopper), cuDNN's is about twice as fast as the one that torch would
    take first. It is taken for training, where gradients are on and all rows have one shape: for
    each new shape it makes a plan, which takes tens of milliseconds, and prompts have many shapes
    (pytorch pull request 155958). With a mask, or before cuDNN 9.15.1, it has been wrong there
    (pytorch issues 196678, 169849).
    """
    capability = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0
    without_cudnn = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    is_right = not masked and (torch.backends.cudnn.version() or 0) > 91500
    if capability >= 9 and not (is_right and torch.is_grad_enabled()):
        return sdpa_kernel(without_cudnn)
    if capability == 9:
        return sdpa_kernel([SDPBackend.CUDNN_ATTENTION, *without_cudnn], set_priority=True)
    return contextlib.nullcontext()
