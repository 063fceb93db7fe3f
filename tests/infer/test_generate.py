"""Generation: transformers' tokens, cached = uncached, batched = single, whole characters only."""

import functools
import io
import itertools
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import generate as script
from nanophi import generate, save, stream
from nanophi.cli import UserError, run_command
from nanophi.infer.decoder import Decoder
from nanophi.infer.generate import as_prompts
from nanophi.infer.sampling import FILTERS, Ids
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


def test_prompts_that_fill_the_context_are_refused(tok):
    """The limit was 64 tokens here and 63 there; there is no room for an answer behind 64 of 64."""
    model = tiny_model(spread=0.3)
    for prompt in ([7] * 64, [7] * 65):
        message = f"prompt has {len(prompt)} tokens, the model was made for 64"
        with pytest.raises(UserError, match=message):
            generate(model, prompt)
        with pytest.raises(UserError, match=message):
            next(stream(model, tok, prompt))
    assert len(generate(model, [7] * 63, eos_token_id=None)) == 1


def test_answers_end_where_the_context_is_full(tok):
    """An answer grew beyond the context without a word, on positions that nobody had trained."""
    model = tiny_model(spread=0.3)
    prompts = [[7] * 60, [9], PROMPT]
    # The memory of a generation was allocated for all of max_new_tokens.
    together = generate(model, prompts, max_new_tokens=10**12, eos_token_id=None)
    assert [len(answer) for answer in together] == [4, 63, 58]
    alone = [generate(model, prompt, 10**12, eos_token_id=None) for prompt in prompts]
    assert together == alone
    assert returned(stream(model, tok, PROMPT, 59, eos_token_id=None)) is True
    assert returned(stream(model, tok, PROMPT, 58, eos_token_id=None)) is False
    free = generate(model, PROMPT, 5, eos_token_id=None)
    assert returned(stream(model, tok, PROMPT, 59, eos_token_id=free[0])) is False


def returned(pieces):
    """What a generator returns at its end."""
    while True:
        try:
            next(pieces)
        except StopIteration as end:
            return end.value


def test_ids_beyond_the_vocabulary_are_refused(tok):
    for prompt in ([7, 448], [[7], [-1]]):
        with pytest.raises(UserError, match="the model knows ids 0 to 447"):
            generate(tiny_model(), prompt)
    with pytest.raises(UserError, match="the model knows ids 0 to 447"):
        next(stream(tiny_model(), tok, [448]))


FORMS = [
    (np.array([7, 50]), [[7, 50]]),
    (np.array([[7, 50], [9, 3]], dtype=np.uint16), [[7, 50], [9, 3]]),
    (torch.tensor([7, 50], dtype=torch.int32), [[7, 50]]),
    (torch.tensor([[7, 50]]), [[7, 50]]),
    ([torch.tensor([7, 50]), np.array([9])], [[7, 50], [9]]),
    ([np.int64(7), torch.tensor(50)], [[7, 50]]),
    ((7, 50), [[7, 50]]),
    (range(7, 9), [[7, 8]]),
]


@pytest.mark.parametrize(("ids", "prompts"), FORMS, ids=repr)
def test_prompts_of_every_clear_form_are_taken(ids, prompts):
    found, many = as_prompts(ids)
    assert found == prompts
    assert many == (np.ndim(ids[0]) == 1)
    assert all(type(token) is int for prompt in found for token in prompt)


deep = [5]
for _ in range(3000):
    deep = [deep]
WRONG_IDS = [
    *(None, 5, {}, {7: 8}, iter([7]), deep, [[[7]]], [7, [8]], [[7], 8], [None], [True], [7.0]),
    *(np.array([7.0]), np.array([True]), np.array([[["x"]]]), torch.tensor([7.0]), torch.tensor(7)),
    *(torch.tensor([True]), torch.zeros(1, 1, 1, dtype=torch.long)),
]


@pytest.mark.parametrize("ids", WRONG_IDS, ids=lambda ids: type(ids).__name__)
def test_what_is_no_list_of_ids_is_refused(ids):
    """Floats became ids by rounding, true was the id 1, and a nested list a TypeError of torch."""
    with pytest.raises(
        UserError, match=r"is no (token id|list of token ids): a prompt is \[5, 6, 7"
    ):
        as_prompts(ids)


@pytest.mark.parametrize("text", ["你", b"abc", [["你"]], [b"a"]], ids=repr)
def test_text_in_any_place_is_refused(text):
    with pytest.raises(UserError, match="this prompt is text"):
        as_prompts(text)


