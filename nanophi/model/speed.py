"""What makes training faster or smaller. `speed_up(model)` puts it on from outside, and the results
stay the same up to rounding.

Skip this file at first reading. You may even delete it: the network of phi.py trains without it,
and the tests compare both. Each part is a plain module with another way to compute the same.
`speed_up` swaps the class of the modules in place, so that parameters, names and state dict stay:

    FastLinear    fp32 products on a CPU by oneDNN
    FrugalMLP     backward computes the gelu again, so forward need not keep its result
    CastingNorm   one half-precision copy of the normalised input for all layers that read it
    FastBlock     --recompute and --compile
    softmax_loss  with --compile, the loss and its gradient in one pass over the logits

Four places know of this file: `MLP.contract`, which FrugalMLP computes again; losses.product_of and
softmax_loss_of, which ask the head how it multiplies and compares; the estimate of memory; and the
loop, which calls `speed_up`.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from nanophi.model.attention import AttentionPlan
from nanophi.model.backends import preferred_kernels
from nanophi.model.phi import MLP, Phi


def speed_up(model: Phi, recompute: bool = False, compile: bool = False) -> None:
    """Make the model train faster, in place. A second call changes only the two options.

    recompute: keep only the input of each block, and compute the block again in backward (gradient
               checkpointing; Chen et al. 2016): a third more work, a fraction of the memory
    compile:   torch.compile each block
    """
    for module in list(model.modules()):
        if type(module) is MLP:
            module.__class__ = FrugalMLP
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear:
            parent, _, leaf = name.rpartition(".")
            of_frugal = leaf == "fc2" and isinstance(model.get_submodule(parent), FrugalMLP)
            module.__class__ = FrugalLinear if of_frugal else FastLinear
    for block in model.model.layers:
        _mix_into(block, FastBlock)
        if hasattr(block, "input_layernorm"):
            _mix_into(block.input_layernorm, CastingNorm)
        assert isinstance(block, FastBlock)
        block.recompute = recompute
        if compile:
            block.compile(dynamic=False, options=ADD_IN_ONE_PASS)
        else:
            block._compiled_call_impl = None  # nn.Module.compile sets it; torch has no way back
    if isinstance(model.lm_head, FastLinear):
        model.lm_head.softmax_loss = fused_softmax_loss if compile else None


# For the compiler. The gradient of the norm's output comes from q_proj, k_proj, v_proj and fc1. The
# compiler writes a sum of four to memory and reads it again, unless it may read more at once.
ADD_IN_ONE_PASS: dict[str, Any] = {"realize_reads_threshold": 8}


def _mix_into(module: Any, mixin: type) -> None:
    """Put a class before that of a module, whatever it is."""
    if not isinstance(module, mixin):
        module.__class__ = _mixed(mixin, type(module))  # type: ignore[arg-type]


@cache
def _mixed(mixin: Any, plain: Any) -> type:
    """`class FastBlock(FastBlock, Block)`, the same one for all blocks.

    torch.compile compiles once for each class: with a class of its own, each layer would cost a
    compilation, and those beyond the eighth would not be compiled at all.
    """
    return type(mixin.__name__, (mixin, plain), {})


# ---- products by oneDNN

# torch gives the products of fp32 matrices to MKL, and keeps oneDNN for other dtypes and for its
# compiler. On AMD's CPUs oneDNN is up to a fifth faster (docs/log.md has the table), and products
# are 70 % of a step of a small model.
#
# But oneDNN compiles and keeps code for each shape it meets (1.5 ms and 0.6 MB), and it is slower
# for few rows. So it gets only products whose number of rows is a multiple of 512, as packed
# batches and the chunks of the loss have. Answers of any length, and decoding, stay with MKL. Only
# the shape decides; otherwise a resumed run would not have the bits of an unbroken one.
#
# `torch.backends.mkldnn.enabled = False` turns it off, and all else that torch does by oneDNN.

ROWS = 512
HAS_BOTH = torch.backends.mkl.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def takes_onednn(x: Tensor) -> bool:
    """Whether oneDNN multiplies x: fp32 on a CPU, without autocast and compiler."""
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

    product = staticmethod(product)  # the chunked loss multiplies by the head with it ...
    softmax_loss: Any = None  # ... and computes softmax and loss with this, where it is set

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and takes_onednn(x):
            return _Linear.apply(x, self.weight, self.bias)
        return super().forward(x)


# ---- the loss in one pass

# The gradient of the logits is a few operations on each of them, and there are 2 billion in a step
# of 65,536 tokens. One by one, in fp32, the operations of losses.softmax_loss move some 60 bytes a
# bf16 logit. Compiled together they move 12 (tests/train/test_launches.py counts both).


def softmax_loss(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`losses.softmax_loss` without anything in place, as compilers like it.

    logits (N, V), targets (N,) -> the loss (), its gradient (N, V), the sum of that over N (V,)
    """
    dtype = logits.dtype
    logits = logits.to(torch.promote_types(dtype, torch.float32))
    target = targets[:, None]
    target_logit = logits.gather(1, target)
    largest = logits.amax(-1, keepdim=True)
    exps = (logits - largest).exp()
    total = exps.sum(-1, keepdim=True)
    loss = (total.log() + largest - target_logit).sum()
    is_target = torch.arange(logits.shape[1], device=logits.device) == target
    d_logits = exps / total - is_target.to(exps.dtype)
    return loss, d_logits.to(dtype), d_logits.sum(0)


