"""Decoding on a GPU gives what the loop gives.

No GPU is needed: `Recording` stands for a CUDA graph, and the device "meta" for a GPU.
"""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nanophi import generate, stream
from nanophi.cli import UserError
from nanophi.infer import generate as loop
from nanophi.infer import static
from nanophi.infer.generate import check_prompts, decode_steps
from nanophi.infer.sampling import FILTERS, Filter, Sampling, choose
from nanophi.infer.static import FIRST, WAYS, WINDOW, Static, StaticCache, static_steps, suits
from nanophi.model.config import PhiConfig
from nanophi.model.phi import KVCache, Phi
from tests.conftest import tiny_model
from tests.infer.test_decoder import Squared
from tests.infer.test_generate import returned
from tests.model.test_phi import SHAPES
from tests.test_devices import gpu, model_on_gpu
from tests.test_devices import without_autocast as without_autocast  # for all tests here

PROMPTS = [[7, 50, 200, 33], [9], [5, 6] * 15]
SAMPLED = [
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 20},
    {"temperature": 1.3, "top_p": 0.9, "min_p": 0.02},
]


class Recording(TorchDispatchMode):
    """A CUDA graph for the CPU: it plays operations back, with the tensors that they had.

    As with a CUDA graph, Python does not run again, and a number is never read.
    """

    def __init__(self):
        super().__init__()
        self.played = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert "local_scalar" not in str(function), "a recording reads no number"
        out = function(*args, **(kwargs or {}))
        self.played.append((function, args, kwargs or {}, out))
        return out

    def play(self):
        for function, args, kwargs, out in self.played:
            new = function(*args, **kwargs)
            for place, result in zip(tree_leaves(out), tree_leaves(new), strict=True):
                if place.data_ptr() != result.data_ptr():  # a view stays where it is
                    place.copy_(result)


def record(step, device):
    """`static.recorded` for a CPU. To record is to do the step once, so its effects are undone."""
    bound = step.__self__
    held = {name: t.clone() for name, t in tensors_of(bound).items()}
    with Recording() as recording:
        step()
    for name, tensor in tensors_of(bound).items():
        tensor.copy_(held[name])
    return recording.play


def tensors_of(steps):
    cache = steps.cache
    return {"ids": steps.ids, "lengths": cache.lengths, "store": cache.store}


@pytest.fixture(autouse=True)
def without_a_gpu(monkeypatch):
    monkeypatch.setattr(static, "recorded", record)


def answers(steps, model, prompts, tokens=256, eos=(), seed=3, **how):
    found = [[] for _ in prompts]
    rooms = check_prompts(model, prompts, tokens)
    for new in steps(model, prompts, rooms, set(eos), Sampling(**how), dice(seed)):
        for row, token in new.items():
            found[row].append(token)
    return found


def both(*arguments, **named):
    expected = answers(decode_steps, *arguments, **named)
    assert answers(static_steps, *arguments, **named) == expected
    return expected


@pytest.mark.parametrize("played", [True, False], ids=["recorded", "plain"])
@pytest.mark.parametrize("how", [{}, *SAMPLED], ids=["greedy", "sampled", "top k", "top p"])
def test_tokens_are_those_of_the_loop(how, played, monkeypatch):
    """Up to the end of the context, with prompts of unequal lengths; then with an [EOS] or two."""
    if not played:
        monkeypatch.setattr(static, "recorded", lambda step, device: step)
    model = tiny_model(spread=0.3)
    free = both(model, PROMPTS, **how)
    assert [len(answer) for answer in free] == [60, 63, 34]
    for prompt in PROMPTS:
        both(model, [prompt], **how)
    for places in ([0], [FIRST - 1], [FIRST], [FIRST + WINDOW - 1, 2], [40, 1, 30]):
        ends = {free[row][place] for row, place in enumerate(places)}
        stopped = both(model, PROMPTS, eos=ends, **how)
        assert stopped[0][-1] in ends


@pytest.mark.parametrize(
    "shape",
    [*SHAPES.values(), {"hidden_size": 120, "num_attention_heads": 2}],
    ids=[*SHAPES.keys(), "head_dim 60"],
)
def test_all_shapes(shape):
    model = tiny_model(spread=0.3, **shape)
    both(model, PROMPTS)
    both(model, PROMPTS, temperature=0.9)


MODEL = tiny_model(spread=0.3)


