"""The linear layer by oneDNN: torch's own is the oracle, for what comes out and for every gradient."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from nanophi.model.linear import HAS_BOTH, Linear

needs_both = pytest.mark.skipif(not HAS_BOTH, reason="this torch has not both MKL and oneDNN")


def pair(inputs: int, outputs: int, bias: bool = True, dtype: torch.dtype = torch.float32) -> tuple[Linear, nn.Linear]:
    torch.manual_seed(0)
    ours, oracle = (kind(inputs, outputs, bias, dtype=dtype) for kind in (Linear, nn.Linear))
    oracle.load_state_dict(ours.state_dict())
    return ours, oracle


def is_ours(out: torch.Tensor) -> bool:
    return out.grad_fn is not None and out.grad_fn.name() == "_LinearBackward"


@needs_both
@given(
    shape=st.lists(st.integers(0, 9), min_size=1, max_size=3), inputs=st.integers(1, 40), outputs=st.integers(1, 40),
    bias=st.booleans(), expanded=st.booleans(), transposed=st.booleans(),
)  # fmt: skip
def test_outputs_and_gradients_are_those_of_torch(shape, inputs, outputs, bias, expanded, transposed):
    ours, oracle = pair(inputs, outputs, bias)
    x = torch.randn(*shape, inputs)
    if transposed:  # rows that do not lie one behind the other
        x = torch.randn(inputs, *shape).movedim(0, -1)
    results = []
    for layer in (ours, oracle):
        layer_x = x.clone(memory_format=torch.preserve_format).requires_grad_()
        out = layer(layer_x)
        assert is_ours(out) == (layer is ours)
        if expanded:  # the gradient of a sum has no memory of its own
            out.sum().backward()
        else:
            torch.manual_seed(1)
            out.backward(torch.randn_like(out))
        results.append([out, layer_x.grad, *(p.grad for p in layer.parameters())])
    for mine, wanted in zip(*results, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-5, atol=1e-5)


@needs_both
def test_what_is_frozen_costs_no_product_in_backward():
    ours, _ = pair(8, 8)
    ours.weight.requires_grad_(False)
    x = torch.randn(3, 8)
    ours(x).sum().backward()
    assert ours.weight.grad is None
    assert x.grad is None
    assert ours.bias.grad is not None


def test_all_else_is_left_to_torch(monkeypatch):
    """Other dtypes, autocast, decoding, a compiler, and the user who turned oneDNN off."""
    x = torch.randn(3, 8)
    ours, oracle = pair(8, 8)
    assert is_ours(ours(x)) == HAS_BOTH
    with torch.no_grad():
        assert torch.equal(ours(x), oracle(x))
    with torch.autocast("cpu", torch.bfloat16):
        out = ours(x)
        assert not is_ours(out)
        assert torch.equal(out, oracle(x))
    with monkeypatch.context() as patch:
        patch.setattr(torch.backends.mkldnn, "enabled", False)
        out = ours(x)
    assert not is_ours(out)
    assert torch.equal(out, oracle(x))
    ours, oracle = pair(8, 8, dtype=torch.float64)
    out = ours(x.double())
    assert not is_ours(out)
    assert torch.equal(out, oracle(x.double()))
    seen = []

    def backend(graph, _):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    ours, _ = pair(8, 8)
    torch.compile(ours, backend=backend)(x)
    assert seen
    assert not any("mkldnn" in name for name in seen)
