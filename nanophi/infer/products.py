"""Products with few rows: x W^T + b, where decoding spends its time.

A step of decoding multiplies one row, or one of each answer, by every weight of the model. So it
waits for memory: the time is that of reading the weights. How they are kept decides it:

    fp32    in an order that is read faster: exact
    fp16    two bytes each; products and sums stay in fp32. Up to some six rows cost what one costs
    int8    one byte each, and x is rounded to 8 bits as well. It needs instructions (VNNI) that
            multiply such bytes

The weights are prepared once. The result of a row with fp16 or int8 is the same, bit for bit,
whatever stands in the other rows.
"""

import math
import warnings
from collections.abc import Callable
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from nanophi.cli import UserError

Matrix = tuple[Tensor, Tensor]  # weight (N, K) and bias (N,)
Product = Callable[[Tensor], Tensor]  # (..., K) -> (..., N)

HAS_ONEDNN = hasattr(torch.ops.mkldnn, "_linear_pointwise") and hasattr(
    torch.ops.mkldnn, "_reorder_linear_weight"
)
HAS_INT8 = hasattr(torch, "quantize_per_channel") and hasattr(
    torch.ops.quantized, "linear_with_input_q_dq_qweight_dq_output_fp32"
)
TYPICAL_ROWS = 16  # for which oneDNN chooses its order of the weights
LARGEST_HALF = 65504.0  # of fp16


class Fp32:
    """The product as the model computes it, up to the order of its sums.

    1 row      where there are more outputs than inputs, the weights are kept transposed: then
               memory is read in order, and sums go into many places at once
    more       a copy in the order in which oneDNN reads it, made when it is first needed
    """

    def __init__(self, weight: Tensor, bias: Tensor):
        self.bias = bias
        self.weight = weight
        if len(weight) >= weight.shape[1]:
            self.weight = weight.t().contiguous().t()  # the same numbers, in another order

    @cached_property
    def reordered(self) -> Tensor:
        return torch.ops.mkldnn._reorder_linear_weight(self.weight.contiguous(), TYPICAL_ROWS)

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.numel() // x.shape[-1]
        if rows > 1 and HAS_ONEDNN and torch.backends.mkldnn.enabled:
            linear = torch.ops.mkldnn._linear_pointwise
            return linear(x, self.reordered, self.bias, "none", [], "")
        if rows > 1:
            return F.linear(x, self.weight, self.bias)
        return torch.addmv(self.bias, self.weight, x.flatten()).view(*x.shape[:-1], -1)


class Fp16:
    """Weights in fp16, everything else in fp32 (FBGEMM)."""

    def __init__(self, weight: Tensor, bias: Tensor):
        if not weight.abs().max() < LARGEST_HALF:
            raise UserError("some weights are larger than fp16 can hold")
        self.packed = torch.ops.quantized.linear_prepack_fp16(weight, bias)

    def __call__(self, x: Tensor) -> Tensor:
        return torch.ops.quantized.linear_dynamic_fp16(x, self.packed)


class Int8:
    """Weights in int8 with a scale for each output, and x in 8 bits with a scale for each row.

    The scale of a row is a power of two, so that to divide by it changes no digit: one row alone,
    and the same row among others, give the same result.

        row      3.0  -1.5   0.6      all below 4
        / 4      0.75 -0.38  0.15
        * 127    95   -48    19       rounded
    """

    def __init__(self, weight: Tensor, bias: Tensor):
        self.bias = bias
        scales = (weight.abs().amax(1) / 127).clamp(min=1e-12)  # (N,)
        zeros = torch.zeros(len(weight), dtype=torch.int64)
        with warnings.catch_warnings():
            # Torch will drop this type; it has no other way yet to these kernels. See why_not.
            warnings.filterwarnings("ignore", ".*quantize_per_channel.*")
            rounded = torch.quantize_per_channel(weight, scales.double(), zeros, 0, torch.qint8)
        self.packed = torch.ops.quantized.linear_prepack(rounded, None)

    def __call__(self, x: Tensor) -> Tensor:
        if x.numel() == x.shape[-1]:  # one row, and fewer operations
            largest = torch.linalg.vector_norm(x, torch.inf).item()
            if 0 < largest < torch.inf:
                scale = 2.0 ** math.frexp(largest)[1]
                return self.product(x, scale).add_(self.bias)
        largest = torch.linalg.vector_norm(x, torch.inf, -1, keepdim=True).clamp_(min=1e-30)
        exponent = largest.view(torch.int32) & 0x7F800000  # of an fp32 number: its other bits go
        scales = exponent.view(torch.float32) * 2  # 3.0 becomes 2, and that 4
        return torch.addcmul(self.bias, self.product(x / scales, 1.0), scales)

    def product(self, x: Tensor, scale: float) -> Tensor:
        """x W^T with x in [-scale, scale]."""
        product = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32
        return product(x, scale / 127, 128, self.packed)  # 128: zero, as the bytes have no sign


PRODUCTS: dict[str, type] = {"fp32": Fp32, "fp16": Fp16, "int8": Int8}


# ---- what this CPU can


def why_not(precision: str) -> str | None:
    """Why this machine cannot decode with a precision; None where it can."""
    if precision == "fp32":
        return None
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        return "its kernels are made for x86, and torch has none for this CPU"
    if precision == "int8" and not HAS_INT8:
        return "this version of torch no longer has its kernels"
    if precision == "int8" and not has_vnni():
        return "this CPU lacks the instructions (AVX-512 VNNI) that multiply bytes exactly"
    return None


def has_vnni() -> bool:
    """Whether this CPU multiplies bytes into 32 bits, without saturation in between."""
    asked = getattr(torch.cpu, "_is_vnni_supported", None)
    return bool(asked is not None and asked())
