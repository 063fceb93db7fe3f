"""The server: OpenAI's own client speaks to it, what is wrong is refused in OpenAI's form, and
nothing is lost or mixed up.
"""

import asyncio
import codecs
import json
import os
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx2
import openai
import pytest
import torch
import uvicorn
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nanophi.cli import UserError
from nanophi.infer.engine import Engine
from nanophi.infer.generate import generate
from nanophi.infer.openai_api import Defaults
from nanophi.infer.prefer import Preferences
from nanophi.infer.server import Settings, listen, make_app
from nanophi.model.checkpoint import load
from nanophi.tokenizer.chat import chat_prompt
from tests.conftest import ANSWER, QUESTION

ROOT = Path(__file__).resolve().parents[2]
ASKED = [{"role": "user", "content": QUESTION}]


class Serving:
    """A server in a thread of this process."""

    def __init__(self, engines, preferences=None, **settings):
        self.engines = engines
        self.preferences = preferences
        for engine in engines.values():
            engine.thread.start()
        self.socket = listen("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        app = make_app(engines, Settings(**settings), preferences)
        self.server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        self.thread = threading.Thread(target=self.server.run, args=([self.socket],))
        self.thread.start()
        deadline = time.monotonic() + 30
        while not self.server.started:
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def stop(self):
        self.server.should_exit = True
        self.thread.join(60)
        for engine in self.engines.values():
            engine.close(0.0)
        self.socket.close()

    def client(self, key="none") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60)

    def send(self, path, data):
        """A body as it is, which may be no JSON."""
        kind = {"Content-Type": "application/json"}
        return httpx2.post(f"{self.url}{path}", content=data, headers=kind, timeout=60)

    def post(self, path, body=None, **how):
        return httpx2.post(f"{self.url}{path}", json=body, timeout=60, **how)


@pytest.fixture(scope="module")
def model_and_tok(house):
    return load(house / "sft")


@pytest.fixture(scope="module")
def serving(model_and_tok, tmp_path_factory):
    preferences = Preferences(tmp_path_factory.mktemp("server") / "mine.jsonl")
    serving = Serving({"sft": Engine(*model_and_tok, rows=3)}, preferences)
    yield serving
    serving.stop()


@pytest.fixture(scope="module")
def client(serving):
    with serving.client() as client:
        yield client


# ---- answers


def spelled(tok, ids) -> str:
    """The text of an answer; a character that its end cuts is left out."""
    data = b"".join(tok.id_to_bytes.get(i, b"") for i in ids if i != tok.eos_id)
    return codecs.getincrementaldecoder("utf-8")("replace").decode(data)


def test_chat_is_answered_as_generate_answers(client, model_and_tok):
    model, tok = model_and_tok
    ids = chat_prompt(QUESTION, tok)
    done = client.chat.completions.create(model="sft", messages=ASKED)
    assert done.choices[0].message.content == ANSWER
    assert done.choices[0].finish_reason == "stop"
    answer = generate(model, ids)
    assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (len(ids), len(answer))
    short = client.chat.completions.create(model="sft", messages=ASKED, max_completion_tokens=2)
    assert short.choices[0].finish_reason == "length"
    assert short.usage.completion_tokens == 2


