r"""Generation: run the prompt through the model once, then decode one token at a time.

    ids = generate(model, prompt_ids, max_new_tokens=100)    all at once, for one prompt or many
    for piece in stream(model, tok, "春天来了"):              text as it comes, whole characters
        print(piece, end="")

Both are greedy unless a temperature is given. They take the filters of sampling.py as keywords, and
`max_new_tokens`, `eos_token_id` and `generator`; names and meanings are those of transformers.

An answer ends with [EOS], after max_new_tokens, or where the context is full: prompt and answer
together have at most max_position_embeddings tokens.

The loop is `decode_steps`. With a prompt of three tokens:

    step     model reads     KV cache holds     logits of      gives
    1        5 6 7           5 6 7              7              8       prefill
    2        8               5 6 7 8            8              9       decode: one token a step
    3        9               5 6 7 8 9          9              4
"""

from collections.abc import Generator, Iterator, Sequence
from typing import Any, Literal, Unpack

import torch
from torch import Tensor

from nanophi.cli import UserError
from nanophi.expect import Expected, check, shown
from nanophi.infer.decoder import Decoder, decoder_of
from nanophi.infer.lookup import lookup_steps
from nanophi.infer.sampling import Ids, Keywords, Sampling, choose
from nanophi.infer.speaker import Speaker
from nanophi.model.phi import KVCache, Phi
from nanophi.tokenizer.tokenizer import Tokenizer

Eos = int | list[int] | None | Literal["config"]
Network = Decoder | Phi


# ---- the two entrances


def generate(
    model: Phi,
    ids: Sequence[int] | Sequence[Sequence[int]] | Tensor,
    max_new_tokens: int = 256,
    *,
    eos_token_id: Eos = "config",
    generator: torch.Generator | None = None,
    lookup: int = 0,
    **how: Unpack[Keywords],
) -> list:
    """Continue one prompt, or many prompts at once.

    ids: one prompt, a list of ids; or a list of prompts, of any lengths. Tensors and NumPy arrays
        of whole numbers are taken too, (T,) for one prompt and (B, T) for many
    max_new_tokens: the longest answer, where the context does not end it before
    eos_token_id: the id or ids that end an answer; by default those of the config; with None an
        answer goes on to its longest
    generator: gives the random numbers, on the device of the model
    lookup: guess so many tokens a step, from what came before (see lookup.py). The answer is the
        same, and comes sooner where it quotes its prompt; 3 costs little. For one greedy answer
    how: the filters of sampling.py, temperature=0.8, top_k=50 and so on; greedy by default

    Several samples of one prompt: generate(model, [ids] * 4, temperature=0.8). Probabilities of the
    tokens: a Request of engine.py with `logprobs`.

    Returns the new ids, [EOS] included, without the prompt; for many prompts a list of such lists.
    An answer also ends where the context is full. A UserError where a prompt is text, empty, as
    long as the context, or has ids that the model does not know.
    """
    prompts, many = as_prompts(ids)
    rooms = check_prompts(model, prompts, max_new_tokens)
    eos = stop_ids(model, eos_token_id)
    answers: list[list[int]] = [[] for _ in prompts]
    for new in steps_of(model, prompts, rooms, eos, Sampling(**how), generator, lookup):
        for row, token in new.items():
            answers[row].append(token)
    return answers if many else answers[0]


def stream(
    model: Phi,
    tok: Tokenizer,
    prompt: str | Sequence[int] | Tensor,
    max_new_tokens: int = 256,
    *,
    eos_token_id: Eos = "config",
    generator: torch.Generator | None = None,
    lookup: int = 0,
    stop: Sequence[str] = (),
    **how: Unpack[Keywords],
) -> Generator[str, None, bool]:
    """Yield the continuation of `prompt` in pieces of whole characters.

    The prompt is taken as it is; `chat_prompt` puts a question into the chat template. [EOS] ends
    the stream and is not part of it. The other arguments are those of `generate`.

    The stream also ends where the context is full. Then the generator returns True, which
    `is_full = yield from stream(...)` tells; otherwise False.

    stop: strings at which the text ends; they are not part of it. A character that max_new_tokens
        cuts in half is not shown
    """
    prompts, many = as_prompts(tok.encode(prompt) if isinstance(prompt, str) else prompt)
    if many:
        raise UserError("stream continues one prompt: a text, or one list of ids")
    rooms = check_prompts(model, prompts, max_new_tokens)
    eos = stop_ids(model, eos_token_id)
    stops = stop if isinstance(stop, str) else list(stop)
    check(stops, Expected(list, of=Expected(str)), "stop")
    speaker = Speaker(tok.id_to_bytes, tuple(stop))
    is_full = rooms[0] < max_new_tokens
    for step in steps_of(model, prompts, rooms, eos, Sampling(**how), generator, lookup):
        piece = "" if step[0] in eos else speaker.say(step[0])
        if piece:
            yield piece
        if step[0] in eos or speaker.stopped:
            is_full = False
            break
    rest = speaker.rest()
    if rest:
        yield rest
    return is_full