@pytest.mark.parametrize("tokens", [-100, 0, 1.5, None, True, "5", 10**40])
def test_wrong_numbers_of_new_tokens_are_refused(tokens, tok):
    """-100 gave an empty answer, and 1.5 a TypeError of torch."""
    with pytest.raises(
        UserError, match=r"max_new_tokens is .*, expected a whole number of at leas"
    ):
        generate(tiny_model(), PROMPT, tokens)
    with pytest.raises(UserError, match="max_new_tokens is "):
        next(stream(tiny_model(), tok, PROMPT, tokens))


@pytest.mark.parametrize("eos", ["x", [], [1, "x"], 448, -1, True, 1.0, [[1]]], ids=repr)
def test_an_end_that_cannot_come_is_refused(eos, tok):
    """With the id "x" or 448 as its end no answer ended."""
    with pytest.raises(UserError, match=r"eos_token_id is .*None lets an answer go on"):
        generate(tiny_model(), PROMPT, eos_token_id=eos)
    with pytest.raises(UserError, match="eos_token_id is "):
        next(stream(tiny_model(), tok, PROMPT, eos_token_id=eos))


def test_a_seed_is_no_generator():
    """generator=42 was ignored where decoding is greedy."""
    with pytest.raises(UserError, match=r"generator is 42, expected torch\.Generator"):
        generate(tiny_model(), PROMPT, generator=42)


def test_many_prompts_are_no_stream(tok):
    with pytest.raises(UserError, match="stream continues one prompt"):
        next(stream(tiny_model(), tok, [[7], [8]]))


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 5}])
def test_weights_that_compute_no_numbers_are_named(settings):
    """Greedy decoding answered [MASK][MASK][MASK], and sampling a RuntimeError of torch."""
    for wrong in (float("nan"), float("inf"), 1e38):
        model = tiny_model(spread=0.3)
        with torch.no_grad():
            model.lm_head.weight.fill_(wrong)
        with pytest.raises(UserError, match="logits are nan or infinite"):
            generate(model, PROMPT, **settings)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_when_all_ids_are_forbidden_none_is(temperature):
    """When all tokens had occurred, none was left, and sampling was a RuntimeError of torch."""
    model = tiny_model(spread=0.3, vocab_size=64, max_position_embeddings=256)
    model.set_vocabulary(40)
    how = {"no_repeat_ngram_size": 1, "temperature": temperature}
    answer = generate(model, [7, 5, 7], 100, eos_token_id=None, **how)
    assert sorted([7, 5, *answer[:38]]) == list(range(40))  # each once, before any comes again
    assert len(answer) == 100
    assert max(answer) < 40  # what no tokenizer knows is never the last that is left


# ---- the command


def command(model, *flags):
    argv = ["--model", str(model), "--device", "cpu", *flags]
    run_command(script.Config, script.main, argv)


@pytest.fixture(scope="module")
def saved(tok, tmp_path_factory):
    directory = tmp_path_factory.mktemp("saved") / "model"
    model = tiny_model(spread=0.3)
    model.set_vocabulary(len(tok))
    with torch.no_grad():
        model.lm_head.bias[tok.eos_id] = -100.0  # so that only the context ends an answer
    save(directory, model, tok)
    return directory


def test_the_command_says_that_the_context_is_full(saved, capsys):
    command(saved, "--prompt", "你", "--raw", "--max-new-tokens", "1000000000000")
    printed = capsys.readouterr()
    assert printed.err == "(the answer stops: the context of 64 tokens is full)\n"
    assert printed.out.count("\n") >= 1
    command(saved, "--prompt", "你", "--raw", "--max-new-tokens", "3")
    assert capsys.readouterr().err == ""


def test_no_question_ends_the_chat_but_the_last(saved, capsys, monkeypatch):
    """A byte that is no UTF-8 ended the chat with a UnicodeDecodeError."""
    lines = [b"\xff\xfe", "很长".encode() * 100_000, b"", b"\0", "你好".encode()]
    typed = io.TextIOWrapper(io.BytesIO(b"\n".join(lines)), encoding="utf-8", errors="strict")
    monkeypatch.setattr("sys.stdin", typed)
    command(saved, "--chat", "--max-new-tokens", "2")
    printed = capsys.readouterr().out
    assert printed.count("提问> ") == len(lines) + 1
    assert "tokens, the model was made for 64: shorten it" in printed


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16", "float16"])
def test_the_command_takes_a_dtype(saved, capsys, dtype):
    command(saved, "--prompt", "你", "--raw", "--dtype", dtype, "--max-new-tokens", "3")
    assert capsys.readouterr().err == ""
    cfg = script.Config(model=str(saved), device="cpu", dtype=dtype)
    expected = torch.float32 if dtype == "auto" else getattr(torch, dtype)
    assert script.loaded(str(saved), cfg)[0].lm_head.weight.dtype == expected


