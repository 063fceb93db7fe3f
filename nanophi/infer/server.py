"""An API that every OpenAI client speaks, and a page to talk to the model.

    python generate.py --model out/dpo --serve

    GET  /                        the page
    POST /v1/chat/completions     /v1/completions     GET /v1/models
    POST /v1/preferences          with --prefer: a row for dpo.py
    POST /v1/microscope           what the model thinks at one token, and what each filter changes
    GET  /health                  GET /metrics

The model runs in the engine's thread; here everything is asyncio. A client that goes away gives its
row free. Needs the packages of `pip install 'nanophi[serve]'`: starlette and uvicorn.

Reading order: `serve_at`, the routes, `Answering`, which joins the pieces of an answer.
"""

import asyncio
import contextlib
import hmac
import json
import socket
import threading
import time
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from nanophi.cli import UserError
from nanophi.expect import Expected
from nanophi.infer.engine import Engine, Full, Piece, Request
from nanophi.infer.openai_api import (
    Ask,
    Defaults,
    Refusal,
    Reply,
    Said,
    models_of,
    read_ask,
    read_body,
    refuse_unless,
    usage_of,
)
from nanophi.infer.prefer import Preferences
from nanophi.infer.sampling import FILTERS, NEVER, Sampling
from nanophi.tokenizer.report import describe

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.middleware import Middleware
    from starlette.requests import ClientDisconnect
    from starlette.requests import Request as HttpRequest
    from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, StreamingResponse
    from starlette.routing import Route
except ModuleNotFoundError as error:
    raise UserError(
        f"--serve needs the package {error.name}: pip install starlette uvicorn"
    ) from None

PAGE = Path(__file__).with_name("page.html")
LARGEST_BODY = 2**20  # bytes
# An answer is sent so often, in seconds: all tokens that came in between go out together. No reader
# sees the difference, and each event costs a part of the time that the model takes for a token.
PAUSE = 1 / 30
ALTERNATIVES = 10  # tokens that the microscope shows


@dataclass
class Settings:
    """What the command line says about the server."""

    api_key: str | None = None
    seconds: float = 300.0  # that an answer may take
    drain: float = 10.0  # seconds that answers may go on after SIGTERM
    history: int = 0  # turns that the page shows the model
    defaults: Defaults = field(default_factory=Defaults)


def serve_at(
    listening: socket.socket,
    engines: dict[str, Engine],
    settings: Settings,
    preferences: Preferences | None = None,
) -> None:
    """Serve until SIGINT or SIGTERM. engines: by the names of their models"""
    server = Server(
        uvicorn.Config(
            make_app(engines, settings, preferences),
            log_level="warning",
            timeout_graceful_shutdown=int(settings.drain) + 5,
            timeout_keep_alive=20,
        ),
        list(engines.values()),
        settings.drain,
    )
    host, port = listening.getsockname()[:2]
    place = f"http://{host}:{port}"
    with contextlib.ExitStack() as stack:
        for engine in engines.values():
            stack.enter_context(engine)
        print(f"serving {', '.join(engines)} at {place}/ and {place}/v1; Ctrl-C ends", flush=True)
        server.run(sockets=[listening])


def listen(host: str, port: int) -> socket.socket:
    """A socket; a UserError where there can be none."""
    try:
        listening = socket.create_server((host, port))
        # Its connections inherit this. Without it the first token waits 40 ms, until the client has
        # confirmed the headers (Nagle's algorithm).
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return listening
    except OSError as error:
        raise UserError(
            f"--host {host} --port {port}: {error.strerror or error}; another --port may be free"
        ) from None


class Server(uvicorn.Server):
    """uvicorn's, which tells the engines at once that it is to end."""

    def __init__(self, config: uvicorn.Config, engines: list[Engine], drain: float):
        super().__init__(config)
        self.engines = engines
        self.drain = drain

    def handle_exit(self, sig: int, frame: Any) -> None:
        for engine in self.engines:
            threading.Thread(target=engine.close, args=(self.drain,), daemon=True).start()
        super().handle_exit(sig, frame)