def test_a_stream_has_the_same_text_and_its_usage(client):
    chunks = list(
        client.chat.completions.create(
            model="sft", messages=ASKED, stream=True, stream_options={"include_usage": True}
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == ANSWER
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.total_tokens > chunks[-1].usage.prompt_tokens
    assert len({chunk.id for chunk in chunks}) == 1


def test_several_choices_have_their_own_seeds_and_are_repeated(client, model_and_tok):
    model, tok = model_and_tok
    how = {"temperature": 1.5, "top_p": 0.99, "seed": 5, "max_tokens": 12}
    first, again = (
        client.chat.completions.create(model="sft", messages=ASKED, n=3, **how) for _ in range(2)
    )
    texts = [choice.message.content for choice in first.choices]
    assert texts == [choice.message.content for choice in again.choices]
    assert len(set(texts)) > 1
    for number, text in enumerate(texts):
        generator = torch.Generator().manual_seed(5 + number)
        ids = generate(
            model, chat_prompt(QUESTION, tok), 12, generator=generator, temperature=1.5, top_p=0.99
        )
        assert text == spelled(tok, ids)
    streamed = ["", "", ""]
    for chunk in client.chat.completions.create(
        model="sft", messages=ASKED, n=3, stream=True, **how
    ):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert streamed == texts


def test_stop_strings_end_an_answer(client):
    stop = ANSWER[3:5]
    done = client.chat.completions.create(model="sft", messages=ASKED, stop=stop)
    assert done.choices[0].message.content == ANSWER[: ANSWER.index(stop)]
    assert done.choices[0].finish_reason == "stop"
    text = ""
    for chunk in client.chat.completions.create(
        model="sft", messages=ASKED, stop=["never", stop], stream=True
    ):
        text += chunk.choices[0].delta.content or ""
    assert text == ANSWER[: ANSWER.index(stop)]


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_are_those_of_the_model(client, model_and_tok, stream):
    model, tok = model_and_tok
    done = client.chat.completions.create(
        model="sft", messages=ASKED, logprobs=True, top_logprobs=3, max_tokens=5, stream=stream
    )
    chunks = list(done) if stream else [done]
    content = [entry for chunk in chunks for entry in chunk.choices[0].logprobs.content]
    ids = chat_prompt(QUESTION, tok)
    answer = generate(model, ids, 5)
    with torch.no_grad():
        logprobs = model(torch.tensor([[*ids, *answer]]))[0].log_softmax(-1)
    assert len(content) == len(answer)
    for place, (entry, token) in enumerate(zip(content, answer, strict=True)):
        expected = logprobs[len(ids) - 1 + place]
        assert bytes(entry.bytes) == tok.id_to_bytes[token]
        assert entry.logprob == pytest.approx(expected[token].item(), abs=1e-3)
        best = [alternative.logprob for alternative in entry.top_logprobs]
        assert best == pytest.approx(expected.topk(3).values.tolist(), abs=1e-3)


def test_completions_continue_a_text_as_it_is(client, model_and_tok):
    _, tok = model_and_tok
    prompt = f"##提问:\n{QUESTION}\n##回答:\n"
    done = client.completions.create(model="sft", prompt=prompt, logprobs=2)
    assert done.choices[0].text == ANSWER
    logprobs = done.choices[0].logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.top_logprobs)
    by_ids = client.completions.create(model="sft", prompt=tok.encode(prompt))
    assert by_ids.choices[0].text == ANSWER
    streamed = client.completions.create(model="sft", prompt=prompt, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == ANSWER


def test_biased_tokens_and_contents_in_parts(client, model_and_tok):
    _, tok = model_and_tok
    first = tok.encode(ANSWER)[0]
    done = client.chat.completions.create(
        model="sft", messages=ASKED, logit_bias={str(first): -100}, max_tokens=3
    )
    assert not done.choices[0].message.content.startswith(ANSWER[:1])
    parts = [{"type": "text", "text": QUESTION[:3]}, {"type": "text", "text": QUESTION[3:]}]
    done = client.chat.completions.create(
        model="sft", messages=[{"role": "user", "content": parts}]
    )
    assert done.choices[0].message.content == ANSWER


def test_many_clients_at_once_get_their_own_answers(serving, model_and_tok):
    model, tok = model_and_tok
    questions = [f"{QUESTION}{'？' * i}" for i in range(12)]
    said = queue.Queue()

    async def ask_all():
        async with openai.AsyncOpenAI(
            base_url=f"{serving.url}/v1", api_key="none", max_retries=0, timeout=60
        ) as client:

            async def ask(number):
                text = ""
                stream = await client.chat.completions.create(
                    model="sft", stream=True, max_tokens=9,
                    messages=[{"role": "user", "content": questions[number]}],
                )  # fmt: skip
                async for chunk in stream:
                    text += chunk.choices[0].delta.content or ""
                said.put((number, text))

            await asyncio.gather(*map(ask, range(len(questions))))

    asyncio.run(ask_all())
    answers = dict(said.get() for _ in questions)
    for number, question in enumerate(questions):
        ids = generate(model, chat_prompt(question, tok), 9)
        assert answers[number] == spelled(tok, ids)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_gives_its_row_free(serving, stream):
    engine = serving.engines["sft"]
    body = {"prompt": "春", "max_tokens": 10_000, "stream": stream, "logit_bias": {"1": -100}}
    data = json.dumps(body).encode()
    with socket.create_connection(serving.socket.getsockname()) as raw:
        raw.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            + f"Content-Length: {len(data)}\r\n\r\n".encode()
            + data
        )
        deadline = time.monotonic() + 30
        while not engine.active:
            assert time.monotonic() < deadline
            time.sleep(0.001)
    while engine.active:
        assert time.monotonic() < deadline
        time.sleep(0.01)


# ---- what is wrong

DEEP = "[" * 100_000
BAD = {
    "no JSON": (b"{", "no JSON"),
    "a list": (b"[]", "no JSON object"),
    "nested": (DEEP.encode(), "nested too deeply"),
    "no UTF-8": (b'{"messages": "\xff"}', "no JSON in UTF-8"),
    "nothing": (b"{}", "messages are missing"),
    "no list": (b'{"messages": 5}', "messages is 5, expected a list"),
    "no message": (b'{"messages": [5]}', "message 1 has no role"),
    "a role": (b'{"messages": [{"role": "tool", "content": "x"}]}', "is from 'tool'"),
    "no question": (b'{"messages": []}', "no question"),
    "an image": (
        b'{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}',
        "reads text alone",
    ),
    "half a pair": (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "surrogate"),
}


@pytest.mark.parametrize(("data", "message"), BAD.values(), ids=BAD.keys())
def test_bodies_that_are_no_question_are_refused(serving, data, message):
    done = serving.send("/v1/chat/completions", data)
    assert done.status_code == 400
    error = done.json()["error"]
    assert message in error["message"]
    assert error["type"] == "invalid_request_error"


WRONG = [
    ({"temperature": -1}, "temperature"), ({"temperature": "warm"}, "temperature"),
    ({"temperature": float("nan")}, "temperature"), ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 1.5}, "max_tokens"), ({"n": 100}, "n"), ({"top_p": 0}, "top_p"),
    ({"stop": "x" * 10_000}, "stop"), ({"stop": ["a"] * 5}, "stop"), ({"stop": [""]}, "stop"),
    ({"stop": 5}, "stop"), ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"logit_bias": {"5": 1e9}}, "logit_bias"), ({"top_logprobs": 3}, "top_logprobs"),
    ({"presence_penalty": 1}, "presence_penalty"), ({"tools": []}, "tools"),
    ({"seed": 2**80}, "seed"), ({"stream": 1}, "stream"), ({"stream_options": 1}, "stream_options"),
    ({"stream_options": {"include_usage": 5}}, "stream_options.include_usage"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "param"), WRONG, ids=[str(c)[:40] for c, _ in WRONG])