@settings(max_examples=25)
@given(
    prompts=st.lists(
        st.lists(st.integers(0, 447), min_size=1, max_size=40), min_size=1, max_size=4
    ),
    tokens=st.integers(1, 45),
    eos=st.sets(st.integers(0, 447), max_size=40),
    temperature=st.sampled_from([0.0, 1.0]),
)
def test_any_prompts(prompts, tokens, eos, temperature):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(static, "recorded", record)
        both(MODEL, prompts, tokens, eos, temperature=temperature)


def test_the_entrances_take_it(tok, monkeypatch):
    """`generate` and `stream` say the same by both ways."""
    model = tiny_model(spread=0.3)
    asked = [
        lambda: generate(model, PROMPTS, 30),
        lambda: generate(model, PROMPTS[0], 1),
        lambda: list(stream(model, tok, "春天", 40)),
        lambda: returned(stream(model, tok, "春天", 90, eos_token_id=None)),
        lambda: list(
            stream(model, tok, "春天", 40, stop=["的"], temperature=0.8, generator=dice())
        ),
    ]
    expected = [ask() for ask in asked]
    monkeypatch.setattr(loop, "decode_steps", static_steps)
    assert [ask() for ask in asked] == expected


def dice(seed=5):
    return torch.Generator().manual_seed(seed)


def test_the_context_is_the_largest_room():
    model = tiny_model(max_position_embeddings=100)
    assert [static.room_for(model, longest) for longest in (1, 64, 65, 100)] == [64, 64, 100, 100]


def test_a_cache_sees_what_the_other_one_sees():
    model = tiny_model()
    filled = KVCache(model.cfg, 2, 6, model.lm_head.weight)
    filled.lengths[:] = torch.tensor([2, 4])
    cache = StaticCache(filled)
    for cache_of in (filled, cache):
        assert cache_of.begin(1).tolist() == [[2], [4]]
    assert torch.equal(cache.visible()[..., :5], filled.visible())
    assert not cache.visible()[..., 5:].any()
    cache.lengths += 9  # long after the end
    assert cache.begin(1).tolist() == [[5], [5]]
    assert repr(cache) == "KVCache(13 of 6 tokens, 2 rows)"


# ---- damage


@pytest.mark.parametrize("how", [{}, {"temperature": 0.8}])
def test_damaged_weights_are_an_error_at_their_token(how):
    """The tokens before it are said, and no token behind the end of an answer counts."""
    model = tiny_model(spread=0.3)
    free = answers(static_steps, model, PROMPTS[:1], 20, **how)[0]
    place = next(i for i in range(FIRST, 15) if free[i] not in [*free[:i], *PROMPTS[0]])
    with torch.no_grad():
        model.model.embed_tokens.weight[free[place]] = torch.nan  # read when it has been said
    rooms = [20]
    steps = static_steps(model, PROMPTS[:1], rooms, set(), Sampling(**how), dice(3))
    said = [next(steps)[0] for _ in range(place + 1)]
    assert said == free[: place + 1]
    with pytest.raises(UserError, match="computes no probabilities"):
        next(steps)
    stopped = answers(static_steps, model, PROMPTS[:1], 20, eos=[free[place]], **how)[0]
    assert stopped == free[: place + 1]


# ---- what a GPU is asked for


class Kernels(TorchDispatchMode):
    """Counts the operations that write into memory: each is a kernel of a GPU, or several."""

    def __init__(self):
        super().__init__()
        self.count = 0
        self.devices = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = tensors_in((args, kwargs))
        out = function(*args, **(kwargs or {}))
        self.devices |= {tensor.device.type for tensor in given}
        known = {storage_of(tensor) for tensor in given}
        is_new = any(
            t.device.type == "meta" and storage_of(t) not in known for t in tensors_in(out)
        )
        self.count += is_new or function._schema.is_mutable
        return out


def tensors_in(values):
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def storage_of(tensor):
    return tensor.untyped_storage()._cdata


def cache_of(model, room=512):
    cache = KVCache(model.cfg, 1, room, model.lm_head.weight)
    cache.lengths += 4
    return cache


@torch.inference_mode()
def kernels_of_a_token(way, model, **how):
    steps = Static(way(model), StaticCache(cache_of(model)), Sampling(**how))
    with Kernels() as kernels:
        steps.step()
    assert kernels.devices == {"meta"}  # to copy a number there is no part of a recording
    return kernels.count


@torch.inference_mode()
def kernels_of_the_loop(model):
    """One round of `decode_steps`, up to the number that `choose` reads."""
    cache = cache_of(model)
    ids = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
    with Kernels() as kernels, pytest.raises((RuntimeError, NotImplementedError)):
        choose(model.lm_head(model.hidden(ids, cache=cache)[:, -1]), [[]], Sampling())
    return kernels.count


