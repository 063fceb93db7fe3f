r"""Generation: run the prompt through the model once, then decode one token at a time.

    ids = generate(model, prompt_ids, max_new_tokens=100)    all at once, for one prompt or many
    for piece in stream(model, tok, "春天来了"):              text as it comes, whole characters
        print(piece, end="")

Both are greedy unless a temperature is given. They take the filters of sampling.py as keywords, and
`max_new_tokens`, `eos_token_id` and `generator`; names and meanings are those of transformers.

The loop is `decode_steps`. With a prompt of three tokens:

    step     model reads     KV cache holds     logits of      gives
    1        5 6 7           5 6 7              7              8       prefill
    2        8               5 6 7 8            8              9       decode: one token a step
    3        9               5 6 7 8 9          9              4
"""

import codecs
from collections.abc import Iterator, Sequence
from numbers import Integral
from typing import Any, Literal, Unpack

import torch
from torch import Tensor

from nanophi.cli import UserError
from nanophi.infer.sampling import Keywords, Sampling, choose
from nanophi.model.phi import KVCache, Phi
from nanophi.tokenizer.tokenizer import Tokenizer

Eos = int | list[int] | None | Literal["config"]


# ---- the two entrances


def generate(
    model: Phi,
    ids: list[int] | Tensor | Sequence[list[int]],
    max_new_tokens: int = 256,
    *,
    eos_token_id: Eos = "config",
    generator: torch.Generator | None = None,
    **how: Unpack[Keywords],
) -> list:
    """Continue one prompt, or many prompts at once.

    ids: one prompt, a list of ids or a LongTensor (T,); or a list of prompts, of any lengths
    eos_token_id: the id or ids that end an answer; by default those of the config; with None an
        answer always has max_new_tokens ids
    generator: gives the random numbers, on the device of the model
    how: the filters of sampling.py, temperature=0.8, top_k=50 and so on; greedy by default

    Returns the new ids, [EOS] included, without the prompt; for many prompts a list of such lists.
    A UserError where a prompt is text, empty, longer than the context, or has ids that the model
    does not know. An answer may grow beyond the context; it is then on positions that the model
    was not trained on.
    """
    given: list[Any] = ids.tolist() if hasattr(ids, "tolist") else list(ids)
    check_is_no_text(given)
    many = bool(given) and not isinstance(given[0], Integral)
    prompts = [list(map(int, prompt)) for prompt in given] if many else [given]
    check_prompts(model, prompts)
    eos = stop_ids(model, eos_token_id)
    answers: list[list[int]] = [[] for _ in prompts]
    running = set(range(len(prompts)))
    for new in decode_steps(model, prompts, max_new_tokens, Sampling(**how), generator):
        for row in list(running):
            answers[row].append(new[row])
            if new[row] in eos:
                running.discard(row)
        if not running:
            break
    return answers if many else answers[0]


def stream(
    model: Phi,
    tok: Tokenizer,
    prompt: str | list[int],
    max_new_tokens: int = 256,
    *,
    eos_token_id: Eos = "config",
    generator: torch.Generator | None = None,
    **how: Unpack[Keywords],
) -> Iterator[str]:
    r"""Yield the continuation of `prompt` in pieces of whole characters.

    The prompt is taken as it is; `chat_prompt` puts a question into the chat template. [EOS] ends
    the stream and is not part of it. The other arguments are those of `generate`.

    A token may end within a character: 好 is the three bytes e5 a5 bd, and a tokenizer that did not
    learn 好 spells it with two or three tokens. The decoder keeps the bytes of an unfinished
    character until the rest arrives. A character that max_new_tokens cuts in half is not shown.

    >>> utf8 = codecs.getincrementaldecoder("utf-8")("replace")
    >>> [utf8.decode(token) for token in (b"\xe5", b"\xa5\xbd", b"\xef\xbc\x81")]
    ['', '好', '！']
    """
    ids = tok.encode(prompt) if isinstance(prompt, str) else list(prompt)
    check_prompts(model, [ids])
    eos = stop_ids(model, eos_token_id)
    utf8 = codecs.getincrementaldecoder("utf-8")("replace")
    for (new,) in decode_steps(model, [ids], max_new_tokens, Sampling(**how), generator):
        if new in eos:
            break
        # The model may have more rows than there are tokens; such an id spells nothing.
        piece = utf8.decode(tok.id_to_bytes.get(new, b""))
        if piece:
            yield piece