def test_wrong_values_are_refused_by_name(serving, changes, param):
    data = json.dumps({"messages": ASKED} | changes)
    done = serving.send("/v1/chat/completions", data)
    assert done.status_code == 400
    assert done.json()["error"]["param"] == param


def test_errors_are_those_that_the_client_knows(client, serving):
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt'; there are sft"):
        client.chat.completions.create(model="gpt", messages=ASKED)
    with pytest.raises(openai.BadRequestError, match="the model was made for 128") as caught:
        client.chat.completions.create(
            model="sft", messages=[{"role": "user", "content": "好" * 900}]
        )
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="logit_bias names id 99999"):
        client.chat.completions.create(model="sft", messages=ASKED, logit_bias={"99999": 1})
    assert serving.post("/v1/nothing").status_code == 404
    assert httpx2.get(f"{serving.url}/v1/completions").status_code == 405
    large = serving.post("/v1/completions", {"prompt": "x" * (2**20 + 1)})
    assert large.status_code == 413
    plain = httpx2.post(f"{serving.url}/v1/completions", content="{}", timeout=60)
    assert plain.status_code == 415


def test_a_full_queue_asks_to_come_back(model_and_tok):
    engine = Engine(*model_and_tok, rows=1, queue=1)
    serving = Serving({"sft": engine})
    try:
        stuck = threading.Event()
        engine.call(stuck.wait)  # the model is busy
        waiting = threading.Thread(
            target=serving.post, args=("/v1/completions", {"prompt": "春", "max_tokens": 1})
        )
        waiting.start()
        deadline = time.monotonic() + 30
        while not engine.waiting:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        refused = serving.post("/v1/completions", {"prompt": "春"})
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        assert refused.json()["error"]["type"] == "rate_limit_error"
        stuck.set()
        waiting.join(60)
    finally:
        serving.stop()