# ---- the routes


def make_app(
    engines: dict[str, Engine], settings: Settings, preferences: Preferences | None = None
) -> Starlette:
    app = App(engines, settings, preferences)
    routes = [
        Route("/", app.page),
        Route("/health", app.health),
        Route("/metrics", app.metrics),
        Route("/v1/models", app.models),
        Route("/v1/chat/completions", app.chat, methods=["POST"]),
        Route("/v1/completions", app.complete, methods=["POST"]),
        Route("/v1/microscope", app.microscope, methods=["POST"]),
    ]
    if preferences is not None:
        routes.append(Route("/v1/preferences", app.prefer, methods=["POST"]))
    return Starlette(
        routes=routes,
        middleware=[Middleware(Guard, api_key=settings.api_key)],
        exception_handlers={Refusal: refused, 404: not_found, 405: not_found},
    )


class Guard:
    """Asks for the key, and answers what fails with an error in OpenAI's form."""

    OPEN = ("/", "/health")  # paths that need no key

    def __init__(self, app: Any, api_key: str | None):
        self.app = app
        self.expected = None if api_key is None else f"Bearer {api_key}".encode()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and self.expected and scope["path"] not in self.OPEN:
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(given, self.expected):
                refusal = Refusal("a valid API key is missing", code="invalid_api_key", status=401)
                await JSONResponse(refusal.body, 401)(scope, receive, send)
                return
        await self.app(scope, receive, send)


async def refused(request: HttpRequest, error: Exception) -> JSONResponse:
    assert isinstance(error, Refusal)
    headers = {"Retry-After": "1"} if error.status in (429, 503) else None
    return JSONResponse(error.body, error.status, headers)


async def not_found(request: HttpRequest, error: Exception) -> JSONResponse:
    status = getattr(error, "status_code", 404)
    message = f"there is no {request.method} {request.url.path[:100]} here"
    return JSONResponse(Refusal(message, status=status).body, status)


@dataclass
class Counts:
    """What /metrics tells."""

    requests: dict[str, int] = field(default_factory=dict)  # by how they ended
    first_token_s: float = 0.0  # the sum
    first_tokens: int = 0
    started: float = field(default_factory=time.monotonic)

    def ended(self, how: str) -> None:
        self.requests[how] = self.requests.get(how, 0) + 1


