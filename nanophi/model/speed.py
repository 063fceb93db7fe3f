"""What makes training faster or smaller and changes no result. `speed_up(model)` puts it on from
outside.

Skip this file at first reading. It may even be deleted: the network of phi.py trains without it,
and the tests compare both. Each part is a plain module with another way to compute the same;
`speed_up` swaps the class of the modules in place, so that parameters, names and state dict stay.

    FastLinear        fp32 products on a CPU by oneDNN
    FrugalMLP         backward computes the gelu again; otherwise forward would keep its result
    CastingLayerNorm  one half-precision copy of the normalised input; otherwise each layer that
    reads it keeps its own FastBlock         --recompute and --compile
"""

import contextlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from nanophi.model.phi import MLP, Phi


def speed_up(model: Phi, recompute: bool = False, compile: bool = False) -> None:
    """Make the model train faster, in place. Calling it again changes the two options alone.

    recompute: keep of each block its input alone, and compute the block again in backward (gradient
    checkpointing; Chen
        et al. 2016): a third more work, a fraction of the memory
    compile: torch.compile each block
    """
    for module in list(model.modules()):
        if type(module) is MLP:
            module.__class__ = FrugalMLP
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and not _is_recomputed(model, name):
            module.__class__ = FastLinear
        if type(module) is nn.LayerNorm and name.endswith("input_layernorm"):
            module.__class__ = CastingLayerNorm
    for block in model.model.layers:
        if not isinstance(block, FastBlock):
            plain = type(block)
            block.__class__ = type(f"Fast{plain.__name__}", (FastBlock, plain), {})
        assert isinstance(block, FastBlock)
        block.recompute = recompute
        if compile:
            block.compile(dynamic=False)
        else:
            block._compiled_call_impl = (
                None  # set by nn.Module.compile; there is no public way back
            )


def _is_recomputed(model: Phi, name: str) -> bool:
    """Whether a layer stands inside of what FrugalMLP computes again.

    There the plain layer is better: recomputation stops as soon as it has what backward needs,
    before the product of nn.Linear, but only behind the product of FastLinear.
    """
    parent, _, leaf = name.rpartition(".")
    return leaf == "fc2" and isinstance(model.get_submodule(parent), FrugalMLP)


# ---- products by oneDNN

# torch asks MKL for the products of fp32 matrices and keeps oneDNN for other dtypes and for its
# compiler. On AMD's CPUs oneDNN is up to a fifth faster (docs/log.md has the table), and products
# are 70 % of a step of a small model.  But oneDNN compiles and keeps code for each shape it meets
# (1.5 ms and 0.6 MB), and it is slower for few rows. So it gets the products whose number of rows
# is a multiple of 512: packed batches and the chunks of the loss have such numbers. Answers of any
# length, and decoding, stay with MKL. The shape alone decides; otherwise a resumed run would not
# have the bits of an unbroken one.  `torch.backends.mkldnn.enabled = False` turns it off, together
# with everything else that torch does by oneDNN.

ROWS = 512
HAS_BOTH = torch.backends.mkl.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def takes_onednn(x: Tensor) -> bool:
    """Whether oneDNN multiplies x by a weight: fp32 on a CPU, with neither autocast nor a compiler
    at work.
    """
    return bool(
        HAS_BOTH
        and x.dtype == torch.float32
        and x.device.type == "cpu"
        and x.shape[:-1].numel() % ROWS == 0
        and torch.backends.mkldnn.enabled
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b without a gradient. x (..., D), weight (V, D), bias (V,) -> (..., V)."""
    if takes_onednn(x):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


class _Linear(torch.autograd.Function):
    """The gradient of oneDNN's product, which torch does not know."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out: Tensor):
        x, weight = ctx.saved_tensors
        x_needs_it, weight_needs_it, bias_needs_it = ctx.needs_input_grad
        d_rows = d_out.flatten(0, -2)
        d_x = d_weight = d_bias = None
        if x_needs_it:
            d_x = product(d_out, weight.t())
        if weight_needs_it:
            d_weight = d_rows.t() @ x.flatten(0, -2)  # MKL is as fast: both sides are transposed
        if bias_needs_it:
            d_bias = d_rows.sum(0)
        return d_x, d_weight, d_bias


class FastLinear(nn.Linear):
    """nn.Linear by oneDNN where that is faster, x (..., D) -> (..., V): the same results up to
    rounding.

    What oneDNN computed can be differentiated once; for a second derivative torch raises a
    RuntimeError.
    """

    product = staticmethod(product)  # the chunked loss multiplies by the head with it

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and takes_onednn(x):
            return _Linear.apply(x, self.weight, self.bias)
        return super().forward(x)


# ---- memory


class FrugalMLP(MLP):
    """Keeps the input of the gelu for backward, and not its result, which is as large."""

    def contract(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return super().contract(x)
        return checkpoint(super().contract, x, use_reentrant=False, preserve_rng_state=False)


class CastingLayerNorm(nn.LayerNorm):
    """Casts its result to the dtype of autocast, once for q_proj, k_proj, v_proj and fc1."""

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return x


class FastBlock(nn.Module):
    """Mixed into the class of each block: `speed_up` sets `recompute`, and nn.Module.compile what
    is called below.
    """

    recompute = False

    def __call__(self, x: Tensor, rotary: tuple, layer: int, cache, how) -> Tensor:
        if cache is not None or how.weights is not None:
            # Not compiled: decoding would compile anew for each length of the cache.
            return self._call_impl(x, rotary, layer, cache, how)
        if not (self.recompute and self.training):
            return super().__call__(x, rotary, layer, cache, how)
        return checkpoint(
            super().__call__,
            x,
            rotary,
            layer,
            cache,
            how,
            use_reentrant=False,
            context_fn=lambda: (contextlib.nullcontext(), how.kernels()),  # the same kernels again
        )
