"""What speed.py puts on computes what the plain network computes: outputs and every gradient."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from nanophi.model.phi import MLP
from nanophi.model.speed import HAS_BOTH, ROWS, FastLinear, FrugalLinear, FrugalMLP, speed_up
from nanophi.train.losses import next_token_loss
from nanophi.train.packing import Packed
from tests.conftest import tiny_model

needs_both = pytest.mark.skipif(not HAS_BOTH, reason="this torch has not both MKL and oneDNN")


def pair(
    inputs: int, outputs: int, bias: bool = True, dtype: torch.dtype = torch.float32
) -> tuple[FastLinear, nn.Linear]:
    torch.manual_seed(0)
    ours, oracle = (kind(inputs, outputs, bias, dtype=dtype) for kind in (FastLinear, nn.Linear))
    oracle.load_state_dict(ours.state_dict())
    return ours, oracle


def is_ours(out: torch.Tensor) -> bool:
    return out.grad_fn is not None and out.grad_fn.name() == "_LinearBackward"


@needs_both
@given(
    shape=st.lists(st.integers(0, 9), min_size=1, max_size=3), inputs=st.integers(1, 40),
    outputs=st.integers(1, 40),
    bias=st.booleans(), expanded=st.booleans(), transposed=st.booleans(),
)  # fmt: skip
def test_outputs_and_gradients_are_those_of_torch(
    shape, inputs, outputs, bias, expanded, transposed
):
    ours, oracle = pair(inputs, outputs, bias)
    x = torch.randn(*shape, inputs)
    if transposed:  # rows that do not lie one behind the other
        x = torch.randn(inputs, *shape).movedim(0, -1)
    results = []
    for layer in (ours, oracle):
        layer_x = x.clone(memory_format=torch.preserve_format).requires_grad_()
        torch.manual_seed(1)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("nanophi.model.speed.ROWS", 1)
            out = layer(layer_x)
            # the gradient of a sum has no memory of its own
            out.sum().backward() if expanded else out.backward(torch.randn_like(out))
        assert is_ours(out) == (layer is ours)
        results.append([out, layer_x.grad, *(p.grad for p in layer.parameters())])
    for mine, wanted in zip(*results, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-5, atol=1e-5)


@needs_both
def test_what_is_frozen_costs_no_product_in_backward():
    ours, _ = pair(8, 8)
    ours.weight.requires_grad_(False)
    x = torch.randn(ROWS, 8)
    out = ours(x)
    assert is_ours(out)
    out.sum().backward()
    assert ours.weight.grad is None
    assert x.grad is None
    assert ours.bias.grad is not None


def test_all_else_is_left_to_torch(monkeypatch):
    """Other dtypes, autocast, decoding, a compiler, the user who turned oneDNN off; and rows of any
    number: oneDNN keeps code for each, and the demo, with answers of all lengths, once took twice
    its memory.
    """
    x = torch.randn(2, ROWS, 8)
    ours, oracle = pair(8, 8)
    assert is_ours(ours(x)) == HAS_BOTH
    assert not is_ours(ours(x[:, :-1]))
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


@needs_both
def test_a_step_of_training_is_the_same_either_way(monkeypatch):
    data = Packed(
        [torch.randint(3, 400, (n,)).numpy() for n in (300, 100, 500, 200)], ROWS // 2, 2, seed=0
    )
    results, used = [], []
    for on in (True, False):
        monkeypatch.setattr(torch.backends.mkldnn, "enabled", on)
        model = tiny_model()
        speed_up(model)
        model.model.layers[0].mlp.fc1.register_forward_hook(
            lambda module, x, out: used.append(is_ours(out))
        )
        loss, count, _ = next_token_loss(model, data.batch_at(0))
        (loss / count).backward()
        results.append([loss / count, *(p.grad for p in model.parameters())])
    for mine, wanted in zip(*results, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-6)
    assert used == [True, False]


def gradients(model, ids, cu_seqlens) -> list[torch.Tensor]:
    model.zero_grad()
    model.train()
    model(ids, cu_seqlens).logsumexp(-1).sum().backward()
    return [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("recompute", [False, True])
def test_a_model_sped_up_is_the_plain_one(recompute):
    """Without oneDNN's products the bits are the same, and it can be taken back by a new model
    alone.
    """
    model = tiny_model(resid_pdrop=0.0)
    names = list(model.state_dict())
    ids = torch.arange(7, 71).view(2, 32)
    cu_seqlens = torch.tensor([0, 10, 32, 64], dtype=torch.int32)
    plain = gradients(model, ids, cu_seqlens)
    logits = model.eval()(ids, cu_seqlens)
    speed_up(model, recompute=recompute)
    assert list(model.state_dict()) == names
    assert torch.equal(model.eval()(ids, cu_seqlens), logits)
    fast = gradients(model, ids, cu_seqlens)
    assert all(torch.equal(a, b) for a, b in zip(plain, fast, strict=True))
    kinds = {type(module).__name__ for module in model.modules()}
    assert {"FastLinear", "FrugalMLP", "FastBlock", "CastingNorm"} <= kinds


def test_all_blocks_are_of_one_class():
    """Each block once got a class of its own, and torch.compile compiled each layer anew."""
    model = tiny_model()
    speed_up(model)
    assert len({type(block) for block in model.model.layers}) == 1
    assert len({type(block.input_layernorm) for block in model.model.layers}) == 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
def test_layers_share_one_compiled_graph():
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    model = tiny_model(num_hidden_layers=3)
    model.attention = "sdpa"
    speed_up(model, compile=True)
    ids = torch.arange(7, 71).view(2, 32)
    for boundaries in ([0, 10, 32, 64], [0, 5, 9, 32, 64]):
        model(ids, torch.tensor(boundaries, dtype=torch.int32)).sum().backward()
    assert counters["stats"]["unique_graphs"] == 1


def test_a_changed_mlp_is_not_overruled():
    """A class swapped in from outside must not bring back the MLP that its reader has replaced."""
    model = tiny_model()

    class Doubled(type(model.model.layers[0].mlp)):
        def forward(self, x):
            return 2 * super().forward(x)

    for block in model.model.layers:
        block.mlp.__class__ = Doubled
    ids = torch.arange(7, 39).view(2, 16)
    before = model(ids)
    speed_up(model)
    assert torch.equal(model(ids), before)


class Gated(MLP):
    """What a learner may make of the MLP: another activation, and something behind fc2."""

    def contract(self, x):
        return self.fc2(torch.relu(x) * x.sigmoid()) * 2


def mlp_of(kind, plain=False, dtype=torch.float64):
    model = tiny_model()
    for block in model.model.layers:
        block.mlp.__class__ = kind
    if not plain:
        speed_up(model)
        if kind is not MLP:  # speed_up leaves a class that it does not know
            for block in model.model.layers:
                block.mlp.__class__ = type("Frugal", (FrugalMLP, kind), {})
                block.mlp.fc2.__class__ = FrugalLinear
    return model.model.layers[0].mlp.to(dtype)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("kind", [MLP, Gated])
def test_the_mlp_computes_its_activation_again(kind, half):
    """Gradients are those of the plain one, and of the two large tensors one is kept."""
    x = torch.randn(3, 16, 32, dtype=torch.float32 if half else torch.float64)
    results = []
    for plain in (True, False):
        mlp = mlp_of(kind, plain, x.dtype)
        mine = x.clone().requires_grad_()
        large: set[int] = set()
        width = mlp.fc1.out_features

        def keep(kept, large=large, width=width):
            if kept.numel() == 48 * width and kept.shape[-1] == width:
                large.add(kept.data_ptr())
            return kept

        with (
            torch.autograd.graph.saved_tensors_hooks(keep, lambda kept: kept),
            torch.autocast("cpu", torch.bfloat16, enabled=half),
        ):
            out = mlp(mine)
        out.float().square().sum().backward()
        results.append([out, mine.grad, *(p.grad for p in mlp.parameters())])
        if kind is MLP:
            assert len(large) == (2 if plain else 1)
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_a_frozen_mlp_has_no_gradient():
    mlp = mlp_of(MLP)
    mlp.fc2.weight.requires_grad_(False)
    x = torch.randn(1, 4, 32, dtype=torch.float64, requires_grad=True)
    mlp(x).sum().backward()
    assert mlp.fc2.weight.grad is None
    assert x.grad is not None
    assert mlp.fc2.bias.grad is not None