# ---- the loop


def steps_of(
    model: Phi,
    prompts: list[list[int]],
    rooms: list[int],
    eos: set[int],
    how: Sampling,
    generator: torch.Generator | None,
    lookup: int,
) -> Iterator[dict[int, int]]:
    """`decode_steps`, or the same by prompt lookup or from a recording."""
    check(lookup, Expected(int, at_least=0), "lookup")
    if not isinstance(generator, torch.Generator | None):
        raise UserError(
            f"generator is {shown(generator)}, expected torch.Generator(device).manual_seed(0)"
        )
    if not lookup:
        if model.device.type == "cuda":
            from nanophi.infer.static import static_steps, suits  # which imports this file

            if suits(model, how):
                return static_steps(model, prompts, rooms, eos, how, generator)
        return decode_steps(model, prompts, rooms, eos, how, generator)
    if len(prompts) > 1 or not how.greedy or how.chosen:
        raise UserError("lookup is for one answer, greedy and without filters: leave it out")
    return ({0: token} for token in lookup_steps(model, prompts[0], rooms[0], eos, lookup))


@torch.inference_mode()
def decode_steps(
    model: Phi,
    prompts: list[list[int]],
    rooms: list[int],
    eos: set[int],
    how: Sampling,
    generator: torch.Generator | None = None,
) -> Iterator[dict[int, int]]:
    """Yield the next id of every prompt that goes on, {number of the prompt: id}.

    rooms: how many ids each may get. A prompt ends with an id of `eos` or when its room is full.
    Its row of the batch is then given to the last prompt that goes on:

        rows    0 1 2 3      prompts 0 1 2 3
        1 ends               prompts 0 3 2        three rows are computed
    """
    network = decoder_of(model)
    longest = max(len(prompt) + room for prompt, room in zip(prompts, rooms, strict=True))
    cache = KVCache(model.cfg, len(prompts), longest, model.lm_head.weight)
    history = [Ids(prompt) for prompt in prompts]
    going_on = list(range(len(prompts)))  # the prompt of each row
    states = prefill(network, prompts, cache)  # (B, D)
    while True:
        logits = network.lm_head(states)  # (B, V)
        if not how.greedy and len(going_on) < len(prompts):
            # All rows draw random numbers, so that an answer does not depend on when others end.
            every = logits.new_zeros(len(prompts), logits.shape[1])
            every[going_on] = logits
            chosen = choose(every, history, how, generator)
            new = {prompt: chosen[prompt] for prompt in going_on}
        else:
            chosen = choose(logits, [history[prompt] for prompt in going_on], how, generator)
            new = dict(zip(going_on, chosen, strict=True))
        for prompt, token in new.items():
            history[prompt].append(token)
        yield new
        for row in reversed(range(len(going_on))):
            prompt = going_on[row]
            answer = len(history[prompt]) - len(prompts[prompt])
            if new[prompt] in eos or answer == rooms[prompt]:
                last = going_on.pop()
                if last != prompt:
                    going_on[row] = last
                    cache.move(len(going_on), row)
        if not going_on:
            return
        ids = torch.tensor([new[prompt] for prompt in going_on], device=model.device)
        states = network.hidden(ids[:, None], cache=cache.part(0, len(going_on)))[:, -1]


