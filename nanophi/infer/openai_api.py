"""The form of OpenAI's API: a body becomes questions for the engine, answers become objects.

    chat          POST /v1/chat/completions    {"messages": [...], ...}
    completion    POST /v1/completions         {"prompt": "...", ...}

Nothing here knows of a network; server.py has that. What a client may not say is a `Refusal` with
the name of the field, its code and an HTTP status.
"""

import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from nanophi.cli import UserError
from nanophi.expect import Expected, check, parse_json, shown
from nanophi.infer.engine import Token
from nanophi.infer.sampling import FILTERS
from nanophi.tokenizer.chat import chat_prompt
from nanophi.tokenizer.tokenizer import Tokenizer, utf8

LONGEST_STOP = 200  # characters of a stop string
MOST_STOPS = 4
MOST_CHOICES = 8
MOST_BEST = 20
LARGEST_BIAS = 100.0
DEFAULT_TOKENS = 256
LARGEST_SEED = 2**63 - 1


class Refusal(Exception):
    """What the client is told in place of an answer, in OpenAI's form."""

    def __init__(
        self, message: str, param: str | None = None, code: str | None = None, status: int = 400
    ):
        super().__init__(message)
        self.status = status
        kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


# ---- what a client may say

SAMPLING = {  # the filters, with OpenAI's ranges where these are narrower
    "temperature": Expected(float, at_least=0, at_most=2, optional=True),
    "top_p": Expected(float, above=0, at_most=1, optional=True),
    "top_k": Expected(int, at_least=0, optional=True),
    "min_p": Expected(float, at_least=0, at_most=1, optional=True),
    "repetition_penalty": Expected(float, above=0, optional=True),
    "no_repeat_ngram_size": Expected(int, at_least=0, optional=True),
}
COMMON = {
    **SAMPLING,
    "model": Expected(str, optional=True),
    "max_tokens": Expected(int, at_least=1, optional=True),
    "n": Expected(int, at_least=1, at_most=MOST_CHOICES, optional=True),
    "seed": Expected(int, at_least=-LARGEST_SEED, at_most=LARGEST_SEED, optional=True),
    "stream": Expected(bool, optional=True),
    "stream_options": Expected(dict, optional=True),
    "logit_bias": Expected(dict, optional=True),
    "user": Expected(str, optional=True),
    "return_token_ids": Expected(bool, optional=True),  # as vLLM takes it
    # These are not built. Their neutral values are taken, so that clients which send them work.
    "presence_penalty": Expected(float, at_least=0, at_most=0, optional=True),
    "frequency_penalty": Expected(float, at_least=0, at_most=0, optional=True),
}
OF_CHAT = {
    **COMMON,
    "messages": Expected(list),
    "max_completion_tokens": Expected(int, at_least=1, optional=True),
    "logprobs": Expected(bool, optional=True),
    "top_logprobs": Expected(int, at_least=0, at_most=MOST_BEST, optional=True),
}
OF_COMPLETION = {
    **COMMON,
    "logprobs": Expected(int, at_least=0, at_most=MOST_BEST, optional=True),
    "echo": Expected(bool, choices=(False,), optional=True),
}
ANY_FORM = {"stop", "prompt"}  # each is checked by itself


@dataclass
class Ask:
    """What a client asks for, checked."""

    prompt: list[int]
    model: str | None
    choices: int = 1
    max_new_tokens: int = DEFAULT_TOKENS
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    seed: int | None = None
    how: dict[str, Any] = field(default_factory=dict)
    stream: bool = False
    with_usage: bool = False  # a last chunk that counts the tokens
    with_ids: bool = False  # each choice holds its token ids


def read_body(data: bytes) -> dict:
    """The JSON object of a request."""
    try:
        body = parse_json(data.decode("utf-8"))
    except ValueError as error:
        raise Refusal(f"the body is no JSON in UTF-8: {error}") from None
    if not isinstance(body, dict):
        raise Refusal("the body is no JSON object")
    return body


@dataclass
class Defaults:
    """What holds where a client says nothing."""

    max_new_tokens: int = DEFAULT_TOKENS
    how: dict[str, Any] = field(default_factory=dict)  # the filters
    bos: bool = False  # whether [BOS] stands first


