"""The linear layer, whose fp32 products on a CPU are oneDNN's while the model learns.

torch asks MKL for the products of fp32 matrices and keeps oneDNN for other dtypes and for its compiler. On AMD's CPUs
oneDNN is up to a fifth faster (docs/log.md has the table), and products are 70 % of a step of a small model.

But it compiles and keeps code for each shape it meets (1.5 ms and 0.6 MB), and is slower for few rows. So it gets those
whose number is a multiple of 512, as packed batches and chunks of the loss have it; answers of any length, and
decoding, stay with MKL. The shape alone decides, or a resumed run would not have the bits of an unbroken one.

`torch.backends.mkldnn.enabled = False` turns it off, together with all else that torch does by oneDNN.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

ROWS = 512
HAS_BOTH = torch.backends.mkl.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def takes_onednn(x: Tensor) -> bool:
    """Whether oneDNN may multiply x by a weight: fp32 on a CPU, which neither autocast nor a compiler changes."""
    return (
        HAS_BOTH
        and x.dtype == torch.float32
        and x.device.type == "cpu"
        and x.shape[:-1].numel() % ROWS == 0
        and torch.backends.mkldnn.enabled
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b without a gradient, for many rows. x (..., D), weight (V, D), bias (V,) -> (..., V)."""
    if takes_onednn(x):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


class _Linear(torch.autograd.Function):
    """torch knows no gradient of oneDNN's product."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out: Tensor):
        x, weight = ctx.saved_tensors
        rows, d_rows = x.flatten(0, -2), d_out.flatten(0, -2)
        of_x, of_weight, of_bias = ctx.needs_input_grad
        d_x = product(d_out, weight.t()) if of_x else None
        d_weight = (
            d_rows.t() @ rows if of_weight else None
        )  # MKL is as fast here: both sides lie transposed
        return d_x, d_weight, d_rows.sum(0) if of_bias else None


class Linear(nn.Linear):
    """nn.Linear, x (..., D) -> (..., V): the same parameters, the same results up to rounding. What oneDNN computed can
    be differentiated once; a second time torch raises a RuntimeError."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and takes_onednn(x):
            return _Linear.apply(x, self.weight, self.bias)
        return super().forward(x)