def test_kernels_of_a_token():
    """Of the 0.2 B model in bf16, for one greedy token. What a recording saves is the asking and
    the waiting; FewKernels saves kernels: 12 a layer in place of 32, 14 of which turned q and k.

        the loop, up to the first number that it reads    515
        a recording of phi.py                             522
        a recording of FewKernels                         193; with top_p and min_p 226
    """
    with torch.device("meta"):
        model = Phi(PhiConfig.preset("phi2-chinese-0.2b")).bfloat16().eval()
    few, itself = WAYS
    assert kernels_of_the_loop(model) == 515
    assert kernels_of_a_token(itself, model) == 522
    assert kernels_of_a_token(few, model) == 193
    assert kernels_of_a_token(few, model, **SAMPLED[2]) == 226


def waits_of(tokens, prompts, how, way):
    """Waits of an answer. A step that is done stands for one that is played back."""
    model = model_on_gpu()
    with pytest.MonkeyPatch.context() as patch, gpu() as watch:
        patch.setattr(static, "recorded", lambda step, device: step)
        patch.setattr(static, "way_of", lambda model: way)  # which reads a number, once a model
        steps = static_steps(model, prompts, [tokens] * len(prompts), set(), Sampling(**how))
        assert sum(1 for _ in steps) == tokens
    return watch.waits


@pytest.mark.parametrize("way", WAYS, ids=["few kernels", "the model"])
@pytest.mark.parametrize("how", [{}, SAMPLED[2]], ids=["greedy", "sampled"])
def test_one_wait_for_sixteen_tokens(how, way):
    prompts = [[7, 8, 9], [5]]
    assert waits_of(1, prompts, how, way) == 1
    assert waits_of(FIRST, prompts, how, way) == 1
    assert waits_of(FIRST + 2 * WINDOW, prompts, how, way) == 3
    if not how:
        assert waits_of(FIRST + WINDOW, prompts[1:], how, way) == 2


def test_the_loop_waits_for_each_token():
    """For its logit, which must be a number, and for its id."""
    with gpu() as watch:
        assert len(list(decode_steps(model_on_gpu(), [[7]], [20], set(), Sampling()))) == 20
    assert watch.waits == 40