def prefill(network: Network, prompts: list[list[int]], cache: KVCache) -> Tensor:
    """Read the prompts into an empty cache: the state of the last token of each, (B, D).

    Shorter prompts are padded on the right, where causal attention keeps the padding from all that
    comes before.

        5 6 _ _    lengths become 2 and 4, so that the next token of the first row overwrites the
        7 8 9 4    padding
    """
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    ids = torch.zeros(len(prompts), int(lengths.max()), dtype=torch.int64)
    for row, prompt in zip(ids, prompts, strict=True):
        row[: len(prompt)] = torch.tensor(prompt)
    states = network.hidden(ids.to(network.device), cache=cache)  # (B, T, D)
    cache.lengths.copy_(lengths)
    rows = torch.arange(len(prompts), device=states.device)
    return states[rows, (lengths - 1).to(states.device)]


def stop_ids(model: Phi, eos_token_id: Eos) -> set[int]:
    """The ids that end an answer."""
    if eos_token_id is None:
        return set()
    if eos_token_id == "config":
        eos_token_id = model.cfg.eos_token_id
    ids = list(eos_token_id) if isinstance(eos_token_id, list | tuple | set) else [eos_token_id]
    if not ids:
        raise UserError("eos_token_id is empty; None lets an answer go on to its longest")
    for token in ids:
        known = Expected(int, at_least=0, at_most=model.cfg.vocab_size - 1)
        check(token, known, "eos_token_id", "None lets an answer go on to its longest")
    return set(ids)


# ---- mistakes that are found before the model runs


def as_prompts(ids: Any) -> tuple[list[list[int]], bool]:
    """Prompts of any form as lists, and whether there may be more than one.

    >>> as_prompts(torch.tensor([5, 6]))
    ([[5, 6]], False)
    >>> as_prompts([range(2), (7, 8, 9)])
    ([[0, 1], [7, 8, 9]], True)
    """
    given = _as_list(ids)
    many = isinstance(given, list) and any(isinstance(item, list) for item in given)
    prompts = given if many else [given]
    for prompt in prompts:
        if not isinstance(prompt, list):
            raise UserError(f"{shown(prompt)} is no list of token ids: {EXAMPLE}")
        for token in prompt:
            if not isinstance(token, int) or isinstance(token, bool):
                raise UserError(f"{shown(token)} is no token id: {EXAMPLE}")
    return prompts, many


EXAMPLE = "a prompt is [5, 6, 7], and many are [[5, 6, 7], [8, 9]]"


def _as_list(ids: Any, depth: int = 0) -> Any:
    """Sequences, tensors and arrays as lists; what stands in them, which may be wrong, as it is."""
    if isinstance(ids, str | bytes):  # the list of "你好" is ["你", "好"]
        raise UserError(
            "generate continues token ids, and this prompt is text: encode it first, with "
            "tok.encode(text) or chat_prompt(text, tok), or use stream(model, tok, text)"
        )
    if hasattr(ids, "tolist"):
        return ids.tolist()
    if isinstance(ids, Sequence) and depth < 2:
        return [_as_list(item, depth + 1) for item in ids]
    return ids


def check_prompts(model: Phi, prompts: list[list[int]], max_new_tokens: int) -> list[int]:
    """How many tokens the answer to each prompt may have.

    Refuses prompts that are empty or too long, and ids that the model does not know.
    """
    check(max_new_tokens, Expected(int, at_least=1), "max_new_tokens")
    vocab_size = model.cfg.vocab_size
    if not prompts or not all(prompts):
        raise UserError("a prompt is empty: there is nothing to continue")
    for prompt in prompts:
        unknown = [token for token in prompt if not 0 <= token < vocab_size]
        if unknown:
            raise UserError(
                f"the prompt has id {shown(unknown[0])}, the model knows ids 0 to "
                f"{vocab_size - 1}: encode the prompt with the model's own tokenizer"
            )
    return [min(max_new_tokens, room_behind(model, prompt)) for prompt in prompts]


def room_behind(model: Phi, prompt: list[int]) -> int:
    """Tokens that fit into the context behind a prompt. A UserError where not even one does."""
    context = model.cfg.max_position_embeddings
    if not fits(model, prompt):
        raise UserError(
            f"the prompt has {len(prompt)} tokens, the model was made for {context}: shorten it"
        )
    return context - len(prompt)


def fits(model: Phi, prompt: list[int]) -> bool:
    """Whether the context holds a prompt and at least one token of an answer."""
    return len(prompt) < model.cfg.max_position_embeddings