class App:
    """The functions behind the routes."""

    def __init__(
        self, engines: dict[str, Engine], settings: Settings, preferences: Preferences | None
    ):
        self.engines = engines
        self.settings = settings
        self.preferences = preferences
        self.writing = asyncio.Lock()
        self.created = int(time.time())
        self.counts = Counts()

    # what only reads

    async def page(self, request: HttpRequest) -> HTMLResponse:
        """The page; it may ask nobody but this server, and no other page may show it in a frame."""
        policy = (
            "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
            "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
            "frame-ancestors 'none'"
        )
        about = json.dumps(
            {
                "models": list(self.engines),
                "prefer": self.preferences is not None,
                "locked": self.settings.api_key is not None,
                "settings": {
                    "history": self.settings.history,
                    "max_tokens": self.settings.defaults.max_new_tokens,
                    **self.settings.defaults.how,
                },
            }
        )
        text = PAGE.read_text(encoding="utf-8").replace(
            "{/*ABOUT*/}", about.replace("<", "\\u003c")
        )
        return HTMLResponse(text, headers={"Content-Security-Policy": policy})

    async def health(self, request: HttpRequest) -> JSONResponse:
        alive = all(engine.thread.is_alive() for engine in self.engines.values())
        return JSONResponse({"status": "ok" if alive else "ending"}, 200 if alive else 503)

    async def models(self, request: HttpRequest) -> JSONResponse:
        return JSONResponse(models_of(list(self.engines), self.created))

    async def metrics(self, request: HttpRequest) -> PlainTextResponse:
        """Counters in the form that Prometheus reads."""
        engines = list(self.engines.values())
        seconds = time.monotonic() - self.counts.started
        tokens = sum(engine.tokens for engine in engines)
        lines = {
            "nanophi_tokens_total": tokens,
            "nanophi_tokens_per_second": tokens / seconds,
            "nanophi_steps_total": sum(engine.steps for engine in engines),
            "nanophi_active": sum(len(engine.active) for engine in engines),
            "nanophi_waiting": sum(len(engine.waiting) for engine in engines),
            "nanophi_first_token_seconds_sum": self.counts.first_token_s,
            "nanophi_first_token_seconds_count": self.counts.first_tokens,
        }
        for how, count in sorted(self.counts.requests.items()):
            lines[f'nanophi_requests_total{{ended="{how}"}}'] = count
        return PlainTextResponse("".join(f"{name} {value}\n" for name, value in lines.items()))

    # what answers

    async def chat(self, request: HttpRequest) -> Any:
        return await self._answer(request, in_chat=True)

    async def complete(self, request: HttpRequest) -> Any:
        return await self._answer(request, in_chat=False)

    async def _answer(self, request: HttpRequest, in_chat: bool) -> Any:
        body = await read(request)
        name, engine = self._engine(body.get("model"))
        ask = read_ask(body, engine.tok, in_chat, self.settings.defaults)
        reply = Reply(name, in_chat, engine.tok, ask)
        answering = Answering(engine, ask, self.settings.seconds, self.counts)
        if ask.stream:
            return StreamingResponse(
                answering.events(reply),
                media_type="text/event-stream",
                headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
            )
        with answering:
            done = await unless_gone(request, answering.whole())
        if done is None:
            return PlainTextResponse("", 499)  # nobody reads it
        return JSONResponse(reply.whole(done, answering.usage()))

    def _engine(self, name: Any) -> tuple[str, Engine]:
        """The engine of a model; the first one where none is named."""
        if name is None:
            return next(iter(self.engines.items()))
        if not isinstance(name, str) or name not in self.engines:
            raise Refusal(
                f"there is no model {str(name)[:60]!r}; there are {', '.join(self.engines)}",
                "model",
                "model_not_found",
                404,
            )
        return name, self.engines[name]

    async def prefer(self, request: HttpRequest) -> JSONResponse:
        """Append a row for dpo.py to the file of --prefer."""
        assert self.preferences is not None
        body = await read(request)
        row = {}
        for name in ("prompt", "chosen", "rejected"):
            refuse_unless(body.get(name), Expected(str), name)
            row[name] = body[name]
            if not row[name].strip():
                raise Refusal(f"{name} is empty", name, "invalid_value")
        try:
            async with self.writing:
                await asyncio.to_thread(self.preferences.append, row)
        except UnicodeEncodeError:
            raise Refusal("a text holds half of a surrogate pair", code="invalid_value") from None
        return JSONResponse({"rows": len(self.preferences)})

    async def microscope(self, request: HttpRequest) -> JSONResponse:
        """The tokens of a prompt and its answer; at the token `at`, the likeliest ones before and
        after each filter.
        """
        body = await read(request)
        _, engine = self._engine(body.get("model"))
        at = body.get("at")
        refuse_unless(at, Expected(int, at_least=1, optional=True), "at")
        answer = body.get("answer", [])
        refuse_unless(answer, Expected(list, of=Expected(int)), "answer")
        asked = {name: body[name] for name in body if name not in ("at", "answer")}
        ask = read_ask(asked, engine.tok, True, self.settings.defaults)
        ids = [*ask.prompt, *answer]
        if len(ids) > engine.room or any(not 0 <= i < engine.model.cfg.vocab_size for i in ids):
            raise Refusal(f"at most {engine.room} tokens that the model knows are looked at")
        if at is not None and at >= len(ids):
            raise Refusal(f"at is {at}, and there are {len(ids)} tokens", "at", "invalid_value")
        future = asyncio.get_running_loop().create_future()
        loop = asyncio.get_running_loop()

        def look() -> None:
            try:
                seen = look_at(engine, ids, len(ask.prompt), at, Sampling(**ask.how))
                loop.call_soon_threadsafe(settle, future, seen)
            except Exception as error:
                loop.call_soon_threadsafe(settle, future, error)

        engine.call(look)
        return JSONResponse(await future)


