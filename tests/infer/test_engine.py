"""The engine: each answer is what `generate` gives alone, however requests come, go and fail."""

import codecs
import queue
import subprocess
import sys
import threading
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanophi.cli import UserError
from nanophi.infer import engine as engine_file
from nanophi.infer import static
from nanophi.infer.decoder import Decoder
from nanophi.infer.engine import Engine, Full, Piece, Request
from nanophi.infer.generate import generate, stream
from nanophi.infer.speaker import Speaker
from nanophi.model.checkpoint import save
from tests.conftest import tiny_model
from tests.infer.test_static import record


@pytest.fixture(scope="module")
def model():
    return tiny_model(spread=0.3, max_position_embeddings=96, vocab_size=448)


class Asked:
    """A request whose pieces are collected."""

    def __init__(self, engine: Engine, prompt, **how):
        self.pieces: queue.Queue[Piece] = queue.Queue()
        self.request = Request(list(prompt), self.pieces.put, **how)
        engine.submit(self.request)

    def wait(self) -> "Asked":
        self.all = []
        while not self.all or self.all[-1].finish is None:
            self.all.append(self.pieces.get(timeout=60))
        self.finish = self.all[-1].finish
        self.text = "".join(piece.text for piece in self.all)
        self.ids = [piece.token.id for piece in self.all if piece.token is not None]
        return self


def prompts_of(count, seed=0):
    dice = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 30, (count,), generator=dice).tolist()
    return [torch.randint(7, 400, (n,), generator=dice).tolist() for n in lengths]


