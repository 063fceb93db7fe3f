import json
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F

import nanophi
from examples.loop import train
from nanophi.model import speed
from nanophi.model.phi import MLP
from nanophi.train import preflight

TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}


def config():
    return nanophi.PhiConfig(**TINY)


def mlp():
    """An MLP with random weights and biases."""
    torch.manual_seed(0)
    made = MLP(config()).double()
    for name in ("gate", "fc1", "fc2"):
        assert hasattr(made, name), f"MLP in nanophi/model/phi.py has no layer `{name}`"
    for p in made.parameters():
        torch.nn.init.normal_(p, std=0.5)
    return made


def model():
    mlp()
    torch.manual_seed(0)
    made = nanophi.Phi(config())
    for p in made.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return made.eval()


def data():
    documents = [[(5 * n + i) % 64 for i in range(40)] for n in range(8)]  # counting
    return nanophi.Packed(documents, context=64, batch_rows=4, seed=0)


def test_it_computes_swiglu():
    made = mlp()
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    found = made(x)
    expected = made.fc2(F.silu(made.gate(x)) * made.fc1(x))
    apart = (found - expected).abs().max().item()
    assert apart < 1e-9, f"fc2(silu(gate(x)) * fc1(x)) is {apart:.2g} away from what MLP computes"


def test_it_has_three_matrices_and_the_estimates_know_it():
    made = mlp()
    shapes = {name: tuple(p.shape) for name, p in made.named_parameters() if p.dim() == 2}
    expected = {"gate.weight": (48, 32), "fc1.weight": (48, 32), "fc2.weight": (32, 48)}
    assert shapes == expected, f"the matrices are {shapes}, expected {expected}"
    found = preflight.size_of(config()).matrices
    expected = 2 * (4 * 32 * 32 + 3 * 32 * 48) + 64 * 32  # two layers, and the head
    assert found == expected, f"a token meets {expected:,} weights, the estimate says {found:,}"


def test_the_network_has_a_name_of_its_own():
    """Otherwise transformers loads the weights as Phi's, and computes something else."""
    made = model()
    assert made.architecture != "PhiForCausalLM", (
        "it is no PhiForCausalLM any more: give `architecture` in class Phi another name"
    )
    ids = torch.arange(20)[None]
    with tempfile.TemporaryDirectory() as folder:
        nanophi.save(folder, made)
        told = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
        loaded, _ = nanophi.load(folder)
        assert torch.equal(loaded(ids), made(ids)), "saved and loaded, it computes something else"
    assert told["architectures"] == [made.architecture], f"config.json says {told['architectures']}"
    assert told["model_type"] != "phi", "config.json still says model_type phi"


def test_it_learns():
    mlp()
    torch.manual_seed(0)
    losses = train(nanophi.Phi(config()), data(), steps=24, lr=0.02)
    fell = f"from {losses[0]:.2f} to {losses[-1]:.2f} in 24 steps"
    assert losses[-1] < losses[0] - 1, f"it learns to count: the loss should fall by 1, not {fell}"


def test_each_matrix_has_a_gradient_and_speed_changes_nothing():
    """speed.py computes `contract` a second time, in backward, with whatever it takes."""
    gradients = []
    for is_fast in (False, True):
        made = model().train()
        if is_fast:
            speed.speed_up(made)
        loss, count, _ = nanophi.next_token_loss(made, data().batch_at(0))
        (loss / count).backward()
        gradients.append({name: p.grad for name, p in made.named_parameters()})
    plain, fast = gradients
    for layer in ("gate", "fc1", "fc2"):
        name = f"model.layers.0.mlp.{layer}.weight"
        assert plain[name] is not None, f"{layer} has no gradient: it takes no part"
        assert plain[name].any(), f"the gradient of {layer} is 0: it takes no part"
    for name, gradient in plain.items():
        apart = (gradient - fast[name]).abs().max().item()
        assert apart < 1e-4, f"after speed_up the gradient of {name} is {apart:.2g} away"


@torch.no_grad()
def test_it_generates_with_a_cache():
    made = model()
    ids = list(range(5, 13))
    for _ in range(8):
        ids.append(int(made(torch.tensor([ids]))[0, -1].argmax()))
    found = nanophi.generate(made, list(range(5, 13)), max_new_tokens=8, eos_token_id=None)
    assert list(found) == ids[8:], f"greedy without a cache: {ids[8:]}, generate gives {found}"
