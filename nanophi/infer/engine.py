"""Many answers at once by one model: requests come and go between two steps (continuous batching).

                      ┌ queue ┐      rows of the KV cache
    submit(request) ─>│ r5 r4 │─>    0  r1  ........        each step gives one token
                      └───────┘      1  r3  ...             to every row in use
                                     2  (what r2 has left: a prompt that begins alike goes on there)

One thread runs the model. `submit` and `cancel` may be called by any other one. What a request
says goes to its `emit`, which is called by the model's thread and should return at once.

A row keeps its keys and values when its request has ended. A later prompt that begins with the same
tokens, as the next turn of a conversation does, reads only the rest.

Each row is what `generate` would give alone, token for token, up to the order of fp32 sums; with
weights in fp16 or int8 the products are the same bit for bit.
"""

import atexit
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor

from nanophi.cli import UserError
from nanophi.infer.decoder import decoder_of
from nanophi.infer.generate import check_prompts
from nanophi.infer.sampling import Ids, Sampling, choose
from nanophi.infer.speaker import Speaker
from nanophi.infer.static import StaticRows, network_for, suits
from nanophi.model.phi import KVCache, Phi
from nanophi.tokenizer.tokenizer import Tokenizer

# ---- what a request says


@dataclass
class Token:
    """One token of an answer."""

    id: int
    logprob: float | None = None  # ln of its probability; where the request asks for it
    best: list[tuple[int, float]] = field(default_factory=list)  # the likeliest and theirs


@dataclass
class Piece:
    """What a step adds to an answer. The last piece has a reason to be the last one.

    text: whole characters that are certain to belong to the answer; it may be empty
    finish: "stop" (its end, or a stop string), "length" (of the answer or the context),
        "cancelled", "timeout", "error"
    """

    text: str
    token: Token | None = None
    finish: str | None = None
    error: str = ""


class Full(UserError):
    """The queue holds as many requests as it may."""


class Request:
    """A prompt, and how it is to be answered.

    prompt:   its ids, as `chat_prompt` gives them
    emit:     gets each Piece of the answer, in the thread of the engine
    max_new_tokens: the longest answer, where the context does not end it before
    how:      the filters of sampling.py, {"temperature": 0.8}; greedy by default
    stop:     strings at which the answer ends; they are not part of it
    logprobs: None, or of how many of the likeliest tokens each Token tells
    seed:     of the sampling
    seconds:  from `submit` on; what has been said by then stays
    """

    def __init__(
        self,
        prompt: list[int],
        emit: Callable[[Piece], None],
        max_new_tokens: int = 256,
        stop: tuple[str, ...] = (),
        logprobs: int | None = None,
        seed: int | None = None,
        seconds: float | None = None,
        how: Mapping[str, Any] | None = None,
    ):
        self.prompt = prompt
        self.emit = emit
        self.max_new_tokens = max_new_tokens
        self.stop = stop
        self.logprobs = logprobs
        self.how = Sampling(**(how or {}))
        self.seed = seed
        self.generator: torch.Generator | None = None  # made by the engine, on the model's device
        self.ids = Ids(prompt)  # prompt and answer
        self.ends_at = float("inf") if seconds is None else time.monotonic() + seconds
        self.room = max_new_tokens
        self.reused = 0  # tokens of the prompt that were there already
        self.cancelled = False
        self.speaker: Speaker | None = None

    @property
    def answered(self) -> int:
        """Tokens of the answer so far."""
        return len(self.ids) - len(self.prompt)

    def cancel(self) -> None:
        """Give its row free at the next step. Whatever thread calls it."""
        self.cancelled = True


# ---- the engine


@dataclass
class Kept:
    """What a row of the cache holds."""

    ids: list[int] = field(default_factory=list)
    free_since: int = -1  # the step