def test_a_key_lets_in(model_and_tok):
    serving = Serving({"sft": Engine(*model_and_tok, rows=1)}, api_key="geheim")
    try:
        with serving.client("wrong") as client, pytest.raises(openai.AuthenticationError):
            client.models.list()
        with serving.client("geheim") as client:
            assert [model.id for model in client.models.list()] == ["sft"]
        assert httpx2.get(f"{serving.url}/health").status_code == 200
        assert httpx2.get(f"{serving.url}/metrics").status_code == 401
        assert '"locked": true' in httpx2.get(serving.url).text
    finally:
        serving.stop()


def test_an_answer_that_takes_too_long_is_an_error_the_client_sees(model_and_tok):
    serving = Serving({"sft": Engine(*model_and_tok, rows=1)}, seconds=0.0)
    try:
        with serving.client() as client:
            with pytest.raises(openai.InternalServerError, match="the time for the answer is over"):
                client.chat.completions.create(model="sft", messages=ASKED)
            with pytest.raises(openai.APIError, match="the time for the answer is over"):
                list(client.chat.completions.create(model="sft", messages=ASKED, stream=True))
    finally:
        serving.stop()


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)
NAMES = [
    "messages", "prompt", "model", "max_tokens", "n", "stop", "logprobs", "top_logprobs", "seed",
    "stream", "temperature", "top_p", "top_k", "logit_bias", "stream_options", "answer", "at",
    "chosen", "rejected",
]  # fmt: skip
PATHS = ["/v1/chat/completions", "/v1/completions", "/v1/microscope", "/v1/preferences"]


def fuzz(serving, client, path, body, usable):
    good = {"messages": ASKED} if "chat" in path or "microscope" in path else {"prompt": "春"}
    sent = json.dumps((good if usable else {}) | {"max_tokens": 2} | body)
    done = client.post(
        f"{serving.url}{path}", content=sent, headers={"Content-Type": "application/json"}
    )
    assert done.status_code in (200, 400, 404, 429), (sent, done.text)
    if done.status_code != 200:
        assert done.json()["error"]["message"]


bodies = st.dictionaries(st.sampled_from(NAMES), anything, max_size=4)


@settings(max_examples=60, suppress_health_check=list(HealthCheck))
@given(path=st.sampled_from(PATHS), body=bodies, usable=st.booleans())
def test_whatever_is_sent_is_answered_or_refused(serving, path, body, usable):
    with httpx2.Client(timeout=60) as client:
        fuzz(serving, client, path, body, usable)


@pytest.mark.slow
@settings(max_examples=10_000, suppress_health_check=list(HealthCheck), deadline=None)
@given(path=st.sampled_from(PATHS), body=bodies, usable=st.booleans())
def test_whatever_is_sent_ten_thousand_times(serving, path, body, usable):
    with httpx2.Client(timeout=60) as client:
        fuzz(serving, client, path, body, usable)


# ---- the page's own


def test_preferences_are_rows_for_dpo(serving):
    row = {"prompt": "你好", "chosen": "你好！", "rejected": "嗯。"}
    before = len(serving.preferences)
    done = serving.post("/v1/preferences", row)
    assert done.json()["rows"] == before + 1
    last = serving.preferences.path.read_text(encoding="utf-8").splitlines()[-1]
    assert json.loads(last) == row
    assert serving.post("/v1/preferences", row | {"chosen": " "}).status_code == 400
    assert serving.post("/v1/preferences", {"prompt": "x"}).status_code == 400
    assert serving.post("/v1/preferences", row | {"chosen": 5}).status_code == 400


