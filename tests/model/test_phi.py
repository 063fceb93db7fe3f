"""The network against transformers' PhiForCausalLM, and packed documents against separate ones."""

import itertools

import pytest
import torch
from transformers import PhiConfig as HFConfig
from transformers import PhiForCausalLM

from nanophi.cli import UserError
from nanophi.model.attention import document_index, document_positions
from nanophi.model.config import PRESETS, PhiConfig
from nanophi.model.phi import KVCache, Phi, Record
from tests.conftest import tiny_config, tiny_model

SHAPES = {
    "rotary 0.5": {},
    "rotary 0.4, head_dim 20": {"hidden_size": 80, "partial_rotary_factor": 0.4},
    "rotary 0.25": {"partial_rotary_factor": 0.25},
    "grouped queries": {"num_key_value_heads": 2},
    "qk layernorm": {"qk_layernorm": True},
}


def hf_twin(model: Phi, attention="eager") -> PhiForCausalLM:
    hf = PhiForCausalLM(HFConfig(**model.cfg.to_dict(), attn_implementation=attention))
    hf.load_state_dict(model.state_dict())  # strict: the keys are equal
    return hf.eval()


def tokens(*shape, vocab=448, seed=0):
    return torch.randint(
        1, vocab, shape, generator=torch.Generator().manual_seed(seed)
    )  # 0: HF's pad row is special