@pytest.fixture(scope="module", params=[False, True], ids=["CPU", "GPU"])
def either_way(request):
    """An engine as on a CPU, and as on a GPU, whose recording a stand-in plays back."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_file, "can_be_recorded", lambda model: request.param)
        patch.setattr(static, "recorded", record)
        yield


def test_many_requests_are_answered_as_alone(either_way, model, tok):
    """More than there are rows, of all lengths, some with settings of their own."""
    prompts = prompts_of(20)
    hows = [
        {},
        {"no_repeat_ngram_size": 2},
        {"temperature": 1.0, "top_k": 20},
        {"repetition_penalty": 1.3},
    ]
    with Engine(model, tok, rows=3) as engine:
        asked = [
            Asked(engine, prompt, max_new_tokens=5 + i % 9, seed=i, how=hows[i % 4])
            for i, prompt in enumerate(prompts)
        ]
        for i, (prompt, one) in enumerate(zip(prompts, asked, strict=True)):
            one.wait()
            expected = generate(
                model, prompt, 5 + i % 9, generator=torch.Generator().manual_seed(i), **hows[i % 4]
            )
            assert one.ids == expected
            data = b"".join(tok.id_to_bytes.get(t, b"") for t in expected[: len(one.ids)] if t != 1)
            assert one.text == codecs.getincrementaldecoder("utf-8")("replace").decode(data)
            assert one.finish == ("stop" if expected[-1] == model.cfg.eos_token_id else "length")


def test_the_next_turn_reads_only_what_is_new(model, tok, monkeypatch):
    read = []
    hidden = Decoder.hidden

    def counted(self, ids, cache):
        read.append(tuple(ids.shape))
        return hidden(self, ids, cache)

    monkeypatch.setattr(Decoder, "hidden", counted)
    first = prompts_of(1, seed=5)[0] * 3
    with Engine(model, tok, rows=3) as engine:
        del read[:]
        one = Asked(engine, first, max_new_tokens=6).wait()
        assert read[0] == (1, len(first))
        second = first + one.ids + [9, 10, 11]
        del read[:]
        two = Asked(engine, second, max_new_tokens=6).wait()
        # The last token of the first answer was never read.
        assert read[0] == (1, len(second) - len(first) - len(one.ids) + 1)
        assert two.request.reused == len(second) - read[0][1]
        # Two that begin alike, at once: the second takes what the first, which goes on, has read.
        del read[:]
        both = [Asked(engine, [*second, 12, i], max_new_tokens=20) for i in (13, 14)]
        for one in both:
            one.wait()
            assert one.request.reused >= len(second)
    for prompt, one in ((second, two), *((one.request.prompt, one) for one in both)):
        assert one.ids == generate(model, prompt, len(one.ids), eos_token_id=None)


@settings(max_examples=25)
@given(
    work=st.lists(
        st.tuples(st.integers(0, 3), st.integers(1, 12), st.integers(1, 8), st.booleans()),
        min_size=1,
        max_size=12,
    )
)
def test_prefixes_rows_and_cancelled_requests_never_mix(either_way, model, tok, work):
    """Requests that share beginnings, in any order, some of which are cancelled on the way."""
    stems = prompts_of(4, seed=9)
    with Engine(model, tok, rows=3) as engine:
        asked = []
        for stem, cut, length, cancel in work:
            prompt = [*stems[stem][:cut], 20 + cut]
            asked.append(Asked(engine, prompt, max_new_tokens=length))
            if cancel:
                asked[-1].request.cancel()
        for one in asked:
            one.wait()
    for one, (_, _, length, cancel) in zip(asked, work, strict=True):
        expected = generate(model, one.request.prompt, length)
        assert one.ids == expected[: len(one.ids)]
        assert cancel or one.ids == expected
        assert one.finish in ("stop", "length", "cancelled")


def test_a_request_in_the_queue_is_cancelled_and_a_late_one_ended(either_way, model, tok):
    with Engine(model, tok, rows=1) as engine:
        first = Asked(engine, [7, 8], max_new_tokens=80)
        second = Asked(engine, [7, 9], max_new_tokens=80)
        third = Asked(engine, [7, 10], max_new_tokens=80, seconds=0.0)
        second.request.cancel()
        assert second.wait().finish == "cancelled"
        assert third.wait().finish == "timeout"
        assert first.wait().finish in ("length", "stop")
        assert second.ids == third.ids == []


def test_more_than_may_wait_are_refused(model, tok):
    engine = Engine(model, tok, rows=1, queue=2)  # its thread does not run yet
    for _ in range(2):
        Asked(engine, [7, 8])
    with pytest.raises(Full, match="2 requests wait already"):
        Asked(engine, [7, 8])
    with engine:
        pass
    with pytest.raises(Full, match="the engine is closing"):
        Asked(engine, [7, 8])


def test_closing_ends_what_goes_on(either_way, model, tok):
    engine = Engine(model, tok, rows=1)
    asked = [Asked(engine, [7, i], max_new_tokens=80) for i in (8, 9, 10)]
    engine.thread.start()
    engine.close(seconds=0.0)
    assert {one.wait().finish for one in asked} <= {"timeout", "length", "stop"}
    assert not engine.thread.is_alive()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"prompt": []}, "a prompt is empty"),
        ({"prompt": [5000]}, "the prompt has id 5000"),
        ({"prompt": [7] * 96}, "the prompt has 96 tokens, the model was made for 96"),
        ({"prompt": [7], "max_new_tokens": 0}, "max_new_tokens"),
        ({"prompt": [7], "how": {"logit_bias": {9999: 1.0}}}, "logit_bias names id 9999"),
        ({"prompt": [7], "how": {"temperature": -1}}, "temperature -1 is out of range"),
    ],
)
def test_what_cannot_be_answered_is_refused_at_once(model, tok, how, message):
    with Engine(model, tok, rows=1) as engine, pytest.raises(UserError, match=message):
        Asked(engine, **how)


def test_a_failing_request_does_not_end_the_others(model, tok, monkeypatch):
    """Neither does one whose listener has gone."""
    with Engine(model, tok, rows=2) as engine:

        def gone(piece):
            raise RuntimeError("Event loop is closed")

        engine.submit(Request([7, 8], gone, max_new_tokens=5))
        hidden = engine.network.hidden
        monkeypatch.setattr(engine.network, "hidden", None)
        failed = Asked(engine, [7, 9], max_new_tokens=5).wait()
        assert failed.finish == "error"
        assert "TypeError" in failed.all[-1].error
        monkeypatch.setattr(engine.network, "hidden", hidden)
        assert Asked(engine, [7, 9], max_new_tokens=5).wait().ids == generate(model, [7, 9], 5)


def test_logprobs_are_those_of_the_model(either_way, model, tok):
    with Engine(model, tok, rows=2) as engine:
        other = Asked(engine, [7, 9, 11], max_new_tokens=9)
        one = Asked(engine, [7, 8], max_new_tokens=4, logprobs=3).wait()
        assert all(piece.token.logprob is None for piece in other.wait().all)
    with torch.no_grad():
        logprobs = model(torch.tensor([[7, 8, *one.ids]]))[0].log_softmax(-1)
    for place, piece in enumerate(one.all):
        expected = logprobs[1 + place]
        assert piece.token.logprob == pytest.approx(float(expected[piece.token.id]), abs=1e-4)
        ids, values = zip(*piece.token.best, strict=True)
        assert values == pytest.approx(expected.topk(3).values.tolist(), abs=1e-4)
        assert ids[0] == piece.token.id


def test_one_request_takes_the_steps_of_generate(model, tok):
    """One alone is not slower: a step a token, and none beside them."""
    with Engine(model, tok, rows=8) as engine:
        asked = Asked(engine, [7, 8, 9], max_new_tokens=20).wait()
        assert engine.steps == len(asked.ids) == engine.tokens
        before = threading.active_count()
        time.sleep(0.05)
        assert engine.steps == len(asked.ids)  # it sleeps
        assert threading.active_count() == before


# ---- text


@given(
    text=st.text(alphabet="ab#好😀", max_size=20),
    stop=st.lists(st.text(alphabet="ab#好", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(1, 4), min_size=40, max_size=40),
)
def test_stop_strings_end_the_text_wherever_tokens_end(text, stop, cuts):
    data = text.encode()
    pieces = []
    for cut in cuts:
        pieces.append(data[:cut])
        data = data[cut:]
    pieces.append(data)
    speaker = Speaker(dict(enumerate(pieces)), tuple(stop))
    said = ""
    for token in range(len(pieces)):
        said += speaker.say(token)
        if speaker.stopped:
            break
    said += speaker.rest()
    found = [text.find(each) for each in stop if each in text]
    if found:
        # A stop string that is complete ends the text, also where an earlier one is still open.
        assert speaker.stopped
        assert text.startswith(said)
        assert min(found) <= len(said) <= max(found)
        assert not any(each in said for each in stop)
    else:
        assert said == text


def test_a_stream_ends_at_a_stop_string(model, tok):
    whole = "".join(stream(model, tok, [7, 8, 9], 30))
    cut = next(i for i in range(3, len(whole) - 2) if whole.find(whole[i : i + 2]) == i)
    stop = whole[cut : cut + 2]
    assert "".join(stream(model, tok, [7, 8, 9], 30, stop=[stop])) == whole[:cut]
    assert "".join(stream(model, tok, [7, 8, 9], 30, stop=["never to be said"])) == whole
    with pytest.raises(UserError, match="stop"):
        list(stream(model, tok, [7], 4, stop="text"))


@pytest.mark.parametrize("how", [{}, {"temperature": 1.0, "top_k": 30}])
def test_its_stream_is_that_of_generate_and_reads_no_turn_twice(model, tok, how):
    """The terminal's chat: each prompt begins with the last one and its answer."""
    first, *_, second = prompts_of(5)
    with Engine(model, tok, rows=1) as engine:
        seen = spy_on_tokens_read(engine)
        for prompt in (first, [*first, *second]):
            dice = torch.Generator().manual_seed(3)
            expected = "".join(stream(model, tok, prompt, 12, generator=dice, **how))
            assert "".join(engine.stream(prompt, 12, seed=3, how=how)) == expected
    assert max(seen) == max(len(first), len(second))