def settle(future: asyncio.Future, result: Any) -> None:
    if future.done():
        return
    if isinstance(result, Exception):
        future.set_exception(result)
    else:
        future.set_result(result)


async def read(request: HttpRequest) -> dict:
    """The JSON object of a request that is not too large.

    Another content type is refused: browsers send it to any server without asking, so that any page
    could talk to a model that runs on its reader's machine.
    """
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind != "application/json":
        raise Refusal("the content type must be application/json", status=415)
    data = bytearray()
    try:
        async for part in request.stream():
            data += part
            if len(data) > LARGEST_BODY:
                raise Refusal(f"the body is larger than {LARGEST_BODY:,} bytes", status=413)
    except ClientDisconnect:
        raise Refusal("the client has gone away") from None
    return read_body(bytes(data))


async def unless_gone(request: HttpRequest, work: Any) -> Any:
    """The result of `work`; None where the client goes away before, and the work is cancelled."""

    async def gone() -> None:
        while not await request.is_disconnected():
            await asyncio.sleep(0.1)

    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return tasks[0].result() if tasks[0].done() else None
    finally:
        for task in tasks:
            task.cancel()


# ---- an answer, from the engine's thread to a client


class Answering:
    """The requests of one Ask, and the pieces that come of them: (number of the choice, piece)."""

    def __init__(self, engine: Engine, ask: Ask, seconds: float, counts: Counts):
        self.engine = engine
        self.ask = ask
        self.counts = counts
        self.loop = asyncio.get_running_loop()
        self.pieces: deque[tuple[int, Piece]] = deque()
        self.requests: list[Request] = []
        self.has_news = asyncio.Event()  # a piece, where one is waited for
        self.has_ended = asyncio.Event()  # a choice
        self.waits = False
        self.began = time.monotonic()
        self.has_begun = False
        try:
            for index in range(ask.choices):
                seed = None if ask.seed is None else ask.seed + index
                request = Request(
                    ask.prompt, self._emit(index), ask.max_new_tokens, ask.stop, ask.logprobs,
                    seed, seconds, ask.how,
                )  # fmt: skip
                engine.submit(request)
                self.requests.append(request)
        except Full as error:
            self.close()
            status = 503 if engine.closing else 429
            raise Refusal(str(error), code="overloaded", status=status) from None
        except UserError as error:
            self.close()
            code = "context_length_exceeded" if "was made for" in str(error) else "invalid_value"
            raise Refusal(str(error), "messages", code) from None

    def _emit(self, index: int) -> Any:
        """What the engine's thread calls with each piece. It wakes the loop only where that waits:
        otherwise each token would take the interpreter from the model.
        """

        def emit(piece: Piece) -> None:
            self.pieces.append((index, piece))
            if piece.finish is not None:
                self.loop.call_soon_threadsafe(self.has_ended.set)
            if self.waits:
                self.loop.call_soon_threadsafe(self.has_news.set)

        return emit

    def __enter__(self) -> "Answering":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the rows free, where answers still go on."""
        for request in self.requests:
            request.cancel()

    async def stream(self) -> AsyncIterator[tuple[int, Said]]:
        """The parts of all choices, as they come. A Refusal where an answer fails."""
        going_on = len(self.requests)
        while going_on:
            if self.has_begun:
                await within(PAUSE, self.has_ended)
            await self._piece()
            self.has_ended.clear()
            waiting = [self.pieces.popleft() for _ in range(len(self.pieces))]
            if not self.has_begun:
                self.has_begun = True
                self.counts.first_token_s += time.monotonic() - self.began
                self.counts.first_tokens += 1
            parts: dict[int, Said] = {}
            for index, piece in waiting:
                self._refuse_failed(piece)
                part = parts.setdefault(index, Said())
                part.text += piece.text
                part.tokens += [] if piece.token is None else [piece.token]
                part.finish = piece.finish
            for index, part in parts.items():
                if part.finish is not None:
                    going_on -= 1
                    self.counts.ended(part.finish)
                yield index, part

    async def _piece(self) -> None:
        """Wait until there is a piece."""
        self.has_news.clear()
        self.waits = True
        if not self.pieces:  # asked after `waits` is set: none can come unseen in between
            await self.has_news.wait()
        self.waits = False

    def _refuse_failed(self, piece: Piece) -> None:
        """A Refusal where the answer cannot go on."""
        if piece.finish in ("error", "timeout", "cancelled"):
            self.counts.ended(piece.finish)
            reasons = {"error": piece.error, "timeout": "the time for the answer is over"}
            message = reasons.get(piece.finish, "the answer was cancelled")
            raise Refusal(message, code=piece.finish, status=500)

    async def whole(self) -> list[Said]:
        """All choices, when they are complete."""
        choices = [Said() for _ in self.requests]
        async for index, part in self.stream():
            choices[index].text += part.text
            choices[index].tokens += part.tokens
            choices[index].finish = part.finish
        return choices

    def usage(self) -> dict:
        answered = sum(request.answered for request in self.requests)
        reused = self.requests[0].reused
        return usage_of(len(self.ask.prompt), answered, reused)

    async def events(self, reply: Reply) -> AsyncIterator[str]:
        """The answer as server-sent events. An error is the last event, without [DONE]."""
        begun: set[int] = set()
        try:
            async for index, part in self.stream():
                tells_more = self.ask.with_ids or self.ask.logprobs is not None
                if not (part.text or part.finish or tells_more or index not in begun):
                    continue  # half a character: nothing to show yet
                yield event(reply.chunk(index, part, first=index not in begun))
                begun.add(index)
            if self.ask.with_usage:
                yield event(reply.usage_chunk(self.usage()))
            yield "data: [DONE]\n\n"
        except Refusal as error:
            yield event(error.body)
        finally:
            self.close()


async def within(seconds: float, event: asyncio.Event) -> None:
    """Wait for an event, but no longer than that."""
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(event.wait(), seconds)


def event(data: dict) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


# ---- the microscope


@torch.inference_mode()
def look_at(
    engine: Engine, ids: list[int], prompt: int, at: int | None, how: Sampling
) -> dict[str, Any]:
    """What the model thinks of each token; at one of them, what each filter makes of it.

    prompt: how many of the ids are the prompt
    """
    model, tok = engine.model, engine.tok
    logits = model(torch.tensor([ids], device=model.device))[0].float()  # (T, V)
    logprobs = logits.log_softmax(-1)
    own = logprobs[:-1].gather(1, torch.tensor(ids[1:], device=model.device)[:, None])[:, 0]
    probabilities = [None, *own.exp().tolist()]  # nothing predicts the first token

    def spelled(token: int) -> str:
        """Its text; of a part of a character the bytes, <E5><BB>."""
        return describe(tok, token)[0] if token in tok.id_to_bytes else ""

    tokens = [
        {"id": token, "text": spelled(token), "p": p, "answer": place >= prompt}
        for place, (token, p) in enumerate(zip(ids, probabilities, strict=True))
    ]
    seen: dict[str, Any] = {"tokens": tokens}
    if at is not None:
        before = logits[at - 1 : at]
        best = before[0].topk(min(ALTERNATIVES, before.shape[1])).indices.tolist()
        steps = [("model", before.softmax(-1)[0, best].tolist())]
        for name, value in how.chosen.items():
            row = FILTERS[name]
            if row.greedy or not how.greedy:
                filtered = row.apply(before, [ids[:at]], value)
                if (filtered > NEVER).any():
                    before = filtered
                steps.append((name, before.softmax(-1)[0, best].tolist()))
        seen["at"] = at
        seen["alternatives"] = [
            {"id": token, "text": spelled(token), "p": [step[1][i] for step in steps]}
            for i, token in enumerate(best)
        ]
        seen["filters"] = [name for name, _ in steps]
    return seen
