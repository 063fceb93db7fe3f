import torch

import nanophi

HEADS, ROTARY, LAYERS, VOCABULARY = 2, 4, 2, 50  # the width is 16, so head_dim is 8


def test_the_mlp_branch(mine):
    """With the output of attention set to 0."""
    compare(mine, "self_attn.dense")


def test_the_attention_branch(mine):
    """With the output of the MLP set to 0."""
    compare(mine, "mlp.fc2")


def test_the_branches_are_parallel(mine):
    """The MLP reads norm(x), and not what attention has made of x."""
    with torch.no_grad():
        x, weights = stream(), block_weights()
        both = mine.block(x, weights, HEADS, ROTARY) - x
        attention = mine.block(x, without(weights, "mlp.fc2"), HEADS, ROTARY) - x
        mlp = mine.block(x, without(weights, "self_attn.dense"), HEADS, ROTARY) - x
    difference = (both - attention - mlp).abs().max().item()
    assert difference < 1e-9, (
        f"the block adds something else than attention and MLP by themselves, by up to "
        f"{difference:.1e}: one of them reads what the other has made"
    )


def test_a_block_is_that_of_the_library(mine):
    compare(mine, None)


def test_the_logits_are_those_of_the_library(mine):
    model = random_model()
    with torch.no_grad():
        found = mine.logits(some_ids(), model.state_dict(), LAYERS, HEADS, ROTARY)
        close("the logits", found, model(some_ids()), "nanophi.Phi")


def test_the_logits_are_those_of_transformers(mine):
    model = random_model()
    weights = model.state_dict()
    with torch.no_grad():
        found = mine.logits(some_ids(), weights, LAYERS, HEADS, ROTARY)
    try:
        from transformers import PhiConfig, PhiForCausalLM
    except ModuleNotFoundError:
        raise AssertionError("this test needs transformers: pip install transformers") from None
    theirs = PhiForCausalLM(PhiConfig(**model.cfg.to_dict())).double().eval()
    theirs.load_state_dict(weights)
    with torch.no_grad():
        close("the logits", found, theirs(some_ids()).logits, "PhiForCausalLM")


def compare(mine, zero):
    """A block whose matrix `zero` is 0, beside that of the library."""
    model = random_model()
    layer = model.model.layers[0]
    with torch.no_grad():
        if zero:
            layer.load_state_dict(without(layer.state_dict(), zero))
        record = nanophi.Record()
        model(some_ids(), record=record)
        x, expected = record.hidden[:2]
        found = mine.block(x, layer.state_dict(), HEADS, ROTARY)
    close(f"the block with {zero} = 0" if zero else "the block", found, expected, "nanophi.Phi")


def close(name, found, expected, library):
    shape, wanted = tuple(found.shape), tuple(expected.shape)
    assert shape == wanted, f"{name} has the shape {shape}, expected {wanted}"
    difference = (found - expected).abs()
    first = difference.amax((0, 2)).gt(1e-5).nonzero()
    assert not len(first), (
        f"{name}: up to {difference.max().item():.1e} away from {library}, first at position "
        f"{int(first[0])}; expected at most 1e-5"
    )


def random_model():
    """All weights are random: a bias or a norm that is forgotten shows."""
    cfg = nanophi.PhiConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_attention_heads=HEADS,
        num_hidden_layers=LAYERS,
        intermediate_size=24,
        partial_rotary_factor=0.5,
    )
    model = nanophi.Phi(cfg).double().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.5 * torch.randn(p.shape, dtype=p.dtype, generator=generator))
    return model


def block_weights():
    return random_model().model.layers[0].state_dict()


def without(weights, name):
    """The same weights; those of one matrix are 0."""
    return {
        key: torch.zeros_like(value) if key.startswith(name) else value
        for key, value in weights.items()
    }


def stream():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 9, 16, dtype=torch.float64, generator=generator)


def some_ids():
    return torch.randint(1, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(2))