def test_without_prefer_there_is_no_such_place(model_and_tok):
    serving = Serving({"sft": Engine(*model_and_tok, rows=1)})
    try:
        assert serving.post("/v1/preferences", {}).status_code == 404
    finally:
        serving.stop()


def test_the_microscope_shows_what_each_filter_changes(serving, model_and_tok):
    model, tok = model_and_tok
    ids = chat_prompt(QUESTION, tok)
    answer = generate(model, ids)
    at = len(ids) + 1
    how = {"temperature": 2.0, "top_k": 3, "no_repeat_ngram_size": 1}
    body = {"messages": ASKED, "answer": answer, "at": at} | how
    seen = serving.post("/v1/microscope", body).json()
    assert [token["id"] for token in seen["tokens"]] == ids + answer
    assert [token["answer"] for token in seen["tokens"]] == [False] * len(ids) + [True] * len(
        answer
    )
    assert seen["filters"] == ["model", "no_repeat_ngram_size", "temperature", "top_k"]
    with torch.no_grad():
        logits = model(torch.tensor([[*ids, *answer]]))[0]
    p = logits[at - 1].softmax(-1)
    assert seen["tokens"][at]["p"] == pytest.approx(p[answer[1]].item(), abs=1e-3)
    for one in seen["alternatives"]:
        assert one["p"][0] == pytest.approx(p[one["id"]].item(), abs=1e-3)
    assert sum(one["p"][-1] > 0 for one in seen["alternatives"]) == 3
    assert serving.post("/v1/microscope", body | {"at": 10_000}).status_code == 400
    assert serving.post("/v1/microscope", body | {"answer": [10**9]}).status_code == 400


def test_the_page_names_its_models_and_asks_nobody_else(serving):
    page = httpx2.get(serving.url)
    assert '"models": ["sft"]' in page.text
    assert "{/*ABOUT*/}" not in page.text
    assert "connect-src 'self'" in page.headers["content-security-policy"]
    assert not re.search(r"(src|href)=[\"']?(https?:)?//", page.text)
    metrics = httpx2.get(f"{serving.url}/metrics").text
    assert "nanophi_tokens_total" in metrics


# ---- the command


def test_flags_that_contradict_serve_are_refused():
    import generate as script

    for flags in ({"prompt": "你好"}, {"chat": True}, {"raw": True}):
        with pytest.raises(UserError, match="--serve goes without"):
            script.main(script.Config(model="m", serve=True, **flags))


def test_a_port_in_use_is_one_line():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"--port {port}: .*another --port may be free"):
            listen("127.0.0.1", port)


def test_sigterm_ends_streams_where_the_client_sees_it(house, tmp_path):
    """Either whole, or with an error as its last event."""
    command = [
        sys.executable, str(ROOT / "generate.py"), "--model", str(house / "sft"), "--serve",
        "--port", "0", "--prefer", str(tmp_path / "mine.jsonl"), "--temperature", "0.5",
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ})
    try:
        line = process.stdout.readline()
        url = re.search(r"http://[\d.:]+", line).group()
        assert '"temperature": 0.5' in httpx2.get(url).text
        body = {"prompt": "春", "max_tokens": 100, "stream": True, "logit_bias": {"1": -100}}
        with httpx2.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as stream:
            lines = stream.iter_lines()
            first = next(lines)
            process.send_signal(signal.SIGTERM)
            rest = [first, *(line for line in lines if line)]
        assert rest[-1] == "data: [DONE]" or '"error"' in rest[-1]
        assert process.wait(60) == 143
    finally:
        process.kill()
        process.stdout.close()


def test_defaults_hold_where_a_client_says_nothing(model_and_tok):
    engine = Engine(*model_and_tok, rows=1)
    serving = Serving({"sft": engine}, defaults=Defaults(2, {"top_k": 1, "temperature": 1.0}))
    try:
        done = serving.post("/v1/chat/completions", {"messages": ASKED}).json()
        assert done["usage"]["completion_tokens"] == 2
        assert ANSWER.startswith(done["choices"][0]["message"]["content"])
    finally:
        serving.stop()


def test_a_missing_package_is_one_line():
    code = "import sys; sys.modules['uvicorn'] = None; import nanophi.infer.server"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert "UserError: --serve needs the package uvicorn: pip install" in done.stderr