def read_ask(body: dict, tok: Tokenizer, in_chat: bool, defaults: Defaults) -> Ask:
    """The body of a request -> what it asks for, or a Refusal."""
    fields = OF_CHAT if in_chat else OF_COMPLETION
    known = fields.keys() | ANY_FORM
    for name, value in body.items():
        if name not in known:
            raise Refusal(f"{shown(name)} is not known here", name[:40], "unknown_parameter")
        if name in fields:
            refuse_unless(value, fields[name], name)
    read = read_messages if in_chat else read_prompt
    prompt = read(body, tok, defaults.bos)
    most = body.get("max_completion_tokens") or body.get("max_tokens")
    given = {name: body[name] for name in SAMPLING if body.get(name) is not None}
    how = defaults.how | given
    if body.get("logit_bias"):
        how["logit_bias"] = read_bias(body["logit_bias"])
    options = body.get("stream_options") or {}
    with_usage = options.get("include_usage", False)
    refuse_unless(with_usage, Expected(bool), "stream_options.include_usage")
    return Ask(
        prompt,
        body.get("model"),
        choices=body.get("n") or 1,
        max_new_tokens=most or defaults.max_new_tokens,
        stop=read_stop(body.get("stop")),
        logprobs=read_logprobs(body, in_chat),
        seed=body.get("seed"),
        how=how,
        stream=bool(body.get("stream")),
        with_usage=with_usage,
        with_ids=bool(body.get("return_token_ids")),
    )


def refuse_unless(value: Any, expected: Expected, name: str) -> None:
    try:
        check(value, expected, name)
    except UserError as error:
        raise Refusal(str(error), name, "invalid_value") from None


def read_messages(body: dict, tok: Tokenizer, bos: bool) -> list[int]:
    """The ids of a conversation, from which the model goes on with its answer."""
    if "messages" not in body:
        raise Refusal("messages are missing", "messages", "missing_required_parameter")
    messages = []
    for number, message in enumerate(body["messages"], start=1):
        if isinstance(message, dict):
            message = message | {"content": text_of(message.get("content"), number)}
        messages.append(message)
    try:
        return chat_prompt(messages, tok, bos)
    except UserError as error:
        raise Refusal(str(error), "messages", "invalid_value") from None


def text_of(content: Any, number: int) -> Any:
    """The content of a message as text; it may be a list of parts, of which all are text."""
    if isinstance(content, list):
        if not all(isinstance(part, dict) and part.get("type") == "text" for part in content):
            raise Refusal(
                f"message {number} has a part that is no text: this model reads text alone",
                "messages",
                "invalid_value",
            )
        texts = [part.get("text") for part in content]
        if not all(isinstance(text, str) for text in texts):
            raise Refusal(f"message {number} has a part without text", "messages", "invalid_value")
        content = "".join(texts)
    return content


def read_prompt(body: dict, tok: Tokenizer, bos: bool) -> list[int]:
    """The ids of a text, or ids as they are."""
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
        prompt = prompt[0]  # a list of one prompt
    if isinstance(prompt, str):
        try:
            ids = tok.encode(prompt)
        except UserError as error:
            raise Refusal(str(error), "prompt", "invalid_value") from None
    elif isinstance(prompt, list) and all(Expected(int).fits(token) for token in prompt):
        ids = prompt
    else:
        raise Refusal("the prompt is one text, or one list of token ids", "prompt", "invalid_value")
    return [tok.bos_id, *ids] if bos else ids


def read_stop(stop: Any) -> tuple[str, ...]:
    """The stop strings."""
    if stop is None:
        return ()
    stops = [stop] if isinstance(stop, str) else stop
    expected = f"a string, or up to {MOST_STOPS} of them, each of 1 to {LONGEST_STOP} characters"
    fits = isinstance(stops, list) and len(stops) <= MOST_STOPS
    if not fits or not all(isinstance(s, str) and 0 < len(s) <= LONGEST_STOP for s in stops):
        raise Refusal(f"stop is {shown(stop)}, expected {expected}", "stop", "invalid_value")
    try:
        return tuple(utf8(text).decode() for text in stops)
    except UserError as error:
        raise Refusal(str(error), "stop", "invalid_value") from None


def read_bias(bias: Mapping[str, Any]) -> dict[int, float]:
    """{"17": 5} -> {17: 5.0}"""
    read = {}
    for token, number in bias.items():
        if not (token.isascii() and token.isdigit() and len(token) < 10):
            raise Refusal(f"logit_bias names {shown(token)}, no token id", "logit_bias")
        limits = Expected(float, at_least=-LARGEST_BIAS, at_most=LARGEST_BIAS)
        refuse_unless(number, limits, "logit_bias")
        read[int(token)] = float(number)
    return read