def spy_on_tokens_read(engine):
    """How many tokens each pass of the model reads."""
    seen = []

    class Spy:
        device = engine.model.device
        lm_head = staticmethod(engine.network.lm_head)

        @staticmethod
        def hidden(ids, cache):
            seen.append(ids.shape[1])
            return network.hidden(ids, cache=cache)

    network, engine.network = engine.network, Spy
    return seen


def test_its_stream_says_why_it_ends(model, tok, monkeypatch):
    prompt = [7, 50, 200]
    with Engine(model, tok, rows=1) as engine:
        engine.eos = set()
        for most, is_full in ((5, False), (1000, True)):
            answer = engine.stream(prompt, most)
            with pytest.raises(StopIteration) as end:
                drain(answer)
            assert end.value.value is is_full
        given_up = engine.stream(prompt, 80)
        next(given_up)
        given_up.close()  # Ctrl-C in the terminal
        assert "".join(engine.stream(prompt, 5))
        with pytest.raises(UserError, match="the model was made for 96"):
            next(engine.stream([7] * 96))
        monkeypatch.setattr("nanophi.infer.engine.choose", lambda *_: 1 / 0)
        with pytest.raises(UserError, match="ZeroDivisionError"):
            next(engine.stream(prompt, 5))


def drain(answer):
    while True:
        next(answer)


LEFT_OPEN = """
import sys, threading
from nanophi import Engine, Request, load
model, tok = load(sys.argv[1])
said = threading.Semaphore(0)
engine = Engine(model, tok, rows=2).start()
for seed in (1, 2):
    how = {"temperature": 1.0}
    request = Request([5, 6], lambda piece: said.release(), 60, seed=seed, how=how)
    engine.submit(request)
said.acquire()
"""


def test_python_ends_in_order_while_an_engine_works(tok, tmp_path):
    """`terminate called without an active exception`, exit code -6: once in some hundred runs the
    chat at the terminal ended so.
    """
    model = tiny_model(max_position_embeddings=128)
    model.set_vocabulary(len(tok))
    save(tmp_path, model, tok)
    for _ in range(2):
        ran = subprocess.run(
            [sys.executable, "-c", LEFT_OPEN, str(tmp_path)],
            capture_output=True, text=True, timeout=600,
        )  # fmt: skip
        assert (ran.returncode, ran.stderr) == (0, "")
