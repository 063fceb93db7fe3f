from contextlib import contextmanager

import torch

import nanophi

IDS = [5, 17, 3, 29, 8, 8, 40, 2, 21, 33, 5, 17]
CLOSE = 1e-5  # of logits of some units; the rotary tables are in fp32


def tiny_model():
    """Given weights: those of a random network, large enough that attention is sharp."""
    torch.manual_seed(0)
    cfg = nanophi.PhiConfig(
        vocab_size=64,
        hidden_size=32,
        num_attention_heads=4,
        num_hidden_layers=2,
        intermediate_size=48,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    return nanophi.Phi(cfg).double().eval().requires_grad_(False)


def uncached(model, ids):
    return model(torch.tensor([ids]))[0]


def close(found, expected, what):
    shapes = f"{tuple(found.shape)}, not {tuple(expected.shape)}"
    assert found.shape == expected.shape, f"{what}: logits {shapes}"
    apart = (found - expected).abs().amax(-1)
    wrong = (apart > CLOSE).nonzero()[:, 0].tolist()
    assert not wrong, f"{what}: the logits of token {wrong[0]} are {apart[wrong[0]]:.2g} away"


@contextmanager
def counting(model):
    """How many tokens each layer computes: a list for k_proj and one for the MLP."""
    counts = {"k_proj": [], "mlp": []}
    hooks = []
    for block in model.model.layers:
        for name, module in (("k_proj", block.self_attn.k_proj), ("mlp", block.mlp)):
            place = len(counts[name])
            counts[name].append(0)

            def hook(module, inputs, output, name=name, place=place):
                counts[name][place] += output.shape[:-1].numel()

            hooks.append(module.register_forward_hook(hook))
    try:
        yield counts
    finally:
        for hook in hooks:
            hook.remove()


def test_all_at_once_it_is_the_network(mine):
    model = tiny_model()
    found = mine.forward(model, IDS, mine.new_cache(model))
    close(found, uncached(model, IDS), "12 tokens in one call")


def test_one_at_a_time_it_is_the_network(mine):
    model = tiny_model()
    cache = mine.new_cache(model)
    found = torch.cat([mine.forward(model, [token], cache) for token in IDS])
    close(found, uncached(model, IDS), "12 calls of one token")


def test_in_pieces_it_is_the_network(mine):
    """Several new tokens behind others: each sees the cache, itself, and the new ones before it."""
    model = tiny_model()
    cache = mine.new_cache(model)
    parts = [IDS[:5], IDS[5:6], IDS[6:10], IDS[10:]]
    found = torch.cat([mine.forward(model, part, cache) for part in parts])
    close(found, uncached(model, IDS), "calls of 5, 1, 4 and 2 tokens")


def test_each_cache_is_its_own(mine):
    model = tiny_model()
    one, other = mine.new_cache(model), mine.new_cache(model)
    mine.forward(model, IDS[:4], one)
    mine.forward(model, IDS[6:9], other)
    found = mine.forward(model, IDS[4:6], one)
    close(found, uncached(model, IDS[:6])[4:], "two conversations in turns")


def test_only_new_tokens_are_computed(mine):
    model = tiny_model()
    cache = mine.new_cache(model)
    mine.forward(model, IDS[:8], cache)
    with counting(model) as counts:
        mine.forward(model, IDS[8:10], cache)
    for name, each in counts.items():
        assert each == [2, 2], f"2 new tokens, {name} computed {each} of them in the two layers"


def test_decoding_is_that_without_a_cache(mine):
    model = tiny_model()
    ids = list(IDS)
    for _ in range(9):
        ids.append(int(uncached(model, ids)[-1].argmax()))
    prompt = list(IDS)
    found = mine.decode(model, prompt, 9)
    assert prompt == IDS, "decode has changed the prompt it was given"
    assert list(found) == ids[12:], f"without a cache {ids[12:]}, yours {list(found)}"


def test_decoding_computes_each_token_once(mine):
    model = tiny_model()
    for count in (1, 9):
        with counting(model) as counts:
            mine.decode(model, list(IDS), count)
        expected = len(IDS) + count - 1
        for name, each in counts.items():
            assert each == [expected] * 2, (
                f"a prompt of 12 and {count} new ids: {expected} tokens, {name} computed {each} "
                "in the two layers"
            )