def read_logprobs(body: dict, in_chat: bool) -> int | None:
    """Of how many of the likeliest tokens each token tells; None: it does not."""
    if not in_chat:
        return body.get("logprobs")
    if body.get("top_logprobs") is not None and not body.get("logprobs"):
        raise Refusal("top_logprobs goes with logprobs: true", "top_logprobs", "invalid_value")
    return (body.get("top_logprobs") or 0) if body.get("logprobs") else None


# ---- what the server says


@dataclass
class Reply:
    """One reply, with one choice or several; it makes the objects that are sent."""

    model: str
    in_chat: bool
    tok: Tokenizer
    ask: Ask
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def _object(self, kind: str, choices: list[dict]) -> dict:
        prefix = "chatcmpl" if self.in_chat else "cmpl"
        return {
            "id": f"{prefix}-{self.id}",
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }

    def whole(self, choices: list["Said"], usage: dict) -> dict:
        """The answer to a request that does not stream."""
        made = []
        for index, said in enumerate(choices):
            choice: dict[str, Any] = {"index": index, "finish_reason": said.finish}
            if self.in_chat:
                choice["message"] = {"role": "assistant", "content": said.text, "refusal": None}
            else:
                choice["text"] = said.text
            made.append(choice | self.details(said))
        kind = "chat.completion" if self.in_chat else "text_completion"
        return self._object(kind, made) | {"usage": usage}

    def chunk(self, index: int, said: "Said", first: bool) -> dict:
        """A part of a streamed answer."""
        choice: dict[str, Any] = {"index": index, "finish_reason": said.finish}
        if self.in_chat:
            delta: dict[str, Any] = {"role": "assistant"} if first else {}
            if said.text or first:
                delta["content"] = said.text
            choice["delta"] = delta
        else:
            choice["text"] = said.text
        kind = "chat.completion.chunk" if self.in_chat else "text_completion"
        return self._object(kind, [choice | self.details(said)])

    def details(self, said: "Said") -> dict:
        """What a choice tells of its tokens, where the client asks for it."""
        found: dict[str, Any] = {"logprobs": None}
        if self.ask.logprobs is not None:
            found["logprobs"] = self.logprobs(said.tokens)
        if self.ask.with_ids:
            found["token_ids"] = [token.id for token in said.tokens]
        return found

    def usage_chunk(self, usage: dict) -> dict:
        """The last part of a stream that asked for the counts."""
        kind = "chat.completion.chunk" if self.in_chat else "text_completion"
        return self._object(kind, []) | {"usage": usage}

    def logprobs(self, tokens: list[Token]) -> dict:
        """Log-probabilities in the form of the endpoint."""
        if self.in_chat:
            return {"content": [self._entry(token) for token in tokens]}
        return {
            "tokens": [self.spelled(token.id) for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [
                {self.spelled(other): logprob for other, logprob in token.best} for token in tokens
            ],
        }

    def _entry(self, token: Token) -> dict:
        best = [self._alternative(other, logprob) for other, logprob in token.best]
        return self._alternative(token.id, token.logprob) | {"top_logprobs": best}

    def _alternative(self, token: int, logprob: float | None) -> dict:
        spelled = self.tok.id_to_bytes.get(token, b"")
        text = spelled.decode("utf-8", "replace")
        # JSON has no infinity: the logarithm of 0 is far below all others.
        number = max(logprob, -9999.0) if logprob is not None else None
        return {"token": text, "logprob": number, "bytes": list(spelled)}

    def spelled(self, token: int) -> str:
        return self.tok.id_to_bytes.get(token, b"").decode("utf-8", "replace")


@dataclass
class Said:
    """An answer, or a part of one."""

    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    finish: str | None = None


def usage_of(prompt: int, answered: int, reused: int) -> dict:
    """How many tokens were read and said. reused: those that an earlier request had read"""
    return {
        "prompt_tokens": prompt,
        "completion_tokens": answered,
        "total_tokens": prompt + answered,
        "prompt_tokens_details": {"cached_tokens": reused},
    }


def models_of(names: list[str], created: int) -> dict:
    models = [
        {"id": name, "object": "model", "created": created, "owned_by": "nanophi"} for name in names
    ]
    return {"object": "list", "data": models}


assert SAMPLING.keys() <= FILTERS.keys()