@pytest.mark.parametrize("way", WAYS, ids=["few kernels", "the model"])
@pytest.mark.parametrize("how", [{}, SAMPLED[2]], ids=["greedy", "sampled"])
@torch.inference_mode()
def test_a_step_can_be_compiled(how, way):
    """Whole, and once for all lengths: what can be traced depends on nothing that Python knows."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = tiny_model(spread=0.3)
    network = way(model)
    filled = KVCache(model.cfg, len(PROMPTS), 64, model.lm_head.weight)
    steps = Static(network, StaticCache(filled), Sampling(**how))
    compiled = torch.compile(steps.step, fullgraph=True, dynamic=False, backend="aot_eager")
    said = []
    for step in (steps.step, compiled):
        steps.ids.fill_(7)
        steps.cache.lengths.copy_(torch.tensor([0, 3, 9]))
        steps.cache.store.zero_()
        generator = dice()
        for _ in range(40):
            steps.draw(generator)
            step()
            said.append(steps.ids.tolist())
    assert said[:40] == said[40:]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()


# ---- where the loop decodes


def test_what_the_recording_decodes(monkeypatch):
    model = tiny_model()
    assert suits(model, Sampling())
    assert all(suits(model, Sampling(**how)) for how in SAMPLED)
    for how in ({"repetition_penalty": 1.2}, {"no_repeat_ngram_size": 3}, {"logit_bias": {5: 1.0}}):
        assert not suits(model, Sampling(**how))
    assert not suits(tiny_model().train(), Sampling())
    hook = model.model.layers[0].register_forward_hook(lambda *arguments: None)
    assert not suits(model, Sampling())
    hook.remove()
    assert suits(model, Sampling())
    added = Filter(lambda logits, history, value: logits, float, 0.0, "may read anything")
    monkeypatch.setitem(FILTERS, "epsilon", added)
    assert not suits(model, Sampling(temperature=1.0, epsilon=0.1))
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: True)
    assert not suits(model, Sampling())


@pytest.mark.parametrize(
    ("device", "suited", "expected"),
    [("cuda", True, "static"), ("cuda", False, "loop"), ("cpu", True, "loop")],
)
def test_only_a_gpu_records(device, suited, expected, monkeypatch):
    monkeypatch.setattr(static, "suits", lambda model, how: suited)
    monkeypatch.setattr(static, "static_steps", lambda *arguments: "static")
    monkeypatch.setattr(loop, "decode_steps", lambda *arguments: "loop")
    model = SimpleNamespace(device=torch.device(device))
    assert loop.steps_of(model, [[7]], [5], set(), Sampling(), None, 0) == expected


class Counting(nn.Module):
    """Attention that somebody has changed: it weighs keys by how many there are."""

    def __init__(self, attention):
        super().__init__()
        self.changed = attention

    def forward(self, x, rotary, layer, cache, plan):
        out = self.changed(x, rotary, layer, cache, plan)
        if cache is None:
            held = torch.arange(1, x.shape[1] + 1)[:, None]
        else:
            held = cache.update(layer, *[x.new_zeros(1, x.shape[1], 4, 8)] * 2)[0].shape[2]
        return out / held


class Asking(Counting):
    """... and this one asks for what a KVCache on the CPU tells."""

    def forward(self, x, rotary, layer, cache, plan):
        if cache is not None:
            assert cache.start is not None
        return self.changed(x, rotary, layer, cache, plan)


def test_a_changed_network_is_decoded_as_it_computes():
    model = tiny_model(spread=0.3)
    few, itself = WAYS
    assert static.way_of(model) is few
    for block in model.model.layers:
        block.mlp = Squared(block.mlp)
    assert static.way_of(model) is itself  # known by the kinds of its modules
    both(model, PROMPTS)
    for changed in (Counting, Asking):
        model = tiny_model()
        for block in model.model.layers:
            block.self_attn = changed(block.self_attn)
        assert static.way_of(model) is None
        assert not suits(model, Sampling())


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_way_of_each_shape(shape, dtype):
    model = tiny_model(spread=0.3, **shape).to(dtype)
    assert static.way_of(model) is WAYS[0]
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)  # damage changes no way; it is an error of its own
    static.KNOWN.clear()
    assert static.way_of(model) is WAYS[0]


def test_short_memory(monkeypatch):
    """The weights, held once more, may be too much for a GPU that holds the model."""

    def no_memory(model):
        raise torch.OutOfMemoryError("CUDA out of memory")

    model = tiny_model()
    monkeypatch.setattr(static, "way_of", lambda model: no_memory)
    assert static.network_for(model) is model


def test_a_step_that_cannot_be_recorded_goes_on(monkeypatch):
    def no_graph():
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "CUDAGraph", no_graph)
    model = tiny_model(spread=0.3)
    with pytest.warns(UserWarning, match="decoding goes on without a CUDA graph: operation"):
        found = answers(static_steps, model, PROMPTS, 30)
    assert found == generate(model, PROMPTS, 30)


# ---- on a GPU

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


@on_gpu
@pytest.mark.parametrize("how", [{}, *SAMPLED], ids=["greedy", "sampled", "top k", "top p"])
def test_tokens_on_a_gpu(how, monkeypatch):
    """In fp32 the same tokens as the loop, without a warning."""
    monkeypatch.undo()
    model = tiny_model(spread=0.3).cuda()
    assert suits(model, Sampling(**how))
    found = []
    for steps in (decode_steps, static_steps):
        answer = [[] for _ in PROMPTS]
        rooms = check_prompts(model, PROMPTS, 50)
        generator = torch.Generator("cuda").manual_seed(3)
        for new in steps(model, PROMPTS, rooms, set(), Sampling(**how), generator):
            for row, token in new.items():
                answer[row].append(token)
        found.append(answer)
    assert found[0] == found[1]


@on_gpu
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@torch.inference_mode()
def test_bf16_on_a_gpu(shape, monkeypatch):
    """Each token is the likeliest one for the model, up to the rounding of bf16."""
    monkeypatch.undo()
    model = tiny_model(spread=0.3, **shape).cuda().bfloat16()
    assert suits(model, Sampling())
    answer = generate(model, PROMPTS[0], 50, eos_token_id=None)
    logits = model(torch.tensor([PROMPTS[0] + answer], device="cuda"))[0].float()
    logits = logits[len(PROMPTS[0]) - 1 : -1]
    said = logits.gather(1, torch.tensor(answer, device="cuda")[:, None])[:, 0]
    assert (logits.amax(1) - said).max() < 0.05 * logits.abs().max()