def test_a_chat_without_anybody_ends(saved, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    command(saved, "--chat")
    assert capsys.readouterr().out == "提问> \n"


def test_a_model_is_not_compared_with_itself_by_another_name(saved, capsys):
    with pytest.raises(SystemExit):
        command(saved, "--compare", f"{saved}/../model", "--prompt", "你")
    assert "is the model itself" in capsys.readouterr().err


# ---- prompt lookup


@given(
    prompt=st.lists(st.integers(7, 12), min_size=1, max_size=30),
    lookup=st.integers(1, 5),
    length=st.integers(1, 20),
)
def test_lookup_changes_no_answer(prompt, lookup, length):
    """Few different ids, so that guesses are many, right and wrong."""
    model = looping()
    expected = generate(model, prompt, length)
    assert generate(model, prompt, length, lookup=lookup) == expected


@functools.cache
def looping():
    return tiny_model(spread=0.3, vocab_size=64, max_position_embeddings=128)


def test_lookup_takes_fewer_steps_where_the_answer_repeats(monkeypatch):
    model = force(tiny_model(max_position_embeddings=128), [7, 8, 9, 10, 11, 7])
    steps = []
    hidden = Decoder.hidden
    monkeypatch.setattr(
        Decoder, "hidden", lambda self, ids, cache: steps.append(ids) or hidden(self, ids, cache)
    )
    assert generate(model, [7, 8, 9, 10, 11, 7], 20, lookup=4) == [8, 9, 10, 11, 7] * 4
    taken = len([ids for ids in steps if ids.shape[0] == 1])
    assert taken <= 8


def test_lookup_is_for_one_greedy_answer(tok):
    model = looping()
    for settings in ({"temperature": 1.0}, {"no_repeat_ngram_size": 2}):
        with pytest.raises(UserError, match="lookup is for one answer, greedy"):
            generate(model, [7, 8], 4, lookup=3, **settings)
    with pytest.raises(UserError, match="lookup is for one answer"):
        generate(model, [[7], [8]], 4, lookup=3)
    with pytest.raises(UserError, match="lookup is -1"):
        generate(model, [7], 4, lookup=-1)


# ---- filters


def test_what_followed_is_found_as_by_reading_everything():
    dice = random.Random(0)
    ids = Ids([dice.randrange(3) for _ in range(5)])
    for _ in range(60):
        for size in (1, 2, 3):
            prefix = ids[len(ids) - size + 1 :]
            starts = range(len(ids) - size + 1)
            expected = [ids[i + size - 1] for i in starts if ids[i : i + size - 1] == prefix]
            assert ids.followers(size) == expected
            run = ids[-size:]
            ends = [i + size for i in range(len(ids) - size) if ids[i : i + size] == run]
            assert ids.behind_latest(size) == (ends[-1] if ends else None)
        ids.append(dice.randrange(3))


@pytest.mark.parametrize("settings", [{"min_p": 0.2}, {"min_p": 0.05, "top_p": 0.9}])
def test_min_p_is_that_of_transformers(settings):
    from transformers import MinPLogitsWarper, TopPLogitsWarper

    logits = torch.randn(4, 448, generator=torch.Generator().manual_seed(0)) * 4
    expected = logits
    if "top_p" in settings:
        expected = TopPLogitsWarper(settings["top_p"])(None, expected)
    expected = MinPLogitsWarper(settings["min_p"])(None, expected)
    found = logits
    for name in FILTERS:
        if name in settings:
            found = FILTERS[name].apply(found, [[]] * 4, settings[name])
    assert torch.equal(found, expected)


def test_a_bias_makes_an_id_certain_or_impossible():
    model = tiny_model(spread=0.3)
    assert generate(model, [7, 8], 3, eos_token_id=None, logit_bias={9: 1e4}) == [9, 9, 9]
    first = generate(model, [7, 8], 1)[0]
    assert generate(model, [7, 8], 1, logit_bias={first: -1e4})[0] != first
    for bias in ({"9": 1.0}, {9: "x"}, {-1: 1.0}, {9: float("nan")}, {10_000: 1.0}):
        with pytest.raises(UserError, match="logit_bias"):
            generate(model, [7, 8], 1, logit_bias=bias)