@cache
def _compiled_softmax_loss() -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    # A row of logits is summed in one piece. In several pieces, as for few rows, it is read again.
    return torch.compile(softmax_loss, options={"split_reductions": False})


def fused_softmax_loss(
    logits: Tensor, targets: Tensor, needs_gradient: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """`softmax_loss`, compiled once for each size of the vocabulary and any number of tokens."""
    if not needs_gradient:
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        loss = F.cross_entropy(logits, targets, reduction="sum")
        return loss, logits.new_empty(0), logits.new_empty(0)
    torch._dynamo.mark_static(logits, 1)
    torch._dynamo.maybe_mark_dynamic(logits, 0)
    torch._dynamo.maybe_mark_dynamic(targets, 0)
    return _compiled_softmax_loss()(logits, targets)


# ---- memory


class _Frugal(torch.autograd.Function):
    """A product that does not keep its input x for backward, but what x is made from.

    again(*made_from) computes x once more.
    """

    @staticmethod
    def forward(
        ctx, x: Tensor, weight: Tensor, bias: Tensor | None, again: Any, *made_from: Tensor
    ) -> Tensor:
        ctx.again = again
        ctx.save_for_backward(weight, *made_from)
        return product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out: Tensor):
        weight, *made_from = ctx.saved_tensors
        x_needs_it, weight_needs_it, bias_needs_it = ctx.needs_input_grad[:3]
        d_rows = d_out.flatten(0, -2)
        d_x = d_weight = d_bias = None
        if x_needs_it:
            d_x = product(d_out, weight.to(d_out.dtype).t())
        if weight_needs_it:
            x = ctx.again(*made_from)
            d_weight = (d_rows.t() @ x.flatten(0, -2)).to(weight.dtype)
        if bias_needs_it:
            d_bias = d_rows.sum(0).to(weight.dtype)
        return d_x, d_weight, d_bias, None, *(None for _ in made_from)


class _Found(Exception):
    """Carries what was looked for, out of a computation that is not needed any further."""


class FrugalLinear(nn.Linear):
    """The last layer of a FrugalMLP."""

    made_from: tuple[Tensor, ...] | None = None  # what the next input is made from ...
    again: Any = None  # ... and how
    looks = False  # whether the next input is all that is wanted

    def forward(self, x: Tensor) -> Tensor:
        if self.looks:
            raise _Found(x)
        if self.made_from is None:
            return super().forward(x)
        return _Frugal.apply(x, self.weight, self.bias, self.again, *self.made_from)


class FrugalMLP(MLP):
    """Keeps the input of the gelu for backward, and not its result, which is as large.

        x -> gelu -> e -> fc2 -> out        forward keeps x; e is let go
        x -> gelu -> e                      backward computes e again, for the gradient of fc2

    Whatever `contract` does between x and fc2 is computed again.
    """

    def contract(self, *inputs: Tensor) -> Tensor:
        last: Any = self.fc2
        if not torch.is_grad_enabled():
            return super().contract(*inputs)
        if torch.compiler.is_compiling():  # compiled, torch's own way costs nothing
            return checkpoint(
                super().contract, *inputs, use_reentrant=False, preserve_rng_state=False
            )
        last.made_from, last.again = inputs, partial(self.input_of_fc2, autocast_now(inputs[0]))
        try:
            return super().contract(*inputs)
        finally:
            last.made_from = last.again = None

    def input_of_fc2(self, autocast: AbstractContextManager, *inputs: Tensor) -> Tensor:
        """Run `contract` until it comes to fc2."""
        last: Any = self.fc2
        last.looks = True
        try:
            with torch.no_grad(), autocast:
                super().contract(*inputs)
        except _Found as found:
            return found.args[0]
        finally:
            last.looks = False
        raise AssertionError("contract did not come to fc2")


def autocast_now(x: Tensor) -> AbstractContextManager:
    """The autocast that is on now for the device of x, to be entered later."""
    device = x.device.type
    if not torch.is_autocast_enabled(device):
        return nullcontext()
    return torch.autocast(device, torch.get_autocast_dtype(device), cache_enabled=False)


class CastingNorm(nn.Module):
    """Mixed into the norm of each block. It casts the result to the dtype of autocast, once for
    q_proj, k_proj, v_proj and fc1.
    """

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return x


class FastBlock(nn.Module):
    """Mixed into the class of each block. `speed_up` sets `recompute`; the compiled block, where
    there is one, is what super().__call__ calls.
    """

    recompute = False

    def __call__(self, *inputs: Any) -> Tensor:
        *_, cache, plan = inputs
        assert isinstance(plan, AttentionPlan), "cache and plan are the last arguments of a block"
        if cache is not None or plan.weights is not None:
            # Not compiled: decoding would compile anew for each length of the cache.
            return self._call_impl(*inputs)
        if not (self.recompute and self.training):
            return super().__call__(*inputs)
        kernels = partial(preferred_kernels, inputs[0].device, masked=plan.visible is not None)
        return checkpoint(
            super().__call__,
            *inputs,
            use_reentrant=False,
            context_fn=lambda: (nullcontext(), kernels()),  # backward has the same kernels
        )