class Engine:
    """A model that answers several requests at once.

    rows: requests that are answered at the same time
    queue: requests that may wait beside these
    room: tokens of the longest prompt with its answer; by default the model's context
    """

    def __init__(
        self, model: Phi, tok: Tokenizer, rows: int = 8, queue: int = 64, room: int | None = None
    ):
        self.model = model
        self.tok = tok
        self.eos = {model.cfg.eos_token_id}
        is_recorded = can_be_recorded(model)
        self.network = network_for(model) if is_recorded else decoder_of(model)
        self.room = room or model.cfg.max_position_embeddings
        self.cache = KVCache(model.cfg, rows, self.room, model.lm_head.weight)
        self.static = StaticRows(self.network, self.cache) if is_recorded else None
        self.kept = [Kept() for _ in range(rows)]
        self.active: list[Request] = []  # row i holds active[i]; the rows behind are free
        self.states: list[Tensor] = []  # (D,), the state of the last token of each active row
        self.waiting: deque[Request] = deque()
        self.most_waiting = queue
        self.work: deque[Callable[[], None]] = deque()
        self.changed = threading.Condition()
        self.closing = False
        self.steps = 0
        self.tokens = 0  # that have been said
        self.thread = threading.Thread(target=self._run, name="nanophi engine", daemon=True)

    def start(self) -> "Engine":
        """Let the thread run; `with Engine(...) as engine:` also closes it at the end.

        An engine that nobody closes is closed when Python ends: a thread that is torn away from
        the middle of a step would abort the process.
        """
        atexit.register(self.close, seconds=0)
        self.thread.start()
        return self

    def __enter__(self) -> "Engine":
        return self.start()

    def __exit__(self, *exception: object) -> None:
        self.close()

    def submit(self, request: Request) -> None:
        """Queue a request. A UserError where its prompt cannot be answered, Full where too many
        wait.
        """
        (room,) = check_prompts(self.model, [request.prompt], request.max_new_tokens)
        request.room = min(room, self.room - len(request.prompt))
        if request.room < 1:
            raise UserError(
                f"the prompt has {len(request.prompt)} tokens, and there is room for {self.room}"
            )
        for token in request.how.chosen.get("logit_bias", {}):
            if token >= self.model.cfg.vocab_size:
                raise UserError(
                    f"logit_bias names id {token}, the model knows ids 0 to "
                    f"{self.model.cfg.vocab_size - 1}"
                )
        request.speaker = Speaker(self.tok.id_to_bytes, request.stop)
        if not request.how.greedy:
            dice = request.generator = torch.Generator(self.model.device)
            dice.seed() if request.seed is None else dice.manual_seed(request.seed)
        with self.changed:
            if self.closing:
                raise Full("the engine is closing")
            if len(self.waiting) >= self.most_waiting:
                raise Full(f"{len(self.waiting)} requests wait already")
            self.waiting.append(request)
            self.changed.notify()

    def stream(
        self, prompt: list[int], max_new_tokens: int = 256, **settings: Any
    ) -> Generator[str, None, bool]:
        """Yield an answer in pieces of whole characters, as `generate.stream` does; here what an
        earlier prompt has in common with this one is not read again.

        settings: of Request: stop, seed, seconds, how. The request is submitted with the first
        `next`, which raises what `submit` raises; a UserError too where the answer fails or ends
        early. The generator returns True where the answer ends because the context is full. To
        close it, or to interrupt it, cancels the request.
        """
        pieces: SimpleQueue[Piece] = SimpleQueue()
        request = Request(prompt, pieces.put, max_new_tokens, **settings)
        self.submit(request)
        try:
            while True:
                piece = pieces.get()
                if piece.text:
                    yield piece.text
                if piece.finish is not None:
                    break
        finally:
            request.cancel()
        if piece.finish in ("error", "timeout", "cancelled"):
            raise UserError(piece.error or f"the answer ended early: {piece.finish}")
        return piece.finish == "length" and request.room < max_new_tokens

    def call(self, work: Callable[[], None]) -> None:
        """Let the model's thread do something between two steps."""
        with self.changed:
            self.work.append(work)
            self.changed.notify()

    def close(self, seconds: float = 30.0) -> None:
        """Take no more requests, answer those that there are for so long, and cancel the rest."""
        atexit.unregister(self.close)
        with self.changed:
            self.closing = True
            ends_at = time.monotonic() + seconds
            for request in [*self.waiting, *self.active]:
                request.ends_at = min(request.ends_at, ends_at)
            self.changed.notify()
        self.thread.join()

    # ---- the thread

    def _run(self) -> None:
        while True:
            with self.changed:
                while not (self.active or self.waiting or self.work or self.closing):
                    self.changed.wait()
                if self.closing and not (self.active or self.waiting):
                    return
            try:
                while self.work:
                    self.work.popleft()()
                self._drop_waiting()
                self._admit()
                self._step()
            except Exception as error:  # one request must not end the others' server
                self._fail(error)

    def _drop_waiting(self) -> None:
        """End requests that nobody waits for any more, or that have waited too long."""
        with self.changed:
            waiting, self.waiting = self.waiting, deque()
            for request in waiting:
                reason = why_ended(request)
                if reason is None:
                    self.waiting.append(request)
                else:
                    tell(request, Piece("", finish=reason))

    @torch.inference_mode()
    def _admit(self) -> None:
        """Give a free row to the request that has waited longest, and read its prompt.

        One a step: the answers that go on wait for one prompt at most.
        """
        with self.changed:
            if not self.waiting or len(self.active) == len(self.kept):
                return
            request = self.waiting.popleft()
        row = len(self.active)
        self._reuse(request, row)
        # It is active before its prompt is read: what goes wrong there is its own failure.
        self.active.append(request)
        self.states.append(torch.zeros(0))
        cache = self.cache.part(row, row + 1)
        rest = request.prompt[request.reused :]
        ids = torch.tensor([rest], device=self.model.device)
        self.states[row] = self.network.hidden(ids, cache=cache)[0, -1]
        self.kept[row].ids = list(request.prompt)

    def _reuse(self, request: Request, row: int) -> None:
        """Bring the longest beginning of a prompt that any row holds into a free row; where none
        has any, take the row that has been free longest.

        At least one token is left to read, whose state predicts the next one.
        """
        shared = [shared_beginning(kept.ids, request.prompt[:-1]) for kept in self.kept]
        best = max(range(len(shared)), key=shared.__getitem__)
        request.reused = shared[best]
        is_free = best >= row and request.reused
        free = range(row, len(self.kept))
        taken = best if is_free else min(free, key=lambda i: self.kept[i].free_since)
        self._swap(taken, row)
        if request.reused and not is_free:  # a row in use needs it, too
            self.cache.move(best, row)
        self.cache.lengths[row] = request.reused
        self.kept[row].ids = request.prompt[: request.reused]

    def _swap(self, first: int, second: int) -> None:
        if first != second:
            self.cache.swap(first, second)
            self.kept[first], self.kept[second] = self.kept[second], self.kept[first]

    @torch.inference_mode()
    def _step(self) -> None:
        """One token for every active row."""
        if not self.active:
            return
        logits = self.network.lm_head(torch.stack(self.states))  # (B, V)
        tokens = self._choose(logits)
        self.steps += 1
        for row in reversed(range(len(tokens))):
            self._say(row, tokens[row])
        if self.active:
            self.states = list(self._read([request.ids[-1] for request in self.active]))
            for row, request in enumerate(self.active):
                self.kept[row].ids.append(request.ids[-1])

    def _read(self, ids: list[int]) -> Tensor:
        """The states (rows, D) after one more token of each active row."""
        if self.static is not None:
            return self.static.read(ids)
        tokens = torch.tensor(ids).to(self.model.device)[:, None]
        return self.network.hidden(tokens, cache=self.cache.part(0, len(ids)))[:, -1]

    def _choose(self, logits: Tensor) -> list[Token]:
        """The next token of each row, by the row's own settings and random numbers."""
        plain = [row for row, r in enumerate(self.active) if not r.how.chosen]
        chosen: dict[int, int] = {}
        if plain:  # all of them in one pass
            history = [self.active[row].ids for row in plain]
            chosen.update(zip(plain, choose(logits[plain], history, Sampling()), strict=True))
        tokens = []
        for row, request in enumerate(self.active):
            if row not in chosen:
                own = logits[row : row + 1]
                chosen[row] = choose(own, [request.ids], request.how, request.generator)[0]
            tokens.append(Token(chosen[row]))
            if request.logprobs is not None:
                logprobs = logits[row].float().log_softmax(-1)
                tokens[-1].logprob = float(logprobs[chosen[row]])
                best = logprobs.topk(min(request.logprobs, len(logprobs)))
                tokens[-1].best = list(
                    zip(best.indices.tolist(), best.values.tolist(), strict=True)
                )
        return tokens

    def _say(self, row: int, token: Token) -> None:
        """Tell a request its next token, and end it where that is the last one."""
        request = self.active[row]
        assert request.speaker is not None
        request.ids.append(token.id)
        self.tokens += 1
        finish = why_ended(request)
        text = ""
        if token.id in self.eos:
            finish = finish or "stop"
        else:
            text = request.speaker.say(token.id)
            if request.speaker.stopped:
                finish = finish or "stop"
            elif request.answered >= request.room:
                finish = finish or "length"
        if finish is not None:
            text += request.speaker.rest()
            self._leave(row)
        tell(request, Piece(text, token, finish))

    def _leave(self, row: int) -> None:
        """Take a row out of use. The last active row moves into its place."""
        last = len(self.active) - 1
        self.active[row] = self.active[last]
        self.states[row] = self.states[last]
        self.active.pop()
        self.states.pop()
        self.kept[row].free_since = self.steps
        self._swap(row, last)

    def _fail(self, error: Exception) -> None:
        """End all active requests: the model could not answer them."""
        message = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        failed = list(self.active)
        self.active.clear()
        self.states.clear()
        self.kept = [Kept() for _ in self.kept]
        self.cache.lengths.zero_()
        for request in failed:
            tell(request, Piece("", finish="error", error=message))


def can_be_recorded(model: Phi) -> bool:
    """Whether steps are played back on a GPU, as static.py does it."""
    return model.device.type == "cuda" and suits(model, Sampling())


def tell(request: Request, piece: Piece) -> None:
    """Give a piece to a request. One whose `emit` fails is cancelled, and the others go on."""
    try:
        request.emit(piece)
    except Exception:  # its event loop is closed, for example
        request.cancelled = True


def why_ended(request: Request) -> str | None:
    """Why a request is to be answered no further."""
    if request.cancelled:
        return "cancelled"
    if time.monotonic() > request.ends_at:
        return "timeout"
    return None


def shared_beginning(first: list[int], second: list[int]) -> int:
    """How many ids two lists have in common at the beginning.

    >>> shared_beginning([5, 6, 7], [5, 6, 8, 9])
    2
    """
    length = min(len(first), len(second))
    if first[:length] == second[:length]:
        return length
    return next(i for i in range(length) if first[i] != second[i])
