"""Products with few rows: x W^T + b, where decoding spends its time.

A step of decoding multiplies one row, or one of each answer, by every weight of the model. So it
waits for memory: the time is that of reading the weights. How they are kept decides it:

    fp32    the weights as they are, and copies in another order where these are read faster: exact
    fp16    two bytes each; products and sums stay in fp32. Up to some six rows cost what one costs
    int8    one byte each, and x is rounded to 8 bits as well. It needs instructions (VNNI) that
            multiply such bytes

The weights are prepared once. The result of a row with fp16 or int8 is the same, bit for bit,
whatever stands in the other rows.
"""

import warnings
from collections.abc import Callable, Sequence
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from nanophi.cli import UserError

Matrix = tuple[Tensor, Tensor]  # weight (N, K) and bias (N,)
Product = Callable[[Tensor], Tensor]  # (..., K) -> (..., N)

SOME = 16  # rows up to which oneDNN's own order of the weights is worth a copy of them
HAS_ONEDNN = hasattr(torch.ops.mkldnn, "_linear_pointwise") and hasattr(
    torch.ops.mkldnn, "_reorder_linear_weight"
)
LARGEST_HALF = 65504.0  # of fp16


def joined(parts: Sequence[Matrix]) -> Matrix:
    """The matrices of several layers that read the same input, one below the other, and biases."""
    weights, biases = zip(*parts, strict=True)
    return torch.cat(weights), torch.cat(biases)


class Fp32:
    """The product as the model computes it, up to the order of its sums.

        1 row              a transposed copy where there are more outputs than inputs: then memory
                           is read in order, and sums go into many places at once
        2 to SOME rows     a copy in the order in which oneDNN reads it
        more               the weights as they are: reading a prompt

    A copy is made when it is first needed.
    """

    def __init__(self, parts: Sequence[Matrix]):
        self.parts = parts
        self.outputs = sum(len(weight) for weight, _ in parts)
        self.inputs = parts[0][0].shape[1]

    @cached_property
    def bias(self) -> Tensor:
        return joined(self.parts)[1]

    @cached_property
    def transposed(self) -> Tensor:
        return joined(self.parts)[0].t().contiguous()

    @cached_property
    def reordered(self) -> Tensor:
        return torch.ops.mkldnn._reorder_linear_weight(joined(self.parts)[0], SOME)

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.shape[:-1].numel()
        if rows == 1 and self.outputs >= self.inputs:
            y = torch.addmm(self.bias, x.reshape(1, -1), self.transposed)
            return y.view(*x.shape[:-1], -1)
        if HAS_ONEDNN and 1 < rows <= SOME and torch.backends.mkldnn.enabled:
            weight = self.reordered
            return torch.ops.mkldnn._linear_pointwise(x, weight, self.bias, "none", [], "")
        outputs = [F.linear(x, weight, bias) for weight, bias in self.parts]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)


class Fp16:
    """Weights in fp16, everything else in fp32 (FBGEMM)."""

    def __init__(self, parts: Sequence[Matrix]):
        weight, bias = joined(parts)
        if not weight.abs().max() < LARGEST_HALF:
            raise UserError("some weights are larger than fp16 can hold")
        self.packed = torch.ops.quantized.linear_prepack_fp16(weight, bias)

    def __call__(self, x: Tensor) -> Tensor:
        return torch.ops.quantized.linear_dynamic_fp16(x, self.packed)


class Int8:
    """Weights in int8 with a scale for each output, and x in 8 bits with a scale for each row.

    torch rounds x with one scale for all rows, from the smallest and the largest number of all.
    Each row is therefore divided by its own largest number, and two more columns hold 1 and -1, so
    that these are the smallest and the largest of every batch. Their weights are 0.

        row      3.0  -1.5   0.6      largest 3
        becomes  1.0  -0.5   0.2   1  -1
    """

    def __init__(self, parts: Sequence[Matrix]):
        weight, self.bias = joined(parts)
        scales = (weight.abs().amax(1) / 127).clamp(min=1e-12)  # (N,)
        wider = F.pad(weight, (0, 2))
        zeros = torch.zeros(len(weight), dtype=torch.int64)
        with warnings.catch_warnings():
            # Torch will drop this type; it has no other way yet to these kernels. See why_not.
            warnings.filterwarnings("ignore", ".*quantize_per_channel.*")
            rounded = torch.quantize_per_channel(wider, scales.double(), zeros, 0, torch.qint8)
        self.packed = torch.ops.quantized.linear_prepack(rounded, None)
        self.ends = torch.tensor([1.0, -1.0])

    def __call__(self, x: Tensor) -> Tensor:
        largest = x.abs().amax(-1, keepdim=True).clamp(min=1e-30)
        ends = self.ends.expand(*x.shape[:-1], 2)
        y = torch.ops.quantized.linear_dynamic(torch.cat((x / largest, ends), -1), self.packed)
        return torch.addcmul(self.bias, y, largest)


PRODUCTS: dict[str, type] = {"fp32": Fp32, "fp16": Fp16, "int8": Int8}


# ---- what this CPU can


def why_not(precision: str) -> str | None:
    """Why this machine cannot decode with a precision; None where it can."""
    if precision == "fp32":
        return None
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        return "its kernels are made for x86, and torch has none for this CPU"
    if precision == "int8" and not hasattr(torch, "qint8"):
        return "this version of torch no longer has its kernels"
    if precision == "int8" and not has_vnni():
        return "this CPU lacks the instructions (AVX-512 VNNI) that multiply bytes exactly"
    return None


def has_vnni() -> bool:
    """Whether this CPU multiplies bytes into 32 bits, without saturation in between."""
    asked = getattr(torch.cpu, "_is_vnni_supported", None)
    return bool(asked is not None and asked())