@pytest.mark.parametrize("attention", ["manual", "sdpa", "documents"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_logits_loss_and_gradients_are_those_of_transformers(shape, attention):
    model = tiny_model(**shape)
    model.attention = attention
    hf, ids = hf_twin(model), tokens(2, 40)
    assert set(model.state_dict()) == set(hf.state_dict())
    ours, theirs = model(ids), hf(ids, labels=ids)
    assert (ours - theirs.logits).abs().max() < 1e-5
    loss = torch.nn.functional.cross_entropy(ours[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert abs(loss.item() - theirs.loss.item()) < 1e-6
    loss.backward()
    theirs.loss.backward()
    named = dict(hf.named_parameters())
    for name, p in model.named_parameters():
        difference = (p.grad - named[name].grad).norm()
        # A gradient that is zero in exact arithmetic (k_proj.bias shifts all scores alike) has no
        # relative error.
        assert difference <= 1e-4 * named[name].grad.norm() + 1e-7, name


def test_parity_in_double_precision():
    model = tiny_model().double()
    hf = hf_twin(model, "sdpa").double()  # its eager attention takes the softmax in fp32
    ids = tokens(2, 40)
    assert (model(ids) - hf(ids).logits).abs().max() < 1e-12


def test_parity_at_the_shape_of_the_released_model():
    torch.manual_seed(0)
    model = Phi(PhiConfig.preset("phi2-chinese-0.2b")).eval()
    hf, ids = hf_twin(model), tokens(1, 64, vocab=35840)
    with torch.inference_mode():
        ours = model(ids)
        assert (ours - hf(ids).logits).abs().max() < 1e-5
    loss = torch.nn.functional.cross_entropy(ours[0, :-1], ids[0, 1:])
    assert (
        abs(loss / torch.tensor(35840.0).log() - 1) < 0.02
    )  # so small weights predict nothing yet


def test_the_first_loss_of_the_demo_shape_is_ln_vocab():
    torch.manual_seed(0)
    model = Phi(PhiConfig.preset("demo"))
    model.set_vocabulary(2000)
    ids = tokens(2, 256, vocab=2000)
    loss = torch.nn.functional.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert abs(loss / torch.tensor(2000.0).log() - 1) < 0.02


PARAMETERS = {
    "demo": 2_566_784,
    "phi2-chinese-0.2b": 193_651_200,
    "phi2-chinese-0.35b": 340_426_112,
    "phi2-chinese-0.35b-fast": 328_623_488,
    "phi-1.5": 1_418_270_720,
    "phi-2": 2_779_683_840,
}


@pytest.mark.parametrize("name", PRESETS)
def test_parameter_counts(name):
    with torch.device("meta"):
        model = Phi(PhiConfig.preset(name))
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]


def packed(seed=0):
    """Rows of 24 tokens: documents of 7 + 17, of 24, of 1 + 20 + 3 -> ids (3, 24), boundaries."""
    return tokens(3, 24, seed=seed), torch.tensor([0, 7, 24, 48, 49, 69, 72], dtype=torch.int32)


def test_boundaries_become_documents_and_positions():
    cu = torch.tensor([0, 2, 5], dtype=torch.int32)
    assert document_index(cu, 5).tolist() == [0, 0, 1, 1, 1]
    assert document_positions(cu, 5).tolist() == [0, 1, 0, 1, 2]


@pytest.mark.parametrize("attention", ["manual", "sdpa", "documents"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_packed_documents_are_as_if_alone(shape, attention):
    """In the original, documents of a packed row see each other, and positions run on."""
    model = tiny_model(**shape)
    model.attention = attention
    ids, cu = packed()
    together = model(ids, cu_seqlens=cu).flatten(0, 1)
    together.logsumexp(-1).sum().backward()
    packed_grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    alone = torch.cat([model(ids.flatten()[a:b][None])[0] for a, b in itertools.pairwise(cu)])
    alone.logsumexp(-1).sum().backward()
    assert (together - alone).abs().max() < 1e-5
    for name, p in model.named_parameters():
        assert (packed_grads[name] - p.grad).abs().max() < 1e-5 * max(
            1.0, p.grad.abs().max().item()
        ), name


def test_another_document_changes_nothing():
    model, (ids, cu) = tiny_model(), packed()
    changed = ids.clone()
    changed[0, :7] = tokens(7, seed=9)
    assert torch.equal(model(ids, cu)[0, 7:], model(changed, cu)[0, 7:])
    assert not torch.equal(model(ids)[0, 7:], model(changed)[0, 7:])  # without boundaries it does


@pytest.mark.parametrize("attention", ["manual", "sdpa"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_cached_equals_uncached(shape, attention):
    model = tiny_model(**shape)
    model.attention = attention
    ids = tokens(2, 20)
    cache = KVCache(model.cfg, 2, 20, model.lm_head.weight)
    steps = [model(part, cache=cache) for part in ids.split([11, 1, 5, 1, 1, 1], dim=1)]
    assert (torch.cat(steps, dim=1) - model(ids)).abs().max() < 2e-5


@pytest.mark.parametrize("attention", ["manual", "sdpa"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_rows_of_a_cache_may_hold_different_numbers_of_tokens(shape, attention):
    """Prompts are padded on the right; what follows overwrites the padding."""
    model = tiny_model(**shape)
    model.attention = attention
    ids = tokens(3, 12)
    cache = KVCache(model.cfg, 3, 12, model.lm_head.weight)
    lengths = [2, 7, 4]
    padded = ids[:, :7].clone()
    for row, length in zip(padded, lengths, strict=True):
        row[length:] = 9
    found = model(padded, cache=cache)
    cache.lengths[:] = torch.tensor(lengths)
    expected = model(ids)
    for row, length in enumerate(lengths):
        assert (found[row, :length] - expected[row, :length]).abs().max() < 2e-5
    for time in (1, 3, 1):
        more = torch.stack([ids[row, n : n + time] for row, n in enumerate(cache.lengths.tolist())])
        starts = cache.lengths.tolist()
        found = model(more, cache=cache)
        for row, start in enumerate(starts):
            assert (found[row] - expected[row, start : start + time]).abs().max() < 2e-5
    assert cache.lengths.tolist() == [7, 12, 9]


def test_a_part_of_a_cache_goes_on_alone_and_rows_move():
    model, ids = tiny_model(), tokens(3, 10)
    cache = KVCache(model.cfg, 3, 10, model.lm_head.weight)
    model(ids[:, :5], cache=cache)
    cache.move(2, 0)
    found = model(ids[[2], 5:8], cache=cache.part(0, 1))
    assert cache.lengths.tolist() == [8, 5, 5]
    assert (found - model(ids)[[2], 5:8]).abs().max() < 2e-5


def test_forbidden_ids_are_never_likely_and_can_be_allowed():
    model = tiny_model()
    model.set_vocabulary(400)
    assert model(tokens(1, 5))[..., 400:].max() < -1e3
    model.set_vocabulary(401)  # after tok.add_tokens
    assert model.lm_head.bias[400] == 0
    assert (model.lm_head.bias[401:] == -1e4).all()


def test_dropout_only_when_training():
    ids = tokens(1, 10)
    for name in ("resid_pdrop", "embd_pdrop", "attention_dropout"):
        model = tiny_model(**{name: 0.5})
        model_set = tiny_model()
        model_set.set_dropout(0.5)
        assert vars(model_set.cfg)[name] == vars(model.cfg)[name]
        assert torch.equal(model(ids), model(ids))
        model.train()
        for model.attention in ("manual", "sdpa"):
            assert not torch.equal(model(ids), model(ids)), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 30}, "not a multiple of 4 heads"),
        ({"partial_rotary_factor": 0.4}, "rotates 3 dimensions"),
        ({"num_key_value_heads": 3}, "not a multiple of num_key_value_heads 3"),
    ],
)
def test_impossible_shapes_say_why(changes, message):
    with pytest.raises(UserError, match=message):
        tiny_config(**changes)


def test_unknown_preset_names_the_known():
    with pytest.raises(UserError, match=r"no preset 'phi3'; there are demo, .*phi-2"):
        PhiConfig.preset("phi3")


def test_positions_beyond_the_context_are_refused():
    """Rotation goes on to any position, so a row too long gave logits that nobody had trained."""
    model = tiny_model(max_position_embeddings=16)
    with pytest.raises(UserError, match="a row has 17 tokens, the model was made for 16 positions"):
        model(tokens(1, 17))


def test_a_name_is_no_configuration():
    with pytest.raises(UserError, match=r"PhiConfig\.preset\('demo'\)"):
        Phi("demo")


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_a_record_holds_what_transformers_computes_inside(shape):
    model = tiny_model(**shape)
    ids = tokens(2, 20)
    record = Record()
    logits = model(ids, record=record)
    theirs = hf_twin(model)(ids, output_hidden_states=True, output_attentions=True)
    assert (logits - theirs.logits).abs().max() < 1e-5
    for ours, their in zip(record.attention, theirs.attentions, strict=True):
        assert (ours - their).abs().max() < 1e-5
    last = model.model.final_layernorm(record.hidden[-1])  # transformers' last is normalised
    for ours, their in zip([*record.hidden[:-1], last], theirs.hidden_states, strict=True):
        assert (ours - their).abs().max() < 1e-5


def test_a_record_of_packed_documents_has_no_weight_between_them():
    model, (ids, cu) = tiny_model(), packed()
    record = Record()
    model(ids, cu, record=record)
    between = record.attention[0][
        0, :, 7:, :7
    ]  # of row 0, the second document looking at the first
    assert between.abs().max() == 0
    assert len(record.hidden) == 3


@pytest.mark.parametrize(
    "ids",
    [
        torch.tensor([[5, 6]], dtype=torch.int32),
        torch.tensor([[5.0, 6.0]]),
        torch.tensor([[True]]),
        torch.tensor([5, 6]),
        torch.tensor([[[5]]]),
        torch.zeros(1, 0, dtype=torch.long),
        [[5, 6]],
        "感冒",
    ],
    ids=str,
)
def test_ids_of_another_type_or_form_are_refused(ids):
    """A row without a batch was an error deep within attention, or was read as another form."""
    with pytest.raises(UserError, match=r"ids of the form \(rows, tokens\)"):
        tiny_model()(ids)


@pytest.mark.parametrize("token", [-1, 448])
def test_ids_that_the_model_does_not_know_are_named(token):
    with pytest.raises(UserError, match=f"ids are from 5 to {token}|{token} to 5, the model knows"):
        tiny_model()(torch.tensor([[5, token]]))
