"""Generation: transformers' tokens, cached = uncached, batched = single, whole characters only."""

import itertools

import pytest
import torch

from nanophi import generate, stream
from nanophi.cli import UserError
from tests.conftest import tiny_model
from tests.model.test_phi import hf_twin

PROMPT = [7, 50, 200, 33, 50, 200]
SETTINGS = [
    {},
    {"repetition_penalty": 1.3},
    {"no_repeat_ngram_size": 3},
    {"repetition_penalty": 1.2, "no_repeat_ngram_size": 2},
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_greedy_tokens_are_those_of_transformers(settings):
    model = tiny_model(spread=0.3)
    theirs = hf_twin(model).generate(
        torch.tensor([PROMPT]), attention_mask=torch.ones(1, 6), max_new_tokens=40, do_sample=False,
        eos_token_id=1, pad_token_id=0, **settings,
    )  # fmt: skip
    assert generate(model, PROMPT, max_new_tokens=40, **settings) == theirs[0, 6:].tolist()


def test_cached_decoding_equals_uncached():
    model = tiny_model(spread=0.3)
    ids = list(PROMPT)
    for _ in range(30):
        ids.append(model(torch.tensor([ids]))[0, -1].argmax().item())
    assert generate(model, PROMPT, max_new_tokens=30, eos_token_id=None) == ids[6:]


def test_batch_of_unequal_prompts_equals_single_ones():
    model = tiny_model(spread=0.3)
    prompts = [PROMPT, [9], PROMPT[:3] * 5]
    together = generate(model, prompts, max_new_tokens=20)
    assert together == [generate(model, prompt, max_new_tokens=20) for prompt in prompts]
    assert generate(model, torch.tensor(PROMPT), max_new_tokens=5) == generate(
        model, PROMPT, max_new_tokens=5
    )


def test_eos_ends_the_answer_and_is_in_it():
    model = tiny_model(spread=0.3)
    free = generate(model, PROMPT, max_new_tokens=10, eos_token_id=None)
    assert len(free) == 10
    stopped = generate(model, PROMPT, max_new_tokens=10, eos_token_id=free[4])
    assert stopped == free[: free.index(free[4]) + 1]
    model.cfg.eos_token_id = free[4]  # the config's is the default
    assert generate(model, PROMPT, max_new_tokens=10) == stopped
    assert generate(model, PROMPT, max_new_tokens=10, eos_token_id=[2, free[4]]) == stopped


def force(model, ids):
    """Make the model say `ids` one after the other, whatever the prompt.

    Each token's embedding points at the row of the next one in the head.
    """
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        model.model.final_layernorm.weight.fill_(1.0)
        width = model.cfg.hidden_size
        for i, (a, b) in enumerate(itertools.pairwise(ids)):
            model.model.embed_tokens.weight[a, i % width] = 100.0
            model.lm_head.weight[b, i % width] = 10.0
    return model


def test_stream_yields_whole_characters_only(tok):
    """A byte-level token may end within a character; printed at once, 鱻 had � in its middle."""
    # Neither 鱻 nor 😀 was in the training text: they are three and four tokens of one byte.
    text = "鱻😀好"
    ids = [tok.encode("a")[0], *tok.encode(text), tok.eos_id]
    assert len(set(ids)) == len(ids) > 8
    model = force(tiny_model(hidden_size=64), ids)
    pieces = list(stream(model, tok, "a", max_new_tokens=50))
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece and piece for piece in pieces)
    assert list(stream(model, tok, tok.encode("a"), max_new_tokens=50)) == pieces
    assert list(stream(model, tok, "a", max_new_tokens=2)) == []  # ends within 鱻
    assert list(stream(model, tok, "a", max_new_tokens=4)) == ["鱻"]


def test_empty_prompts_are_refused(tok):
    for prompt in ([], [[7], []]):
        with pytest.raises(UserError, match="prompt is empty"):
            generate(tiny_model(), prompt)
    with pytest.raises(UserError, match="prompt is empty"):
        next(stream(tiny_model(), tok, ""))


def test_text_is_refused_where_ids_are_needed():
    for prompt in ("你", "你好吗", ["你好", "春天"]):
        with pytest.raises(UserError, match=r"is text: encode it first, .*or use stream"):
            generate(tiny_model(), prompt)


def test_prompts_beyond_the_context_are_refused_and_answers_may_outgrow_it(tok):
    model = tiny_model(spread=0.3)
    with pytest.raises(UserError, match="prompt has 65 tokens, the model was made for 64"):
        generate(model, [7] * 65)
    with pytest.raises(UserError, match="prompt has 65 tokens, the model was made for 64"):
        next(stream(model, tok, [7] * 65))
    assert len(generate(model, [7] * 64, max_new_tokens=5, eos_token_id=None)) == 5


def test_ids_beyond_the_vocabulary_are_refused(tok):
    for prompt in ([7, 448], [[7], [-1]]):
        with pytest.raises(UserError, match="the model knows ids 0 to 447"):
            generate(tiny_model(), prompt)
    with pytest.raises(UserError, match="the model knows ids 0 to 447"):
        next(stream(tiny_model(), tok, [448]))