# ---- the loop


@torch.inference_mode()
def decode_steps(
    model: Phi,
    prompts: list[list[int]],
    max_new_tokens: int,
    how: Sampling,
    generator: torch.Generator | None = None,
) -> Iterator[list[int]]:
    """Yield the next id of every prompt, max_new_tokens times.

    A row goes on after its [EOS], because all rows of a batch take the same steps. The caller stops
    reading a row, and stops the loop after the last one.
    """
    ids, left_pad = pad_left(prompts, model.cfg.pad_token_id)
    ids = ids.to(model.device)
    if left_pad is not None:
        left_pad = left_pad.to(model.device)
    room = ids.shape[1] + max_new_tokens
    cache = KVCache(model.cfg, len(prompts), room, model.lm_head.weight, left_pad)
    history = [list(prompt) for prompt in prompts]
    for _ in range(max_new_tokens):
        hidden = model.hidden(ids, cache=cache)  # (B, T, D); T is 1 after the first step
        logits = model.lm_head(hidden[:, -1])  # (B, V); only the last position needs the head
        new = choose(logits, history, how, generator)
        for row, token in zip(history, new, strict=True):
            row.append(token)
        yield new
        ids = torch.tensor(new, device=model.device)[:, None]


def pad_left(prompts: list[list[int]], pad_id: int) -> tuple[Tensor, Tensor | None]:
    """Prompts -> ids (B, T), and how many places of each row are padding (B,); None if none are.

    The padding is on the left, so that every prompt ends in the last column: there the model
    predicts its next token, and from there all rows grow by one column a step. The KV cache hides
    the padding and counts positions from each prompt's first real token (see KVCache).

    >>> ids, left_pad = pad_left([[5, 6], [7, 8, 9, 4]], pad_id=0)
    >>> ids
    tensor([[0, 0, 5, 6],
            [7, 8, 9, 4]])
    >>> left_pad
    tensor([2, 0])
    """
    longest = max(map(len, prompts))
    left_pad = [longest - len(prompt) for prompt in prompts]
    rows = [[pad_id] * pad + prompt for pad, prompt in zip(left_pad, prompts, strict=True)]
    if any(left_pad):
        return torch.tensor(rows), torch.tensor(left_pad)
    return torch.tensor(rows), None


def stop_ids(model: Phi, eos_token_id: Eos) -> set[int]:
    """The ids that end an answer."""
    if eos_token_id == "config":
        eos_token_id = model.cfg.eos_token_id
    if eos_token_id is None:
        return set()
    if isinstance(eos_token_id, int):
        return {eos_token_id}
    return set(eos_token_id)


# ---- mistakes that are found before the model runs


def check_is_no_text(ids: list) -> None:
    """Refuse text where token ids are needed: the list of "你好" is ["你", "好"]."""
    if any(isinstance(item, str) for item in ids):
        raise UserError(
            "generate continues token ids, and this prompt is text: encode it first, with "
            "tok.encode(text) or chat_prompt(text, tok), or use stream(model, tok, text)"
        )


def check_prompts(model: Phi, prompts: list[list[int]]) -> None:
    """Refuse prompts that are empty or too long, and ids that the model does not know."""
    context = model.cfg.max_position_embeddings
    vocab_size = model.cfg.vocab_size
    if not prompts or not all(prompts):
        raise UserError("a prompt is empty: there is nothing to continue")
    for prompt in prompts:
        if len(prompt) > context:
            raise UserError(
                f"the prompt has {len(prompt)} tokens, the model was made for {context}: shorten it"
            )
        unknown = [token for token in prompt if not 0 <= token < vocab_size]
        if unknown:
            raise UserError(
                f"the prompt has id {unknown[0]}, the model knows ids 0 to {vocab_size - 1}: "
                "encode the prompt with the model's own tokenizer"
            )
